"""Combiner: full attention at sparse cost, some tokens read directly and all others through summaries of blocks.

Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai, "Combiner: Full Attention Transformer with Sparse Computation Cost",
2021, arXiv 2107.05768.

    p(j|i) = [j direct] p~(j|i) + sum_r [j in block r] p~(r|i) p(j|r)
    p~(.|i) = softmax over the direct keys and the summaries: exp(q_i . k_j / sqrt(d)), exp(q_i . k_r / sqrt(d))
    k_r = max of the keys of r,   q_r = max of its queries,   p(j|r) = softmax_{j in r}(q_r . k_j / sqrt(d))
    y_i = sum_j p(j|i) v_j = sum_direct p~(j|i) v_j + sum_r p~(r|i) v_r,       v_r = sum_{j in r} p(j|r) v_j

Each v_r is made once and serves all queries. Three ways to cut the sequence (``instance``):

    fixed       blocks of B tokens; direct: the own block; summaries: the other blocks            n (B + n/B)
    logsparse   direct: i; a summary of 2^l tokens for each level l, the sibling of the own block in a binary tree
                                                                                                 n log n
    axial       rows of B tokens; direct: the own row; of each other row the summary that its token in the own
                column c made: k_r = k_c, q_r = q_c                                               n (B + n/B)

Causal: direct keys and blocks before i only, so that in the tree only left siblings are read. q, k and v are
(batch, heads, n, d). Every token that i may read has a positive weight.
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
from crosslight.engines import dense, masks, sparse
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads n dim"]
    Blocks = Float[Tensor, "batch heads blocks size dim"]

CARD = Card(
    id="combiner",
    kind="token",
    group="sparse",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    year=2021,
    paper="2107.05768",
    code="google-research/google-research",
    summary="Reads near tokens directly and all others through block summaries that are conditional expectations.",
    patterns=("noncausal-self", "causal-self"),
    why_not="A block is summarised by the queries of its own tokens, which a context has not.",
    cost="n sqrt n",
    mask="keys",
    decode="kv",
    small={"block_size": 16},
    checked="the factors written out token by token for all three instances; exact softmax with one block",
    differs="Noncausal forms read the blocks on both sides. The axial instance is the row-major one; its summaries "
    "have the key of their token, where the released code projects a new one from the summary. The mixture of "
    "instances is not built. Masked tokens are left out of the summaries; in the axial instance a column that a row "
    "lacks summarises the row evenly. The cost holds for blocks that grow with sqrt(n).",
    evidence=Evidence(
        claim="Recall at any distance: beats a window that reads as many keys",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.1,
        baseline="fused-neighborhood-attention",
        task_options={"length": 32, "pairs": 4, "power": 1.0},
        options={"instance": "logsparse"},
        baseline_options={"kernel_size": 6},
    ),
)


@dataclass(frozen=True)
class Elsewhere(Mask):
    """Query i reads summary j of another block than its own i // size; with ``past`` of an earlier one."""

    size: int
    past: bool
    shared = True

    def visible(self, b, h, i, j):
        return j < i // self.size if self.past else j != i // self.size

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        first, last = i0 // self.size, i1 // self.size
        if self.past:
            return j0 < last, j1 < first
        return (first != last) | (j0 != first) | (j1 != first), (j1 < first) | (j0 > last)


@dataclass
class Row:
    """What decoding carries of blocks or rows: the tokens of the last one, and the summaries of those before."""

    q: Heads
    k: Heads
    v: Heads
    summary_k: Blocks
    summary_v: Blocks


@dataclass
class Tree:
    """What decoding carries of the tree: all tokens (queries beside keys), and for each level the last left block."""

    cache: KVCache
    levels: dict[int, tuple[Heads, Heads]]


@register(CARD)
class Combiner(Core):
    """Attention factored over blocks.

    Args:
        instance: "fixed", "logsparse" or "axial".
        block_size: B; without meaning for logsparse.
        pool: how a block's queries and keys are summarised, "max" or "mean".
    """

    def __init__(
        self, heads: int, head_dim: int, instance: str = "fixed", block_size: int = 64, pool: str = "max"
    ) -> None:
        super().__init__(heads, head_dim)
        known = ("fixed", "logsparse", "axial")
        expect(instance in known, "instance", repr(instance), f"one of {', '.join(known)}")
        expect(isinstance(block_size, int) and block_size >= 1, "block_size", block_size, "a number >= 1")
        expect(pool in ("max", "mean"), "pool", repr(pool), "'max' or 'mean'")
        self.instance, self.block_size, self.pool = instance, block_size, pool
        self.scale = 1 / math.sqrt(head_dim)

    # Summaries ------------------------------------------------------------------------------------------------------
    def _pooled(self, t: Blocks, keep: Bool[Tensor, "batch 1 blocks size"]) -> Float[Tensor, "batch heads blocks dim"]:
        some = keep.any(-1).unsqueeze(-1)
        if self.pool == "mean":
            return (t * keep.unsqueeze(-1).to(t.dtype)).sum(3) / keep.sum(-1).clamp(min=1).unsqueeze(-1).to(t.dtype)
        return t.masked_fill(~keep.unsqueeze(-1), -math.inf).amax(3).masked_fill(~some, 0.0)

    def _inside(self, q: Blocks, k: Blocks, keep: Tensor) -> Float[Tensor, "batch heads blocks summaries size"]:
        """p(j|r) of the queries that summarise a block."""
        return dense.softmax((q * self.scale) @ k.transpose(-1, -2), keep.unsqueeze(-2))

    def _summarised(self, q: Blocks, k: Blocks, keep: Tensor) -> tuple[Blocks, Tensor]:
        """The keys of the summaries of each block, (batch, heads, blocks, summaries, dim), and p(j|r)."""
        if self.instance == "axial":
            there = keep.unsqueeze(-1).to(k.dtype)
            q, k = q * there, k * there
            return k, self._inside(q, k, keep)
        return self._pooled(k, keep).unsqueeze(3), self._inside(self._pooled(q, keep).unsqueeze(3), k, keep)

    @staticmethod
    def _cut(t: Tensor, size: int) -> Blocks:
        return F.pad(t, (0, 0, 0, -t.shape[2] % size)).unflatten(2, (-1, size))

    @staticmethod
    def _keep(k: Heads, mask: Mask | None, size: int) -> Bool[Tensor, "#batch 1 blocks size"]:
        keep = masks.split(mask)[1]
        keep = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if keep is None else keep
        return F.pad(keep, (0, -k.shape[2] % size)).unflatten(1, (-1, size)).unsqueeze(1)

    def _parts(
        self, q: Heads, k: Heads, mask: Mask | None
    ) -> tuple[Blocks, Float[Tensor, "batch heads blocks summaries size"], Bool[Tensor, "#batch 1 blocks size"]]:
        keep = self._keep(k, mask, self.block_size)
        return *self._summarised(self._cut(q, self.block_size), self._cut(k, self.block_size), keep), keep

    # Blocks and rows ------------------------------------------------------------------------------------------------
    def forward(self, q, k, v, *, mask=None, causal=False):
        if self.instance == "logsparse":
            return self._tree(q, k, v, mask, causal)
        size, n = self.block_size, q.shape[2]
        own = masks.join(masks.same_block(size), mask)
        near = sparse.attend_with_lse(q, k, v, mask=own, causal=causal)
        if n <= size:
            return near[0]
        summary_k, inside, keep = self._parts(q, k, mask)
        summary_v, held = inside @ self._cut(v, size), keep.any(-1).squeeze(1).expand(q.shape[0], -1)
        if self.instance == "fixed":
            rule = Elsewhere(size, causal) & masks.keys(held)
            far = sparse.attend_with_lse(q, summary_k.squeeze(3), summary_v.squeeze(3), mask=rule)
        else:  # each column by itself
            columns = (t.permute(0, 3, 1, 2, 4).flatten(0, 1) for t in (self._cut(q, size), summary_k, summary_v))
            rule = Elsewhere(1, causal) & masks.keys(held.repeat_interleave(size, 0))
            out, lse = sparse.attend_with_lse(*columns, mask=rule)
            out = out.unflatten(0, (-1, size)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, :n]
            far = out, lse.unflatten(0, (-1, size)).permute(0, 2, 3, 1).flatten(2)[:, :, :n]
        return sparse.merge([near, far])[0]

    def weights(self, q, k, *, mask=None, causal=False):
        if self.instance == "logsparse":
            return self._tree_weights(q, k, mask, causal)
        size, n = self.block_size, q.shape[2]
        summary_k, inside, keep = self._parts(q, k, mask)
        own = masks.join(masks.same_block(size), mask)
        near, seen = dense.scores(q, k), dense.visible(q, k, own, causal)
        assert seen is not None
        column = torch.arange(n, device=q.device) % size
        if self.instance == "fixed":
            far, inside = dense.scores(q, summary_k.squeeze(3)), inside[:, :, None, :, 0]
        else:
            far = ((q * self.scale).unsqueeze(3) * summary_k[:, :, :, column].transpose(2, 3)).sum(-1)
            inside = inside[:, :, :, column].transpose(2, 3)
        block = torch.arange(far.shape[-1], device=q.device)
        held = Elsewhere(size, causal).visible(block, block, torch.arange(n, device=q.device)[:, None], block)
        held = held & keep.any(-1).unsqueeze(2)
        shape = torch.broadcast_shapes(seen.shape[:2], held.shape[:2])
        joint = torch.cat([seen.expand(*shape, -1, -1), held.expand(*shape, -1, -1)], -1)
        direct, summed = dense.softmax(torch.cat([near, far], -1), joint).split([n, far.shape[-1]], -1)
        return direct + (summed.unsqueeze(-1) * inside).flatten(3)[..., :n]

    # The tree -------------------------------------------------------------------------------------------------------
    def _levels(self, q: Heads, k: Heads, keep: Tensor, causal: bool):
        """For each level the blocks' p(j|r), the logit of every token for the sibling of its block, and whether it may
        be read. The length is a power of two."""
        n = k.shape[2]
        for level in range((n - 1).bit_length()):
            size = 1 << level
            kept = keep.unflatten(2, (-1, size))
            blocks_q, blocks_k = (t.unflatten(2, (-1, size)) for t in (q, k))
            inside = self._inside(self._pooled(blocks_q, kept).unsqueeze(3), blocks_k, kept)
            sibling = _swapped(self._pooled(blocks_k, kept))
            logit = ((blocks_q * self.scale) @ sibling.unsqueeze(-1)).squeeze(-1).flatten(2)
            seen = _swapped(kept.any(-1)).unsqueeze(-1)
            if causal:
                seen = seen & (torch.arange(n // size, device=k.device) % 2 == 1).unsqueeze(-1)
            yield inside, logit, seen.expand(-1, -1, -1, size).flatten(2)

    def _factors(self, q: Heads, k: Heads, mask: Mask | None, causal: bool):
        """p(j|r) of the blocks of all levels, and p~: of each token for itself and for each level's sibling."""
        n = q.shape[2]
        keep = self._keep(k, mask, 1 << (n - 1).bit_length()).flatten(2)
        q, k = (F.pad(t, (0, 0, 0, keep.shape[2] - n)) for t in (q, k))
        insides, logits, seen = [], [(q * self.scale * k).sum(-1)], [keep]
        for inside, logit, visible in self._levels(q, k, keep, causal):
            insides.append(inside.squeeze(3))
            logits.append(logit)
            seen.append(visible)
        return insides, dense.softmax(torch.stack(logits, -1), torch.stack(seen, -1))

    def _tree(self, q: Heads, k: Heads, v: Heads, mask: Mask | None, causal: bool) -> Heads:
        n = q.shape[2]
        insides, shares = self._factors(q, k, mask, causal)
        v = F.pad(v, (0, 0, 0, shares.shape[2] - n))
        y = shares[..., :1] * v
        for level, inside in enumerate(insides):
            summary = _swapped((inside.unsqueeze(-2) @ v.unflatten(2, (-1, 1 << level))).squeeze(-2))
            share = shares[..., level + 1, None].unflatten(2, (-1, 1 << level))
            y = y + (share * summary.unsqueeze(3)).flatten(2, 3)
        return y[:, :, :n]

    def _tree_weights(self, q: Heads, k: Heads, mask: Mask | None, causal: bool) -> Tensor:
        n = q.shape[2]
        insides, shares = self._factors(q, k, mask, causal)
        place = torch.arange(shares.shape[2], device=q.device)
        full = torch.diag_embed(shares[..., 0])
        for level, inside in enumerate(insides):
            sibling = (place[:, None] >> level) ^ 1 == place >> level
            full = full + shares[..., level + 1, None] * sibling.to(q.dtype) * inside.flatten(2).unsqueeze(2)
        return full[:, :, :n, :n]

    # Decoding -------------------------------------------------------------------------------------------------------
    def step(self, q, k, v, state=None, **extra):
        expect(q.shape[2] == 1, "x", f"{q.shape[2]} tokens", "one token at a time")
        return self._step_tree(q, k, v, state) if self.instance == "logsparse" else self._step_row(q, k, v, state)

    def _step_row(self, q: Heads, k: Heads, v: Heads, state: Row | None) -> tuple[Heads, Row]:
        if state is None:
            none = k.unsqueeze(2)[:, :, :0]
            none = none.expand(-1, -1, -1, self.block_size if self.instance == "axial" else 1, -1)
            state = Row(q, k, v, none, none)
        else:
            q_row, k_row, v_row = (torch.cat(t, 2) for t in ((state.q, q), (state.k, k), (state.v, v)))
            state = Row(q_row, k_row, v_row, state.summary_k, state.summary_v)
        column = state.k.shape[2] - 1 if self.instance == "axial" else 0
        keys = torch.cat([state.k, state.summary_k[:, :, :, column]], 2)
        y = dense.attend(q, keys, torch.cat([state.v, state.summary_v[:, :, :, column]], 2))
        if state.k.shape[2] == self.block_size:
            every = torch.ones(1, 1, 1, self.block_size, dtype=torch.bool, device=k.device)
            summary_k, inside = self._summarised(state.q.unsqueeze(2), state.k.unsqueeze(2), every)
            summaries = torch.cat([state.summary_k, summary_k], 2)
            values = torch.cat([state.summary_v, inside @ state.v.unsqueeze(2)], 2)
            state = Row(state.q[:, :, :0], state.k[:, :, :0], state.v[:, :, :0], summaries, values)
        return y, state

    def _step_tree(self, q: Heads, k: Heads, v: Heads, state: Tree | None) -> tuple[Heads, Tree]:
        both = torch.cat([k, q], -1)
        cache = KVCache.start(both, v) if state is None else state.cache.append(both, v)
        levels = {} if state is None else state.levels
        place = cache.length - 1
        read = [levels[level] for level in range(place.bit_length()) if place >> level & 1]
        y = dense.attend(q, torch.cat([k, *(a for a, _ in read)], 2), torch.cat([v, *(b for _, b in read)], 2))
        # The token ends one block that is a left sibling, of as many tokens as divide the length.
        size = cache.length & -cache.length
        block_k, block_q = cache.keys[:, :, None, -size:].chunk(2, -1)
        every = torch.ones(1, 1, 1, size, dtype=torch.bool, device=k.device)
        summary_k, inside = self._summarised(block_q, block_k, every)
        summary = summary_k.squeeze(3), (inside @ cache.values[:, :, None, -size:]).squeeze(3)
        return y, Tree(cache, {**levels, size.bit_length() - 1: summary})


def _swapped(t: Tensor) -> Tensor:
    """Each block's sibling in its place, along axis 2."""
    return t.unflatten(2, (-1, 2)).flip(3).flatten(2, 3)
