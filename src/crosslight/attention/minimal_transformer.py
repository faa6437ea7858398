"""Attention reduced to a minimum: one similarity matrix a head, and one value matrix or none.

Bermeitinger, Hrycej, Pavone, Kath and Handschuh, "Reducing the Transformer Architecture to a Minimum", 2024,
arXiv 2410.13732.

    A_h = softmax(x W_h z^T / sqrt(d))                             (batch, heads, n, m)

    similarity   full         W_h = W_Q,h W_K,h^T                  2 dim d numbers a head
                 collapsed    W_h any (dim, context_dim)           dim context_dim
                 symmetric    W_h = T_h + T_h^T                    T_h lower triangular: dim (dim + 1) / 2
                 positive     W_h = T_h T_h^T                      dim (dim + 1) / 2
    values       full         y = sum_h A_h z W_V,h W_O,h
                 collapsed    y = sum_h A_h z W_VO,h               W_VO,h (context_dim, dim)
                 none         y = mean_h A_h z                     no numbers: y lies in the convex hull of z

Only products of matrices count, so each pair may be one matrix. With "collapsed" or "symmetric" similarity the keys are
the tokens as they are, and so are the values unless they are "full": such a layer decodes with a cache of the tokens
alone. The MLP, which the paper leaves out too, is the block's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.base import How, LayerCache, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.cache import KVCache
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]

Similarity = Literal["full", "collapsed", "symmetric", "positive"]
Values = Literal["full", "collapsed", "none"]

CARD = Card(
    id="minimal-transformer",
    kind="token",
    group="scores",
    title="Reducing the Transformer Architecture to a Minimum",
    year=2024,
    paper="2410.13732",
    summary="One similarity matrix a head in place of query and key projections, symmetric if asked, and one value "
    "matrix or none.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="torch.nn.MultiheadAttention, also with its products of matrices put into one; parameter counts",
    differs="The parametrisations of a symmetric matrix by a triangle, and the mean over heads where there are no "
    "values, are our reading of the paper. The MLP is left out in the block, not here.",
    evidence=Evidence(
        claim="without value projections and with a symmetric similarity, digits are read nearly as well",
        task="digits",
        metric="accuracy",
        margin=-0.02,
        options={"similarity": "symmetric", "values": "none", "heads": 1},
    ),
)


@register(CARD)
class MinimalAttention(Mechanism):
    """softmax(x W z^T / sqrt(d)) z, with as few matrices as are asked for.

    Args:
        dim: width of x and of the output.
        heads: divides dim, as d = dim / heads scales the scores in every form.
        context_dim: width of the context; dim for a symmetric or positive similarity and for no values.
        similarity: "full", "collapsed", "symmetric" or "positive".
        values: "full", "collapsed" or "none".
    """

    entries: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        similarity: Similarity = "collapsed",
        values: Values = "collapsed",
    ) -> None:
        super().__init__(dim, context_dim)
        expect(similarity in get_args(Similarity), "similarity", repr(similarity), f"one of {get_args(Similarity)}")
        expect(values in get_args(Values), "values", repr(values), f"one of {get_args(Values)}")
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        equal = similarity in ("symmetric", "positive") or values == "none"
        expect(
            not equal or self.context_dim == dim,
            "context_dim",
            self.context_dim,
            f"dim = {dim} for similarity={similarity!r}, values={values!r}",
        )
        self.heads, self.similarity, self.values = heads, similarity, values
        d = dim // heads
        self.scale = d**-0.5
        if similarity == "full":
            self.w_q, self.w_k = _matrix(heads, dim, d), _matrix(heads, self.context_dim, d)
        elif similarity == "collapsed":
            self.w = _matrix(heads, dim, self.context_dim)
        else:
            self.t = _matrix(heads, dim * (dim + 1) // 2, scale=(2 * dim) ** -0.5)
            self.register_buffer("entries", torch.tril_indices(dim, dim), persistent=False)
        if values == "full":
            self.w_v, self.w_o = _matrix(heads, self.context_dim, d), _matrix(heads, d, dim)
        elif values == "collapsed":
            self.w_vo = _matrix(heads, self.context_dim, dim)

    def triangle(self) -> Float[Tensor, "heads dim dim"]:
        """T of each head."""
        row, column = self.entries
        zeros = self.t.new_zeros(self.heads, self.dim, self.dim)
        return zeros.index_put((torch.arange(self.heads, device=row.device)[:, None], row, column), self.t)

    def _queries(self, x: Tensor) -> Heads:
        x = x.unsqueeze(1)
        if self.similarity == "full":
            return x @ self.w_q
        if self.similarity == "collapsed":
            return x @ self.w
        t = self.triangle()
        return x @ (t + t.mT if self.similarity == "symmetric" else t)

    def _keys(self, z: Tensor) -> Heads:
        """(batch, heads, m, width), or the tokens as one head."""
        if self.similarity == "full":
            return z.unsqueeze(1) @ self.w_k
        return z.unsqueeze(1) @ self.triangle() if self.similarity == "positive" else z.unsqueeze(1)

    def _values(self, z: Tensor) -> Heads:
        return z.unsqueeze(1) @ self.w_v if self.values == "full" else z.unsqueeze(1)

    def _merge(self, y: Heads) -> Tensor:
        if self.values == "none":
            return y.mean(1)
        if self.values == "collapsed":
            return (y @ self.w_vo).sum(1)
        return (y @ self.w_o).sum(1)

    def _forward(self, x, context, how):
        return self._attend(x, self._keys(context), self._values(context), how.mask, how.triangular)

    def _attend(self, x: Tensor, k: Heads, v: Heads, mask: masks.Mask | None, causal: bool = False) -> Tensor:
        return self._merge(dense.attend(self._queries(x), k, v, mask=mask, causal=causal, scale=self.scale))

    def _weights(self, x, context, how):
        q, k = self._queries(x), self._keys(context)
        return dense.weights(q, k, mask=how.mask, causal=how.triangular, scale=self.scale)

    def _read(self, weights, x, context, how):
        return self._merge(weights @ self._values(context))

    def _step(self, x: Tensor, cache: LayerCache | None, context: Any, how: How):
        length = 0 if cache is None else cache.length
        if how.cross:
            read = (self._keys(context), self._values(context), how.mask) if cache is None else cache.state
            return self._attend(x, *read), LayerCache(length + x.shape[1], read, True)
        k, v = self._keys(x), self._values(x)
        # The tokens are keys and values in one.
        raw = self.similarity in ("collapsed", "symmetric") and self.values != "full"
        if raw:
            v = v[..., :0]
        state = KVCache.start(k, v) if cache is None else cache.state.append(k, v)
        y = self._attend(x, state.keys, state.keys if raw else state.values, None)
        return y, LayerCache(length + x.shape[1], state)


def _matrix(*shape: int, scale: float | None = None) -> nn.Parameter:
    scale = shape[-2] ** -0.5 if scale is None else scale
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) * scale)
