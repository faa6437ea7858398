"""Superlinear attention: every token searches anchors that thin out with distance, and reads a span at the best few.

Huang, "Superlinear Multi-Step Attention", 2026, arXiv 2601.18401.

For token t, per head, with a search query q1_t beside the query q2_t, and 1/p = 2 (``search_power`` p):

    a_i = t + 1 - floor(i^(1/p))                    anchors, for the stripes i > w (``sw_index``) with a_i >= 0
    a_1 .. a_k                                      those with the largest s_r = q1_t . K[a_r]          (``topk``)
    span r = [a_r - ceil(b (t+1)^c), a_r + ceil(f (t+1)^c)]    cut to the sequence; c ``span_power``, b ``backward``,
                                                               f ``forward``
    window = the last (w+1)^(1/p) - 1 tokens, up to t; spans end before it
    o_r = softmax over span r and the window of q2_t K^T / sqrt(d), times V
    y_t = sum_r softmax_r(s_r) o_r

The anchors move with t, so no position is left out for good: with b >= 2 the possible spans cover the past. The router
learns through the softmax over s. Each step costs n sqrt(n) at p = c = 1/2. Spans are covered by blocks of keys, so
that many queries share a matrix product; parts are joined by their log-sum-exp.

q is (batch, heads, n, 2 d), the search query first; k and v are (batch, kv_heads, n, d).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, routed, sparse
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotation
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Heads = Float[Tensor, "batch heads n dim"]
    Choice = Int[Tensor, "batch heads n choices"]

CARD = Card(
    id="superlinear-attention",
    kind="token",
    group="sparse",
    title="Superlinear Multi-Step Attention",
    year=2026,
    paper="2601.18401",
    code="concavity-ai/superlinear",
    summary="Searches anchors on a power-law grid counted back from each token, and reads spans at the best of them.",
    patterns=("causal-self",),
    why_not="Anchors are counted back from the place of the token that asks.",
    cost="n sqrt n",
    mask="keys",
    decode="kv",
    small={"sw_index": 1, "backward": 1.0},
    checked="search, spans, window and gate written out token by token; causal softmax when one span holds the past",
    differs="How the window joins the spans (in the softmax of each) and that search scores are not scaled follow the "
    "released kernels. N = 2 steps only. Under padding distances count all tokens; the release starts at the first "
    "that is kept.",
    evidence=Evidence(
        claim="Needle retrieval at any distance: spans that a trained router finds beat a window of as many keys",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.2,
        baseline="fused-neighborhood-attention",
        task_options={"length": 32, "pairs": 4, "power": 1.0},
        options={"sw_index": 1, "backward": 0.5, "forward": 0.0},
        baseline_options={"kernel_size": 12},
    ),
)

#: Channels of anchor keys that are held at a time while searching.
CHUNK = 1 << 19


@dataclass(frozen=True, eq=False)
class Between(Mask):
    """Query i reads the keys first[b, h, i] to last[b, h, i]."""

    first: Int[Tensor, "batch heads n"]
    last: Int[Tensor, "batch heads n"]

    def visible(self, b, h, i, j):
        return (self.first[b, h, i] <= j) & (j <= self.last[b, h, i])


class SuperlinearLayer(AttentionLayer):
    """The layer around `SpanAttention`, with a second projection for the search query."""

    def __init__(self, core: SpanAttention, dim: int, *, bias: bool = True, **own: Any) -> None:
        super().__init__(core, dim, bias=bias, **own)
        self.search = nn.Linear(dim, self.heads * self.head_dim, bias)

    def _heads(self, x, context, how, offset=0):
        q, k, v = super()._heads(x, context, how, offset)
        search = self._split(self.search(x), self.heads)
        if isinstance(self.position, Rotation):
            search = self.position.rotate(search, offset=offset, grid=how.grid)
        return torch.cat([search, q], -1), k, v


@register(CARD)
class SpanAttention(Core):
    """Attention over searched spans and a window.

    Args:
        topk: spans that a token reads.
        sw_index: w, the stripes that the window stands for.
        search_power, span_power: exponents of the number of anchors and of the length of spans.
        backward, forward: lengths of a span before and after its anchor, in units of (t+1)^span_power.
    """

    grouped = True
    layer = SuperlinearLayer
    needs_layer = True

    def __init__(
        self,
        heads: int,
        head_dim: int,
        topk: int = 2,
        sw_index: int = 3,
        search_power: float = 0.5,
        span_power: float = 0.5,
        backward: float = 2.0,
        forward: float = 1.0,
    ) -> None:
        super().__init__(heads, head_dim)
        expect(isinstance(topk, int) and topk >= 1, "topk", topk, "a number >= 1")
        expect(isinstance(sw_index, int) and sw_index >= 0, "sw_index", sw_index, "a number >= 0")
        expect(0 < search_power < 1, "search_power", search_power, "a number between 0 and 1")
        expect(0 < span_power <= 1, "span_power", span_power, "a number above 0, at most 1")
        expect(backward >= 0, "backward", backward, "a number >= 0")
        expect(forward >= 0, "forward", forward, "a number >= 0")
        self.topk, self.sw_index, self.span_power = topk, sw_index, span_power
        self.backward_factor, self.forward_factor = backward, forward
        self.inverse = 1 / search_power
        self.window = self._stripe(sw_index + 1) - 1

    def _stripe(self, i: int) -> int:
        return math.floor(i**self.inverse + 1e-9)

    def stripes(self, length: int) -> list[int]:
        """How far back the anchors of the last of ``length`` tokens lie, the nearest first."""
        found, i = [], self.sw_index + 1
        while self._stripe(i) <= length:
            found.append(self._stripe(i) - 1)
            i += 1
        return found

    @torch.no_grad()
    def search(self, q: Heads, k: Heads, keep: Bool[Tensor, "batch m"] | None, offset: int = 0) -> Choice:
        """The anchors of each token, the best first, -1 for none; ``offset`` is the first token's place."""
        batch, heads, n, _ = q.shape
        kv_heads = k.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        back = torch.tensor(self.stripes(offset + n), device=q.device, dtype=torch.long)
        count = min(self.topk, back.shape[0])
        if count == 0:
            return back.new_zeros(batch, heads, n, 0)
        rows = max(1, CHUNK // (batch * kv_heads * back.shape[0] * k.shape[3]))
        parts = []
        for start in range(0, n, rows):
            piece = q[:, :, start : start + rows].to(wide).unflatten(1, (kv_heads, -1))
            t = torch.arange(offset + start, offset + start + piece.shape[3], device=q.device)
            anchor = t[:, None] - back
            place = anchor.clamp(min=0)
            scores = k[:, :, place].to(wide) @ piece.permute(0, 1, 3, 4, 2)  # batch kv_heads rows stripes group
            there = (anchor >= 0)[None] if keep is None else (anchor >= 0) & keep[:, place]
            best = scores.masked_fill(~there[:, None, ..., None], -math.inf).topk(count, 3)
            found = anchor.expand(batch, kv_heads, -1, -1).unsqueeze(-1).expand_as(scores).gather(3, best.indices)
            found = found.masked_fill(best.values == -math.inf, -1)
            parts.append(found.permute(0, 1, 4, 2, 3).flatten(1, 2))
        return torch.cat(parts, 2)

    def spans(self, anchors: Choice, offset: int = 0) -> tuple[Choice, Choice]:
        """First and last key of each span; first > last where there is none."""
        t = torch.arange(offset, offset + anchors.shape[2], device=anchors.device)[:, None]
        unit = (t + 1).float() ** self.span_power
        first = (anchors - (self.backward_factor * unit).ceil().long()).clamp(min=0)
        last = torch.minimum(anchors + (self.forward_factor * unit).ceil().long(), t - self.window)
        return first, last.masked_fill(anchors < 0, -1)

    def _longest(self, length: int) -> int:
        """The most keys that a span can have."""
        sides = (self.backward_factor, self.forward_factor)
        return min(length, 1 + sum(math.ceil(side * length**self.span_power) + 1 for side in sides))

    def _gates(self, q: Heads, k: Heads, anchors: Choice) -> Float[Tensor, "batch heads choices n"]:
        """What share each span has in the output."""
        held = _taken(k, anchors.clamp(min=0).flatten(2)).unflatten(2, anchors.shape[2:])
        scores = (q.unsqueeze(3) * held).sum(-1)
        return scores.masked_fill(anchors < 0, torch.finfo(q.dtype).min / 2).softmax(-1).transpose(2, 3)

    def _read_spans(self, q: Heads, k: Heads, v: Heads, first: Tensor, last: Tensor, mask: Mask | None):
        """Attention over the span of each query and its log-sum-exp, for one span a head."""
        length = self._longest(k.shape[2])
        if q.shape[2] == 1:  # decoding touches no other keys
            token = first + torch.arange(length, device=q.device)
            keep = token <= last
            token = token.clamp(max=k.shape[2] - 1)
            return sparse.attend_with_lse(q, _taken(k, token), _taken(v, token), mask=masks.Pairs(keep.unsqueeze(2)))
        size = 1 << max(4, length.bit_length() - 2)
        block = first[..., None] // size + torch.arange((length - 2) // size + 2, device=q.device)
        block = block.masked_fill(block > last[..., None] // size, -1)
        return routed.attend(q, k, v, block, size, mask=masks.join(Between(first, last), mask))

    def _read_window(self, q: Heads, k: Heads, v: Heads, mask: Mask | None, offset: int):
        if self.window == 0:
            return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf)
        if offset:
            return sparse.attend_with_lse(q, k[:, :, -self.window :], v[:, :, -self.window :])
        rule = masks.join(masks.window(self.window - 1), mask)
        return sparse.attend_with_lse(q, k, v, mask=rule, causal=True)

    def _folded(self, anchors: Choice, offset: int = 0) -> tuple[Tensor, Tensor]:
        """The spans with each choice as a head of its own."""
        first, last = (t.transpose(2, 3).flatten(1, 2) for t in self.spans(anchors, offset))
        return first, last

    def _attend(self, q: Heads, k: Heads, v: Heads, mask: Mask | None, offset: int = 0) -> Heads:
        search, q = q.chunk(2, -1)
        anchors = self.search(search, k, masks.split(mask)[1], offset)
        out, lse = self._read_window(q, k, v, mask, offset)
        count = anchors.shape[3]
        if count == 0:
            return out
        first, last = self._folded(anchors, offset)
        spans = self._read_spans(q.repeat_interleave(count, 1), k, v, first, last, mask)
        near = out.repeat_interleave(count, 1), lse.repeat_interleave(count, 1)
        joined = sparse.merge([spans, near])[0].unflatten(1, (-1, count))
        return (self._gates(search, k, anchors).unsqueeze(-1) * joined).sum(2)

    def forward(self, q, k, v, *, mask=None, causal=True):
        return self._attend(q, k, v, mask)

    def weights(self, q, k, *, mask=None, causal=True):
        search, q = q.chunk(2, -1)
        anchors = self.search(search, k, masks.split(mask)[1])
        i = torch.arange(q.shape[2], device=q.device)
        near = (i <= i[:, None]) & (i > i[:, None] - self.window)
        count = anchors.shape[3]
        if count == 0:
            return dense.weights(q, k, mask=masks.join(masks.Pairs(near[None, None]), mask))
        rule = Between(*self._folded(anchors)).dense(q.shape[0], q.shape[1] * count, len(i), len(i), device=q.device)
        rows = dense.weights(q.repeat_interleave(count, 1), k, mask=masks.join(masks.Pairs(rule | near), mask))
        return (self._gates(search, k, anchors).unsqueeze(-1) * rows.unflatten(1, (-1, count))).sum(2)

    def step(self, q, k, v, state=None, **extra):
        state = KVCache.start(k, v) if state is None else state.append(k, v)
        offset = state.length - q.shape[2]
        expect(offset == 0 or q.shape[2] == 1, "x", f"{q.shape[2]} tokens", "one token at a time after the first call")
        return self._attend(q, state.keys, state.values, None, offset), state


def _taken(t: Heads, token: Int[Tensor, "batch heads taken"]) -> Heads:
    """Keys by number for each query head, of the key/value head that serves it."""
    index = token.unflatten(1, (t.shape[1], -1)).flatten(2, 3)
    return (
        t.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, t.shape[3])).unflatten(2, (-1, token.shape[2])).flatten(1, 2)
    )
