"""Softmax attention under a rule: what mechanisms share that are a mask."""

from __future__ import annotations

from crosslight.attention.softmax import Softmax
from crosslight.engines import masks
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask


class Ruled(Softmax):
    """Softmax attention under a mask of the mechanism's own, which asks where queries stand.

    Args:
        rule: what a query may read, besides what a call forbids.
    """

    def __init__(self, heads: int, head_dim: int, rule: Mask) -> None:
        super().__init__(heads, head_dim)
        self.rule = rule

    def forward(self, q, k, v, *, mask=None, causal=False, bias=None, offset=0):
        return super().forward(q, k, v, mask=masks.join(self.rule, mask), causal=causal, bias=bias, offset=offset)

    def weights(self, q, k, *, mask=None, causal=False, bias=None, offset=0):
        return super().weights(q, k, mask=masks.join(self.rule, mask), causal=causal, bias=bias, offset=offset)

    def step(self, q, k, v, state, *, causal=True, **extra):
        state = KVCache.start(k, v) if state is None else state.append(k, v)
        extra["offset"] = state.length - q.shape[2]
        return self(q, state.keys, state.values, causal=causal, **extra), state
