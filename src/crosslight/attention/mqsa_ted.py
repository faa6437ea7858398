"""Queries of two lengths: the current item, and the mean of the last few, each with an attention block of its own.

Zhu et al., "Collaboration and Transition: Distilling Item Transitions into Multi-Query
Self-Attention for Sequential Recommendation", 2023, arXiv 2311.01056.

    for each branch, L = 1 (short) and L > 1 (long):
        c_t = LN(mean of x_{t-L+1} .. x_t, those that are no padding)                   (batch, n, dim)
        Q = c W_q,  K = z W_k,  V = z W_v                    z = x, not normalised
        h = LN([A_1 V_1 ; ... ; A_h V_h] + c)                A = softmax(Q K^T / sqrt(d))
        y = LN(h + W_2 relu(W_1 h))
    output = alpha y_short + (1 - alpha) y_long                                         (batch, n, dim)

The layer holds its own residuals, norms and feed-forward part, as in the paper, where one such block a branch is the
model. Scores of items are inner products with their embeddings, so mixing outputs is mixing scores. L = 1 with
alpha = 1 is a SASRec block. `weights` shows the matrices of both branches, first the heads of the short one.

TED stores transitions between items in their embeddings: `transitions` counts them, and `transition_loss` is
cross-entropy(softmax(row_i / max(row_i) / tau), softmax(sqrt(dim) e_i E^T / tau)), times lambda = 0.1 in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CARD = Card(
    id="mqsa-ted",
    kind="token",
    group="heads",
    title="Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential "
    "Recommendation",
    year=2023,
    paper="2311.01056",
    code="zhuty16/MQSA-TED",
    summary="Two attention blocks, one asked by the current token and one by the mean of the last few, are mixed.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    mask="keys",
    decode="kv",
    checked="the equations written out token by token; the masked moving average",
    differs="The paper is causal self-attention. With several blocks the paper keeps the branches apart until the "
    "scores: layers with alpha=1 and with alpha=0 build them, `last=False` for all but the last. The released code "
    "divides the student's logits of TED by tau as well, and so does this.",
    evidence=Evidence(
        claim="mixing short and long queries is better than short queries alone",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
        baseline="mqsa-ted",
        baseline_options={"alpha": 1.0},
    ),
)


def moving_average(
    x: Float[Tensor, "batch n dim"], length: int, keep: Bool[Tensor, "batch n"] | None = None
) -> Float[Tensor, "batch n dim"]:
    """The mean of x_{t-length+1} .. x_t, of those that ``keep`` keeps; 0 where there is none."""
    if keep is None:
        keep = x.new_ones(1, x.shape[1], dtype=torch.bool)
    kept = keep.unsqueeze(-1).to(x.dtype)
    total, count = (
        F.pad(t, (0, 0, length - 1, 0)).unfold(1, length, 1).sum(-1) for t in (x.masked_fill(kept == 0, 0.0), kept)
    )
    return total / count.clamp(min=1)


class Branch(nn.Module):
    """An attention block whose queries are means of ``length`` tokens."""

    def __init__(self, dim: int, context_dim: int, heads: int, length: int, last: bool) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        self.norm_query, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_last = nn.LayerNorm(dim) if last else nn.Identity()
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(context_dim, dim), nn.Linear(context_dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def asks(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """c, (batch, n, dim)."""
        return self.norm_query(moving_average(x, self.length, keep))

    def ends(self, read: Tensor, c: Tensor) -> Tensor:
        """The output of the block, of what its heads have read."""
        h = self.norm(read.transpose(1, 2).flatten(2) + c)
        return self.norm_last(h + self.mlp(h))


@dataclass
class QueryCache:
    """The last tokens, of which means are taken, and keys and values of each branch."""

    recent: Float[Tensor, "batch recent dim"]
    kv: list[KVCache]
    mask: Mask | None
    cross: bool


@register(CARD)
class MultiQueryLengths(Mechanism):
    """(batch, n, dim) reads (batch, m, context_dim) -> (batch, n, dim).

    Args:
        dim, heads, context_dim: as in `AttentionLayer`; heads is that of a branch.
        length: L of the long queries.
        alpha: share of the short branch; at 0 or 1 there is one branch only.
        last: whether the branches end in a layer norm, as they do after their last block.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        length: int = 3,
        alpha: float = 0.5,
        last: bool = True,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(length >= 1, "length", length, "a number >= 1")
        expect(0 <= alpha <= 1, "alpha", alpha, "a number from 0 to 1")
        self.heads = heads
        shares = {1: alpha, length: 1 - alpha} if length > 1 else {1: 1.0}
        self.shares = [share for share in shares.values() if share]
        branches = [Branch(dim, self.context_dim, heads, size, last) for size, share in shares.items() if share]
        self.branches: Sequence[Branch] = nn.ModuleList(branches)  # type: ignore[assignment]

    def _keep(self, how) -> Tensor | None:
        """Which tokens of x are no padding."""
        return None if how.cross else masks.split(how.mask)[1]

    def _mix(self, parts: list[Tensor]) -> Tensor:
        return torch.stack([share * y for share, y in zip(self.shares, parts, strict=True)]).sum(0)

    def _heads(self, branch: Branch, x: Tensor, context: Tensor, how) -> tuple[Tensor, Tensor, Tensor]:
        """c, queries and keys of a branch."""
        c = branch.asks(x, self._keep(how))
        return c, branch.split(branch.q(c)), branch.split(branch.k(context))

    def _forward(self, x, context, how):
        parts = []
        for branch in self.branches:
            c, q, k = self._heads(branch, x, context, how)
            v = branch.split(branch.v(context))
            parts.append(branch.ends(dense.attend(q, k, v, mask=how.mask, causal=how.triangular), c))
        return self._mix(parts)

    def _weights(self, x, context, how):
        parts = []
        for branch in self.branches:
            _, q, k = self._heads(branch, x, context, how)
            parts.append(dense.weights(q, k, mask=how.mask, causal=how.triangular))
        return torch.cat(parts, 1)

    def _read(self, weights, x, context, how):
        parts = []
        for branch, matrix in zip(self.branches, weights.split(self.heads, 1), strict=True):
            read = matrix @ branch.split(branch.v(context))
            parts.append(branch.ends(read, branch.asks(x, self._keep(how))))
        return self._mix(parts)

    def _step(self, x, cache, context, how):
        recent = x if cache is None else torch.cat([cache.recent, x], 1)
        kv, parts = [], []
        for i, branch in enumerate(self.branches):
            if cache is not None and how.cross:
                held = cache.kv[i]
            else:
                source = context if how.cross else x
                k, v = branch.split(branch.k(source)), branch.split(branch.v(source))
                held = KVCache.start(k, v) if cache is None else cache.kv[i].append(k, v)
            kv.append(held)
            c = branch.asks(recent, None)[:, -x.shape[1] :]
            mask = how.mask if cache is None else cache.mask
            parts.append(branch.ends(dense.attend(branch.split(branch.q(c)), held.keys, held.values, mask=mask), c))
        longest = max(branch.length for branch in self.branches)
        recent = recent[:, max(0, recent.shape[1] - longest + 1) :]
        return self._mix(parts), QueryCache(recent, kv, how.mask if cache is None else cache.mask, how.cross)


def transitions(
    sequences: Int[Tensor, "batch n"], items: int, keep: Bool[Tensor, "batch n"] | None = None
) -> Float[Tensor, "items items"]:
    """How often an item is followed by another, over all sequences; pairs with padding do not count."""
    first, second = sequences[:, :-1], sequences[:, 1:]
    if keep is not None:
        both = keep[:, :-1] & keep[:, 1:]
        first, second = first[both], second[both]
    index = first.flatten() * items + second.flatten()
    return torch.bincount(index, minlength=items * items).view(items, items).to(torch.get_default_dtype())


def transition_loss(
    embedding: Float[Tensor, "items dim"],
    counts: Float[Tensor, "rows items"],
    tau: float = 0.1,
    rows: Int[Tensor, " rows"] | None = None,
) -> Tensor:
    """The loss of TED, mean over the items ``rows`` (all unless given), whose rows of transitions are ``counts``."""
    e = embedding if rows is None else embedding[rows]
    target = (counts / counts.amax(-1, keepdim=True).clamp(min=1e-24) / tau).softmax(-1)
    student = (math.sqrt(embedding.shape[1]) * e @ embedding.T / tau).log_softmax(-1)
    return -(target * student).sum(-1).mean()
