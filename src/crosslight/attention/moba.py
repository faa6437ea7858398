"""Mixture of block attention: every query reads the few blocks of keys whose mean it matches best, and its own block.

Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, arXiv 2502.13189.

The keys are cut into blocks of B. For query i (in block c(i) = floor(i / B)), per head:

    kbar_b = mean of the keys of block b                       the gate, without parameters
    s_b    = <q_i, kbar_b>   for b < c(i),    +inf for b = c(i),    -inf for b > c(i)
    I_i    = the keys j <= i of the top_k blocks by s          the own block counts
    y_i    = softmax(q_i K[I_i]^T / sqrt(d)) V[I_i]

q (batch, heads, n, d), k and v (batch, kv_heads, m, d). No leak: a block in the past is complete, and the own block is
not scored by its mean. Attention in the own block and in the chosen ones is computed apart, the latter with the
queries grouped by the block they chose, and merged by the log-sum-exp of each.

Beside plain multi-head attention only the set of keys changes, so that weights of one serve the other. Time is
n * top_k * B for the chosen blocks and n * m / B for the gate: n sqrt(n) with B near sqrt(n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, routed
from crosslight.engines.cache import KVCache
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CARD = Card(
    id="moba",
    kind="token",
    group="sparse",
    title="MoBA: Mixture of Block Attention for Long-Context LLMs",
    year=2025,
    paper="2502.13189",
    code="MoonshotAI/MoBA",
    summary="Each query reads its own block and the blocks of keys whose mean it matches best.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n sqrt n",
    mask="keys",
    decode="kv",
    small={"block_size": 4, "top_k": 2},
    checked="dense softmax under the matrix of chosen blocks, and causal softmax when top_k covers all blocks (1e-10)",
    differs="The paper is causal only. Without a causal mask, in self- and in cross-attention, no block is forced and "
    "the gate alone picks the top_k blocks. Means are taken over the keys that padding keeps. The cost holds "
    "for a block size that grows with sqrt(n); at a fixed one the gate is n^2 / block_size.",
    evidence=Evidence(
        claim="Key-value needle retrieval: the quarter of the keys that the gate picks beats a window of as many",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.3,
        baseline="fused-neighborhood-attention",
        task_options={"length": 32, "pairs": 4, "power": 1.0},  # needles at any distance alike
        options={"block_size": 2, "top_k": 4},
        baseline_options={"kernel_size": 8},
    ),
)

#: Gate scores that are held at a time.
CHUNK = 1 << 19


@dataclass
class Blocks:
    """What decoding carries: keys and values, and the means of the blocks that are complete."""

    cache: KVCache
    means: Float[Tensor, "batch kv_heads blocks dim"]


@register(CARD)
class MoBA(Core):
    """softmax over the keys of the own block and of the blocks that the gate picks."""

    grouped = True

    def __init__(self, heads: int, head_dim: int, block_size: int = 512, top_k: int = 3) -> None:
        super().__init__(heads, head_dim)
        expect(block_size >= 1, "block_size", block_size, "a number >= 1")
        expect(top_k >= 1, "top_k", top_k, "a number >= 1")
        self.block_size, self.top_k = block_size, top_k

    def means(self, k: Tensor, keep: Tensor | None) -> tuple[Float[Tensor, "batch kv_heads blocks dim"], Tensor]:
        """The mean key of each block, and which blocks have a key, (#batch, blocks)."""
        short = -k.shape[2] % self.block_size
        held = k.new_ones(1, k.shape[2], dtype=torch.bool) if keep is None else keep
        if keep is not None:
            k = k * keep[:, None, :, None].to(k.dtype)
        if short:
            k, held = F.pad(k, (0, 0, 0, short)), F.pad(held, (0, short))
        count = held.unflatten(1, (-1, self.block_size)).sum(2)
        sums = k.unflatten(2, (-1, self.block_size)).sum(3)
        return sums / count.clamp(min=1)[:, None, :, None].to(k.dtype), count > 0

    @torch.no_grad()
    def choose(
        self, q: Tensor, means: Tensor, held: Tensor, causal: bool, offset: int = 0
    ) -> Int[Tensor, "batch heads n choices"]:
        """The blocks that each query reads beside its own, -1 for none. ``offset`` is the first query's position."""
        n, blocks = q.shape[2], means.shape[2]
        count = min(self.top_k - 1 if causal else self.top_k, blocks)
        if count == 0:
            return torch.zeros(*q.shape[:3], 0, dtype=torch.long, device=q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        means = dense.repeat_heads(means, q.shape[1]).to(wide).transpose(-1, -2)
        rows = max(1, CHUNK // (q.shape[0] * q.shape[1] * blocks))
        parts = []
        for start in range(0, n, rows):
            piece, allowed, width = q[:, :, start : start + rows], held[:, None, None, :], blocks
            if causal:  # blocks that are complete before the own one
                i = torch.arange(offset + start, offset + start + piece.shape[2], device=q.device)
                width = min(blocks, max(count, (offset + start + piece.shape[2] - 1) // self.block_size))
                past = torch.arange(width, device=q.device) < i[:, None] // self.block_size
                allowed = allowed[..., :width] & past
            scores = (piece.to(wide) @ means[..., :width]).masked_fill(~allowed, -math.inf)
            best = scores.topk(count, -1, sorted=False)
            parts.append(best.indices.masked_fill(best.values == -math.inf, -1))
        return torch.cat(parts, 2)

    def forward(self, q, k, v, *, mask=None, causal=False):
        chosen = self.choose(q, *self.means(k, masks.split(mask)[1]), causal)
        if not causal:
            return routed.attend(q, k, v, chosen, self.block_size, mask=mask)[0]
        own = masks.join(masks.causal() & masks.same_block(self.block_size), mask)
        return routed.attend(q, k, v, chosen, self.block_size, mask=mask, always=own)[0]

    def weights(self, q, k, *, mask=None, causal=False):
        chosen = self.choose(q, *self.means(k, masks.split(mask)[1]), causal)
        return dense.weights(q, k, mask=masks.join(self._visible(chosen, k.shape[2], causal), mask))

    def _visible(self, chosen: Tensor, m: int, causal: bool, offset: int = 0) -> masks.Mask:
        keep = routed.visible(chosen, self.block_size, m)
        if causal:
            i = torch.arange(offset, offset + chosen.shape[2], device=chosen.device)[:, None]
            j = torch.arange(m, device=chosen.device)
            keep = keep | ((i // self.block_size == j // self.block_size) & (j <= i))
        return masks.Pairs(keep)

    def step(self, q, k, v, state=None, **extra):
        cache = KVCache.start(k, v) if state is None else state.cache.append(k, v)
        means = k[:, :, :0] if state is None else state.means
        keys, values, size = cache.keys, cache.values, self.block_size
        done, complete = means.shape[2], cache.length // size
        if complete > done:
            fresh, _ = self.means(keys[:, :, done * size : complete * size], None)
            means = torch.cat([means, fresh], 2)
        offset = cache.length - q.shape[2]
        held = means.new_ones(1, means.shape[2], dtype=torch.bool)
        chosen = self.choose(q, means, held, True, offset)
        state = Blocks(cache, means)
        if q.shape[2] > 1:
            visible = self._visible(chosen, cache.length, True, offset)
            return dense.attend(q, keys, values, mask=visible), state
        # One query reads its blocks and no other key.
        own = torch.arange(offset // size * size, cache.length, device=q.device)
        tokens = chosen[:, :, 0, :, None] * size + torch.arange(size, device=q.device)
        keep = F.pad((tokens >= 0).flatten(2), (0, own.shape[0]), value=True)[:, :, None]
        tokens = torch.cat([tokens.clamp(min=0).flatten(2), own.expand(*tokens.shape[:2], -1)], 2)
        group = q.shape[1] // k.shape[1]
        near = tokens.view(k.shape[0], k.shape[1], -1, 1)  # a key/value head serves its group of query heads
        keys, values = (
            t.gather(2, near.expand(-1, -1, -1, t.shape[3])).unflatten(2, (group, -1)).flatten(1, 2)
            for t in (keys, values)
        )
        return dense.attend(q, keys, values, mask=masks.Pairs(keep)), state
