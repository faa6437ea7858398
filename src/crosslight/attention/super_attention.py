"""Optimised, efficient and super attention: fewer projections, and values that are mixed along the sequence first.

Hosseini and Hosseini, "You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism", 2024,
arXiv 2403.01643.

    x_h, z_h: the h-th slices of x and z, as they are                               (batch, n, d)
    optimised   H_h = softmax(Q_h K_h^T / sqrt(d)) z_h                              W_Q, W_K, W_O
    efficient   H_h = softmax(Q_h z_h^T / sqrt(d)) z_h                              W_Q, W_O
    super       H_h = softmax(Q_h z_h^T / sqrt(d)) W_A z_h                          W_Q, W_A (l, l), W_O
    y = [H_1 ; ... ; H_heads] W_O                                                   (batch, n, dim)

Two linear maps in a row are one: W_V is taken into W_O, and W_K into W_Q. The alignment kernel W_A acts on the values
from the left: it mixes tokens where projections mix channels, so that the layer knows the order of the keys. Its size
l is the longest context (`max_length`); a shorter one of m tokens takes the upper left (m, m). Causal self-attention
takes its lower triangle. Masked keys are not mixed into the others, and a mask for each pair therefore has no meaning.

The efficient form decodes with a cache of the states alone, half of that of plain attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, How, LayerCache
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.engines.cache import KVCache
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

Variant = Literal["super", "efficient", "optimised"]

CARD = Card(
    id="super-attention",
    kind="token",
    group="scores",
    title="You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism",
    year=2024,
    paper="2403.01643",
    summary="Drops the value and key projections and mixes the values along the sequence by a learned kernel.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"max_length": 1024},
    checked="torch.nn.MultiheadAttention with identity projections; the paper's parameter counts",
    differs="The alignment kernel starts as the identity, where super attention is efficient attention. A public port "
    "takes the softmax over the queries; the paper's is over the keys.",
    evidence=Evidence(
        claim="super attention reads digits at least as well as plain attention, with fewer projections",
        task="digits",
        metric="accuracy",
        margin=0.0,
        options={"max_length": 64},
    ),
)


@register(CARD)
class SuperAttention(AttentionLayer):
    """softmax attention between raw states.

    Args:
        dim, heads, context_dim, bias: as in `AttentionLayer`; heads divides both widths.
        variant: "super", "efficient" or "optimised".
        max_length: l, the longest context, for "super".
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        context_dim: int | None = None,
        bias: bool = True,
        variant: Variant = "super",
        max_length: int = 512,
    ) -> None:
        expect(variant in get_args(Variant), "variant", repr(variant), f"one of {', '.join(get_args(Variant))}")
        width = dim if context_dim is None else context_dim
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(width % heads == 0, "heads", heads, f"a divisor of context_dim = {width}")
        expect(max_length > 0, "max_length", max_length, "a positive int")
        super().__init__(Softmax(heads, width // heads), dim, context_dim=context_dim, bias=bias)
        self.variant, self.max_length = variant, max_length
        del self.v
        if variant != "optimised":
            del self.k
        self.align = nn.Parameter(torch.eye(max_length)) if variant == "super" else None

    def _keys(self, context):
        return super()._keys(context) if self.variant == "optimised" else self._split(context, self.heads)

    def _values(self, context):
        return self._split(context, self.heads)

    def _mixed(self, v: Float[Tensor, "batch heads m dim"], how: How) -> Float[Tensor, "batch heads m dim"]:
        if self.align is None:
            return v
        m, keep = v.shape[2], masks.split(how.mask)[1]
        if keep is not None:
            v = v.masked_fill(~keep[:, None, :, None], 0)
        kernel = self._kernel(m)
        return (kernel.tril() if how.triangular else kernel) @ v

    def _kernel(self, m: int) -> Float[Tensor, "m m"]:
        assert self.align is not None
        expect(m <= self.max_length, "context", f"{m} tokens", f"at most max_length = {self.max_length}")
        return self.align[:m, :m]

    def _heads(self, x, context, how, offset=0):
        q, k, v = super()._heads(x, context, how, offset)
        return q, k, self._mixed(v, how)

    def _read(self, weights, x, context, how):
        return self._merge(self.core.read(weights, self._mixed(self._values(context), how)), x)

    def _step(self, x, cache, context, how):
        if how.cross or self.variant == "optimised":
            return super()._step(x, cache, context, how)
        length = 0 if cache is None else cache.length
        q, k = self._queries(x), self._keys(x)
        v = k[..., :0] if self.align is None else self._mixed_next(k, None if cache is None else cache.state)
        state = KVCache.start(k, v) if cache is None else cache.state.append(k, v)
        y = self.core(q, state.keys, state.keys if self.align is None else state.values)
        return self._merge(y, x), LayerCache(length + x.shape[1], state)

    def _mixed_next(self, z: Tensor, before: KVCache | None) -> Tensor:
        """The rows of W_A Z that the next states z add; the keys of the cache are the states before them."""
        length = 0 if before is None else before.length
        rows = self._kernel(length + z.shape[2]).tril()[length:]
        new = rows[:, length:] @ z
        return new if before is None else new + rows[:, :length] @ before.keys
