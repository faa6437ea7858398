"""Mean pooling: every query gets the plain mean of the values that it may read. The baseline that is not attention.

Iyyer et al., "Deep Unordered Composition Rivals Syntactic Methods for Text Classification", 2015, ACL P15-1162
(deep averaging networks).

    A_ij = 1 / |V_i|   for j in V_i, the keys that query i may read          (batch, heads, n, m)
    y_i = W_o mean_{j in V_i} W_v z_j                                         (batch, n, dim)

It is multi-head attention whose scores are all zero, without the parameters that would make them. What a mechanism
gains over it, it gains by choosing what to read. In causal self-attention it is the running mean, whose sum and count
are all that decoding carries. The heads only matter to masks that differ from head to head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crosslight.attention.base import Mechanism
from crosslight.cards import Card
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

CARD = Card(
    id="mean-pooling",
    kind="token",
    group="baseline",
    title="Mean pooling (deep averaging network)",
    year=2015,
    paper="https://aclanthology.org/P15-1162",
    summary="Not attention: the plain mean of all values that a query may read, with no queries and no keys.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    decode="state",
    checked="softmax attention whose query projection is zero, with the same value and output weights",
)


@dataclass
class MeanCache:
    """Sum of the values read so far and their number."""

    total: Tensor
    count: Tensor
    cross: bool


@register(CARD)
class MeanPooling(Mechanism):
    """out(mean over visible keys of W_v z).

    Args:
        dim: width of x and of the output.
        heads: heads of the mask.
        context_dim: width of the context, dim unless given.
        bias: whether the two projections have biases.
    """

    def __init__(self, dim: int, heads: int = 1, *, context_dim: int | None = None, bias: bool = True) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        self.heads = heads
        self.v = nn.Linear(self.context_dim, dim, bias)
        self.out = nn.Linear(dim, dim, bias)

    def _values(self, context: Tensor) -> Tensor:
        return self.v(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _merge(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))

    def _forward(self, x, context, how):
        causal, keep, rest = masks.split(how.mask)
        causal = causal or how.triangular
        n, m = x.shape[1], context.shape[1]
        if rest is not None or (causal and n != m):
            return self._read(self._weights(x, context, how), x, context, how)
        v, count = _kept(self._values(context), keep)
        total, count = (
            (v.cumsum(2), count.cumsum(2)) if causal else (v.sum(2, keepdim=True), count.sum(2, keepdim=True))
        )
        return self._merge(_mean(total, count).expand(-1, -1, n, -1))

    def _weights(self, x, context, how):
        q = x.new_zeros(x.shape[0], self.heads, x.shape[1], 1)
        k = x.new_zeros(x.shape[0], self.heads, context.shape[1], 1)
        return dense.weights(q, k, mask=how.mask, causal=how.triangular)

    def _read(self, weights, x, context, how):
        return self._merge(weights @ self._values(context))

    def _step(self, x, cache, context, how):
        if how.cross:
            if cache is None:
                v, count = _kept(self._values(context), masks.split(how.mask)[1])
                cache = MeanCache(v.sum(2, keepdim=True), count.sum(2, keepdim=True), True)
            return self._merge(_mean(cache.total, cache.count).expand(-1, -1, x.shape[1], -1)), cache
        v, count = _kept(self._values(x), None)
        total, count = v.cumsum(2), count.cumsum(2)
        if cache is not None:
            total, count = cache.total + total, cache.count + count
        return self._merge(_mean(total, count)), MeanCache(total[:, :, -1:], count[:, :, -1:], False)


def _kept(v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values with zeros where ``keep`` is False, and 1 for each value that stays."""
    if keep is None:
        return v, torch.ones(1, 1, v.shape[2], 1, dtype=torch.long, device=v.device)
    keep = keep[:, None, :, None]
    return v.masked_fill(~keep, 0.0), keep.long()


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp(min=1).to(total.dtype)
