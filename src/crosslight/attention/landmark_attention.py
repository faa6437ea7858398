"""Landmark attention: a token at the end of each block stands for it, and attention to it opens the block.

Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", 2023,
arXiv 2305.16300.

The stream holds a landmark after every l tokens: blocks of l + 1. With scores s_ij = q_i . k_j / sqrt(d), for query i

    p0    = softmax over the tokens of i's own block and the landmarks L_b of the earlier blocks     the group G_0
    p_b   = softmax over the tokens of block b                                                      a group a block
    A_ij  = p0_j  in the own block,    p0_{L_b} p_b,j  in an earlier block b,    0  for landmarks
    y_i   = sum_j A_ij v_j                                                                     (batch, heads, n, d)

Rows sum to 1: a landmark's share is handed on to its block. Attention is thereby its own retrieval: with ``top_k`` a
query scores all landmarks, and reads only the k blocks whose landmarks are best, from n^2 to n^2 / l + n k l pairs.
Trained without it, used with it (2 to 5 blocks of l = 50 in the paper).

`insert` puts landmarks into a stream and `remove` takes them out again; the landmark is a token of the model, with an
embedding of its own. In an unfinished block at the end of the keys, tokens have no landmark and belong to G_0. So do
they in cross-attention, where no block is the query's own. Without a causal mask, all other blocks have groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, routed, sparse
from crosslight.engines.backend import forced
from crosslight.engines.cache import KVCache
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CARD = Card(
    id="landmark-attention",
    kind="token",
    group="sparse",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    year=2023,
    paper="2305.16300",
    code="epfml/landmark-attention",
    summary="A landmark token after each block gates it: its softmax share goes to the block's tokens.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"block": 3},
    checked="the grouped softmax written out group by group, with gradients; softmax attention where each landmark's "
    "score is the log-sum-exp of its block's; retrieval of all blocks equal to none",
    differs="The paper is causal only. Its retrieved blocks are given the positions just before the local window; here "
    "keys keep their own, so that more context than in training needs positions that allow it. No query reads the "
    "landmark of its own block. Retrieval is a query's and a head's own, as in the paper's first variant. In the "
    "evidence every 16th byte is taken as a landmark, without an embedding of its own.",
    evidence=Evidence(
        claim="Reading the two best of the earlier blocks costs a byte language model at most 0.05 bits a byte",
        task="language",
        metric="bits_per_byte",
        margin=-0.05,
        options={"block": 15, "top_k": 2},
    ),
)


def insert(
    x: Float[Tensor, "batch n dim"], landmark: Float[Tensor, " dim"], block: int
) -> Float[Tensor, "batch n_and_landmarks dim"]:
    """x with a landmark after each ``block`` tokens; none after an unfinished block."""
    batch, n, dim = x.shape
    padded = F.pad(x, (0, 0, 0, -n % block)).unflatten(1, (-1, block))
    marks = landmark.to(x.dtype).expand(batch, padded.shape[1], 1, dim)
    return torch.cat([padded, marks], 2).flatten(1, 2)[:, : n + n // block]


def remove(y: Float[Tensor, "batch n dim"], block: int) -> Float[Tensor, "batch n_without_landmarks dim"]:
    """y without the landmarks that `insert` put in."""
    index = torch.arange(y.shape[1] - y.shape[1] // (block + 1), device=y.device)
    return y.index_select(1, index + index // block)


def grouped_softmax(
    scores: Float[Tensor, "*rows blocks size"],
    visible: Bool[Tensor, "*rows blocks size"],
    direct: Bool[Tensor, "*rows blocks"],
) -> Float[Tensor, "*rows blocks size"]:
    """A of scores in blocks, the landmark last in each.

    Args:
        visible: which tokens and landmarks may be read at all.
        direct: blocks whose tokens are in G_0 themselves, and whose landmark is not.
    """
    # The tokens of G_0 in a block have together the share exp(L) of its log-sum-exp L, so one softmax inside of blocks
    # and one over blocks are enough.
    tokens = visible[..., :-1]
    inner = dense.softmax(scores[..., :-1], tokens)
    direct = direct.expand(inner.shape[:-1])
    total = scores[..., :-1].masked_fill(~tokens, torch.finfo(scores.dtype).min).logsumexp(-1)
    opened = tokens.any(-1) & (direct | visible[..., -1])
    shares = dense.softmax(torch.where(direct, total, scores[..., -1]), opened)
    return F.pad(inner * shares[..., None], (0, 1))


@register(CARD)
class LandmarkAttention(Core):
    """Grouped softmax; q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        block: l, tokens a landmark stands for: keys l, 2 l + 1, ... are landmarks.
        top_k: blocks that a query retrieves; all of them if None.
    """

    grouped = True

    def __init__(self, heads: int, head_dim: int, block: int = 50, top_k: int | None = None) -> None:
        super().__init__(heads, head_dim)
        expect(isinstance(block, int) and block >= 1, "block", block, "a number >= 1")
        expect(top_k is None or top_k >= 1, "top_k", top_k, "a number >= 1, or None")
        self.block, self.size, self.top_k = block, block + 1, top_k

    def _seen(
        self, i: Int[Tensor, " rows"], block: Int[Tensor, "#batch #heads #rows slots"], keep, m: int, causal: bool
    ) -> Bool[Tensor, "#batch #heads rows slots size"]:
        """Which keys of the given blocks (-1 for none) the queries at i may read."""
        j = block[..., None] * self.size + torch.arange(self.size, device=i.device)
        seen = (j >= 0) & (j < m)
        if causal:
            seen = seen & (j <= i[:, None, None])
        if keep is not None:
            b = torch.arange(keep.shape[0], device=i.device).view(-1, 1, 1, 1, 1)
            seen = seen & keep[b, j.clamp(0, m - 1)]
        return seen

    def _direct(self, i: Tensor, m: int, causal: bool, cross: bool) -> list[Tensor]:
        """Blocks whose tokens are in G_0: the own one, and one without a landmark; (rows,) each, -1 for none."""
        own, last = i // self.size, torch.full_like(i, m // self.size)
        direct = [] if cross else [own]
        if m % self.size and not causal:
            direct.append(last if cross else last.masked_fill(own == last, -1))
        return direct

    @torch.no_grad()
    def _retrieved(
        self, q: Tensor, k: Tensor, i: Tensor, keep: Tensor | None, causal: bool, cross: bool
    ) -> Int[Tensor, "batch heads rows chosen"] | None:
        """The blocks whose landmarks fit best, -1 for none; None if there is no choice to make."""
        whole = k.shape[2] // self.size
        if self.top_k is None or self.top_k >= whole:
            return None
        block = torch.arange(whole, device=q.device)
        fits = torch.ones(len(i), whole, dtype=torch.bool, device=q.device)
        if not cross:
            own = i[:, None] // self.size
            fits = block < own if causal else block != own
        if keep is not None:
            held = keep[:, : whole * self.size].unflatten(1, (whole, self.size))
            fits = fits & (held[..., -1] & held[..., :-1].any(-1))[:, None, None]
        landmarks = dense.repeat_heads(k[:, :, self.block :: self.size], q.shape[1])
        scores = (q @ landmarks.transpose(-1, -2)).masked_fill(~fits, -math.inf)
        best = scores.topk(self.top_k, -1)
        return best.indices.masked_fill(best.values == -math.inf, -1)

    def _dense(self, q: Tensor, k: Tensor, keep: Tensor | None, causal: bool, cross: bool, start: int) -> Tensor:
        """A of queries from position ``start`` on, (batch, heads, rows, m)."""
        m, blocks = k.shape[2], math.ceil(k.shape[2] / self.size)
        i = torch.arange(start, start + q.shape[2], device=q.device)
        block = torch.arange(blocks, device=q.device)
        direct = torch.zeros(len(i), blocks, dtype=torch.bool, device=q.device)
        for at in self._direct(i, m, causal, cross):
            direct = direct | (block == at[:, None])
        seen = self._seen(i, block.view(1, 1, 1, -1), keep, m, causal)
        chosen = self._retrieved(q, k, i, keep, causal, cross)
        if chosen is not None:
            read = torch.zeros(*q.shape[:3], blocks + 1, dtype=torch.bool, device=q.device)
            read = read.scatter(-1, chosen.masked_fill(chosen < 0, blocks), True)[..., :blocks]
            seen = seen & (read | direct)[..., None]
        short = blocks * self.size - m
        scores = F.pad(dense.scores(q, k), (0, short)).unflatten(-1, (blocks, self.size))
        return grouped_softmax(scores, seen, direct).flatten(-2)[..., :m]

    def _routed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool, cross: bool) -> Tensor:
        """The same, times the values, from the chosen blocks alone: a query asks each block that it retrieves on its
        own, as if it were several, and their answers are weighed with that of G_0's tokens."""
        n, m, size = q.shape[2], k.shape[2], self.size
        whole, scale = m // size, 1 / math.sqrt(q.shape[3])
        rows = max(1, dense.CHUNK // (q.shape[0] * q.shape[1] * whole))
        parts = []
        for piece, i in zip(q.split(rows, 2), torch.arange(n, device=q.device).split(rows), strict=True):
            best = self._retrieved(piece, k, i, keep, causal, cross)
            assert best is not None
            parts.append(best)
        chosen = torch.cat(parts, 2)
        tokens = (torch.arange(m, device=q.device) % size != self.block).expand(q.shape[0], -1)
        readable = masks.Keys(tokens if keep is None else tokens & keep)
        asking = q.repeat_interleave(self.top_k or 1, 2)
        inner, _ = routed.attend(asking, k, v, chosen.flatten(2)[..., None], size, mask=readable)
        landmarks = dense.repeat_heads(k[:, :, self.block :: size], q.shape[1])
        at = chosen.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, q.shape[3])
        shares = ((asking * scale) * landmarks.gather(2, at)).sum(-1).unflatten(2, (n, -1))
        opened, inner = chosen >= 0, inner.unflatten(2, (n, -1))
        rule = None if cross else masks.same_block(size)
        if m % size and not causal:
            tail = ~masks.sink(whole * size)
            rule = tail if rule is None else rule | tail
        if rule is not None:
            y, lse = sparse.attend_with_lse(q, k, v, mask=rule & readable, causal=causal)
            inner = torch.cat([y[:, :, :, None], inner], 3)
            some = lse > -math.inf
            shares = torch.cat([torch.where(some, lse, 0.0)[..., None].to(shares.dtype), shares], -1)
            opened = torch.cat([some[..., None], opened], -1)
        return (dense.softmax(shares, opened)[..., None] * inner).sum(3)

    def _gathered(
        self, q: Tensor, tables: list[Tensor], chosen: Tensor, keep, m: int, causal: bool, cross: bool, start: int
    ) -> Tensor:
        """As `_routed`, for few queries. The tables are keys and values in blocks."""
        batch, heads, rows = q.shape[:3]
        i = torch.arange(start, start + rows, device=q.device)
        near = [at.view(-1, 1).expand(batch, heads, -1, -1) for at in self._direct(i, m, causal, cross)]
        block = torch.cat([*near, chosen], -1)
        direct = (torch.arange(block.shape[-1], device=q.device) < len(near)).expand(block.shape)
        kv_heads, blocks = tables[0].shape[1:3]
        head = torch.arange(heads, device=q.device) // (heads // kv_heads)
        first = (torch.arange(batch, device=q.device)[:, None] * kv_heads + head) * blocks
        index = (first[..., None, None] + block.clamp(min=0)).flatten()
        k, v = (t.flatten(0, 2).index_select(0, index).view(*block.shape, *t.shape[3:]) for t in tables)
        scores = torch.einsum("bhrd,bhrsld->bhrsl", q / math.sqrt(q.shape[-1]), k)
        weights = grouped_softmax(scores, self._seen(i, block, keep, m, causal), direct)
        return torch.einsum("bhrsl,bhrsld->bhrd", weights, v)

    def extra(self, how):
        return {"cross": how.cross}  # queries of another stream have no block of their own

    def forward(self, q, k, v, *, mask=None, causal=False, cross=False, offset=0):
        keep, m, size = masks.split(mask)[1], k.shape[2], self.size
        heads = q.shape[0] * q.shape[1]
        if forced() == "reference" or self.top_k is None or self.top_k >= m // size:

            def part(start: int, stop: int) -> Tensor:
                end = min(m, offset + stop) if causal else m
                kept = None if keep is None else keep[:, :end]
                weights = self._dense(q[:, :, start:stop], k[:, :, :end], kept, causal, cross, offset + start)
                return weights @ dense.repeat_heads(v[:, :, :end], q.shape[1])

            return dense.by_rows(part, q.shape[2], heads * m)
        if offset == 0 and q.shape[2] > 1:
            return self._routed(q, k, v, keep, causal, cross)
        tables = [F.pad(t, (0, 0, 0, -m % size)).unflatten(2, (-1, size)) for t in (k, v)]
        i = torch.arange(offset, offset + q.shape[2], device=q.device)

        def few(start: int, stop: int) -> Tensor:
            chosen = self._retrieved(q[:, :, start:stop], k, i[start:stop], keep, causal, cross)
            assert chosen is not None
            return self._gathered(q[:, :, start:stop], tables, chosen, keep, m, causal, cross, offset + start)

        return dense.by_rows(few, q.shape[2], heads * max(m // size, (self.top_k + 2) * size * q.shape[3]))

    def weights(self, q, k, *, mask=None, causal=False, cross=False, offset=0):
        return self._dense(q, k, masks.split(mask)[1], causal, cross, offset)

    def step(self, q, k, v, state=None, **extra):
        state = KVCache.start(k, v) if state is None else state.append(k, v)
        offset = state.length - q.shape[2]
        return self(q, state.keys, state.values, causal=True, offset=offset), state
