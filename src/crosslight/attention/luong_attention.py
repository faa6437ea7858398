"""Luong attention: a decoder state scores the encoder states as they are, over all of them or in a window.

Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015, arXiv 1508.04025.

    a_t(s) = softmax_s score(h_t, z_s)                             (batch, heads, n, m)
        dot       h_t . z_s                     general   h_t W_a z_s
        concat    v_a . tanh(W_a [h_t ; z_s])   location  (W_a h_t)_s
    c_t = sum_s a_t(s) z_s                                         (batch, n, context_dim)
    y_t = tanh(W_c [c_t ; h_t])                                    (batch, n, dim)

The window is "global" (all of z), "local-m" (|s - t| <= D) or "local-p", which predicts where to look:

    p_t = S sigmoid(v_p . tanh(W_p h_t)),   |s - p_t| <= D,   a_t(s) exp(-(s - p_t)^2 / (2 (D/2)^2))

The Gaussian comes after the softmax over the window and carries the gradient of p_t; its rows sum to less than 1. S is
the length that the query sees: its last visible key + 1. No query, key or value projections, no 1/sqrt(d), no biases:
states are read raw, and the output is the attentional state y. Input feeding is the decoder's loop, not the layer's.

The paper has one head. With more, each head scores its own slice of h and z with its own W_a, and c joins the slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse
from crosslight.engines.cache import KVCache
from crosslight.errors import expect
from crosslight.registry import register

Score = Literal["dot", "general", "concat", "location"]
Window = Literal["global", "local-m", "local-p"]

CARD = Card(
    id="luong-attention",
    kind="token",
    group="scores",
    title="Effective Approaches to Attention-based Neural Machine Translation",
    year=2015,
    paper="1508.04025",
    code="lmthang/nmt.matlab",
    summary="Scores raw decoder states against raw encoder states (dot, general, concat, location), over all of them "
    "or in a local window whose centre may be predicted.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the paper's formulas written out for one decoder state at a time; general with W_a = I against dot",
    differs="The width inside concat is dim, which the paper leaves open. Heads > 1 are not the paper's.",
    evidence=Evidence(
        claim="At 32 tokens a decoder that attends writes the source out again, where one that reads the mean of the "
        "encoder states cannot",
        task="copy",
        metric="accuracy",
        margin=0.3,
        baseline="mean-pooling",
    ),
)


@dataclass
class LuongCache:
    """The states read so far (or the context), and how many tokens were decoded."""

    states: KVCache
    length: int
    mask: masks.Mask | None
    cross: bool


@register(CARD)
class LuongAttention(Mechanism):
    """tanh(W_c [A z ; x]).

    Args:
        dim: width of x and of the output.
        heads: slices that are scored by themselves; 1 in the paper.
        context_dim: width of the context, dim unless given.
        score: "dot" (equal widths), "general", "concat" or "location" (needs max_length).
        window: "global", "local-m" or "local-p".
        radius: D, how far a local window reaches to each side.
        max_length: the longest context that score="location" can point into.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        score: Score = "general",
        window: Window = "global",
        radius: int = 10,
        max_length: int | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(score in get_args(Score), "score", repr(score), f"one of {', '.join(get_args(Score))}")
        expect(window in get_args(Window), "window", repr(window), f"one of {', '.join(get_args(Window))}")
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(self.context_dim % heads == 0, "heads", heads, f"a divisor of context_dim = {self.context_dim}")
        expect(radius > 0, "radius", radius, "a positive int")
        self.heads, self.score, self.window, self.radius, self.max_length = heads, score, window, radius, max_length
        own, read = dim // heads, self.context_dim // heads
        if score == "dot":
            expect(
                self.context_dim == dim,
                "context_dim",
                self.context_dim,
                f"dim = {dim} for score='dot' (score='general' takes any width)",
            )
        elif score == "general":
            self.w_a = _matrix(heads, own, read)
        elif score == "concat":
            self.w_x, self.w_z, self.v_a = _matrix(heads, own, own), _matrix(heads, read, own), _matrix(heads, own, 1)
        else:
            expect(max_length is not None, "max_length", max_length, "the longest context, for score='location'")
            assert max_length is not None
            self.w_a = _matrix(heads, own, max_length)
        if window == "local-p":
            self.w_p, self.v_p = _matrix(heads, own, own), _matrix(heads, own, 1)
        self.w_c = nn.Linear(self.context_dim + dim, dim, bias=False)

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _scored(self, h: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """What `_scores` compares: queries (batch, heads, n, width) and keys (batch, heads, m, width)."""
        if self.score == "concat":
            return h @ self.w_x, z @ self.w_z
        return (h if self.score == "dot" else h @ self.w_a), z

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.score == "concat":
            return ((q.unsqueeze(3) + k.unsqueeze(2)).tanh() @ self.v_a.unsqueeze(1)).squeeze(-1)
        return q[..., : k.shape[2]] if self.score == "location" else q @ k.transpose(-1, -2)

    def _aim(self, h: Tensor) -> Tensor | None:
        """p_t / S of local-p, (batch, heads, n, 1)."""
        return ((h @ self.w_p).tanh() @ self.v_p).sigmoid() if self.window == "local-p" else None

    def _rows(self, q, k, aim, mask, causal, offset) -> Tensor:
        """The attention matrix of some queries, the first of which is at ``offset``."""
        keep, scores = dense.visible(q, k, mask, causal, offset), self._scores(q, k)
        if aim is None:
            return dense.softmax(scores, keep)
        # In at least float32: half precision cannot tell far positions apart.
        dtype = torch.promote_types(aim.dtype, torch.float32)
        s = torch.arange(k.shape[2], device=k.device, dtype=dtype)
        length = k.shape[2] if keep is None else ((s + 1) * keep).amax(-1, keepdim=True)
        distance = s - length * aim.to(dtype)
        near = distance.abs() <= self.radius
        gauss = (-(distance**2) / (2 * (self.radius / 2) ** 2)).exp()
        return dense.softmax(scores, near if keep is None else near & keep) * gauss.to(scores.dtype)

    def _prepared(self, x: Tensor, context: Tensor, mask: masks.Mask | None):
        if self.max_length is not None:
            expect(context.shape[1] <= self.max_length, "context", context.shape[1], f"<= {self.max_length} tokens")
        h, z = self._split(x), self._split(context)
        if self.window == "local-m":
            mask = masks.join(mask, masks.window(self.radius))
        return *self._scored(h, z), z, self._aim(h), mask

    def _attend(self, x: Tensor, context: Tensor, mask: masks.Mask | None, causal: bool, offset: int = 0) -> Tensor:
        q, k, z, aim, mask = self._prepared(x, context, mask)
        n, m = q.shape[2], k.shape[2]
        if self.score in ("dot", "general") and aim is None:
            if not offset and sparse.pays(mask, causal, n, m):
                c = sparse.attend(q, k, z, mask=mask, causal=causal, scale=1.0)
            else:
                c = dense.attend(q, k, z, mask=mask, causal=causal, scale=1.0, offset=offset)
            return self._join(c, x)

        def part(start: int, stop: int) -> Tensor:
            where = None if aim is None else aim[:, :, start:stop]
            return self._rows(q[:, :, start:stop], k, where, mask, causal, offset + start) @ z

        width = q.shape[3] if self.score == "concat" else 1
        return self._join(dense.by_rows(part, n, x.shape[0] * self.heads * m * width), x)

    def _join(self, c: Tensor, x: Tensor) -> Tensor:
        return self.w_c(torch.cat([c.transpose(1, 2).flatten(2), x], -1)).tanh()

    def _forward(self, x, context, how):
        return self._attend(x, context, how.mask, how.triangular)

    def _weights(self, x, context, how):
        q, k, _, aim, mask = self._prepared(x, context, how.mask)
        return self._rows(q, k, aim, mask, how.triangular, 0)

    def _read(self, weights, x, context, how):
        return self._join(weights @ self._split(context), x)

    def _step(self, x: Tensor, cache: LuongCache | None, context: Tensor | None, how: How):
        if cache is None:
            states = (x if context is None else context).unsqueeze(1)
            # Raw states are keys and values in one.
            cache = LuongCache(KVCache.start(states, states[..., :0]), 0, how.mask, how.cross)
        elif not cache.cross:
            states = x.unsqueeze(1)
            cache = LuongCache(cache.states.append(states, states[..., :0]), cache.length, None, False)
        y = self._attend(x, cache.states.keys.squeeze(1), cache.mask, not cache.cross, cache.length)
        return y, LuongCache(cache.states, cache.length + x.shape[1], cache.mask, cache.cross)


def _matrix(heads: int, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(heads, rows, columns).uniform_(-1, 1) * rows**-0.5)
