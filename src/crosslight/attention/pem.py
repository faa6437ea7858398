"""Prototype cross-attention: of all pixels a query takes one for each head, the most similar.

Cavagnero, Rosi, Cuttano, Pistilli, Ciccone, Averta, Cermelli, "PEM: Prototype-based Efficient MaskFormer for Image
Segmentation", 2024, arXiv 2402.19422.

    k = l2(W_k DWConv3x3(BN(z)))                        (batch, m, dim); l2: each token divided by its norm
    q = l2(W_q LN(x))                                   (batch, n, dim)
    j(i, h) = argmax_j k_jh . q_ih                      over the pixels that query i may read; heads are slices of dim
    p_i = [k_j(i,1) ; ... ; k_j(i,h)]                   the prototype                        (batch, n, dim)
    y_i = W_o (alpha * norm(W_p (p * q))_i + p_i)       norm: each channel divided by its norm over the queries

No softmax and no values: after the search the cost no longer depends on the pixels. The queries are learned where ``x``
is None. ``last`` are the mask logits of the layer before: a query reads pixels where its own are not negative, and all
pixels if there are none. In self-attention ``grid`` is the shape of the pixels; for a context it is ``context_grid``,
and without it the pixels are a line. Positional codes are the caller's to add. Queries and keys are made in at least
float32: a winner that rounding chose would be another pixel.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.attention.precision import in_full, widened
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]

CARD = Card(
    id="pem",
    kind="token",
    group="sparse",
    title="PEM: Prototype-based Efficient MaskFormer for Image Segmentation",
    year=2024,
    paper="2402.19422",
    code="NiccoloCavagnero/PEM",
    summary="Each query and head takes its single most similar pixel, and meets it by an elementwise product.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="The product is normalised over all queries.",
    cost="n",
    mask="keys",
    small={"queries": 5},
    checked="the equations written out query by query; what may and what may not change the winner",
    differs="The residual, positional codes and the pixel decoder (deformable convolutions, channel gate) are the "
    "caller's. The cost is that of a fixed number of queries. In training the batch norm counts masked pixels too.",
    evidence=Evidence(
        claim="digits are read within two points of softmax attention by the best pixel of each head alone",
        task="digits",
        metric="accuracy",
        margin=-0.02,
    ),
)


@register(CARD)
class PrototypeAttention(Mechanism):
    """x (batch, n, dim), or learned queries, read context (batch, m, context_dim).

    Args:
        heads: slices of dim that search by themselves.
        queries: how many are learned, for x None.
        kernel: side of the depthwise convolution over pixels; 1 leaves their order without meaning.
        context_grid: the shape of the context.
    """

    learned_queries = True
    exempt = {"training_leaves_out_padding": "batch norm counts all tokens of a batch, as PyTorch has it"}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        context_dim: int | None = None,
        queries: int = 100,
        kernel: int = 3,
        context_grid: Grid | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "dim", dim, f"a multiple of heads = {heads}")
        expect(queries > 0, "queries", queries, "a positive int")
        expect(kernel > 0 and kernel % 2 == 1, "kernel", kernel, "an odd positive int")
        self.heads, self.context_grid = heads, context_grid
        self.queries = nn.Parameter(torch.randn(queries, dim))
        width = self.context_dim
        self.context_norm, self.norm = nn.BatchNorm2d(width), nn.LayerNorm(dim)
        self.around = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.k, self.q = nn.Linear(width, dim), nn.Linear(dim, dim)
        self.product, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.alpha = nn.Parameter(torch.ones(dim))

    def _split(self, t: Stream) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None, *, last=None, **how):
        """As of `Mechanism`, with ``last`` (batch, n, m): the mask logits of the layer before."""
        return self._forward(*self._seen(x, context, last, **how))

    def weights(self, x, context=None, *, last=None, **how):
        """One 1 for each query and head, where its prototype lies."""
        return self._weights(*self._seen(x, context, last, **how))

    def _seen(
        self,
        x: Stream | None,
        context: Tensor | None,
        last: Float[Tensor, "batch n m"] | None,
        *,
        mask: Any = None,
        causal: bool = False,
        grid: Grid | None = None,
    ) -> tuple[Any, Tensor, How]:
        x, context, how = self._checked(x, context, mask, causal, grid)
        if last is not None:
            shape = (context.shape[0], (self.queries if x is None else x).shape[-2], context.shape[1])
            expect(tuple(last.shape) == shape, "last", tuple(last.shape), f"(batch, n, m) = {shape}")
            how = dataclasses.replace(how, mask=masks.join(how.mask, masks.Pairs((last >= 0).unsqueeze(1))))
        return x, context, how

    def _queries(self, x: Stream | None, context: Tensor) -> Stream:
        x = self.queries.expand(context.shape[0], -1, -1) if x is None else x
        return F.normalize(in_full(self.q, in_full(self.norm, x)), dim=-1)

    def _pixels(self, context: Tensor, how: How) -> Stream:
        m = context.shape[1]
        grid = self.context_grid if how.cross else how.grid
        grid = (1, m) if grid is None else grid
        expect(len(grid) == 2 and math.prod(grid) == m, "context_grid", grid, f"(height, width) of the {m} pixels")
        z = self._normed(context.transpose(1, 2).unflatten(2, grid))
        keep = masks.split(how.mask)[1]
        if keep is not None:  # as beyond the border
            z = z * keep.unflatten(1, grid).unsqueeze(1).to(z.dtype)
        return F.normalize(in_full(self.k, in_full(self.around, z).flatten(2).transpose(1, 2)), dim=-1)

    @torch.no_grad()
    def _winners(self, q: Heads, k: Heads, how: How) -> Int[Tensor, "batch heads n"]:
        """The pixel of each query, -1 where none may be read."""
        batch, heads, n, m = *q.shape[:3], k.shape[2]
        _, keep, rest = masks.split(how.mask)
        kept = None if keep is None else keep[:, None, None, :]

        def part(start: int, stop: int) -> Tensor:
            scores = q[:, :, start:stop] @ k.transpose(-1, -2)
            seen = kept
            if rest is not None:
                own = rest.dense(batch, heads, stop - start, m, device=q.device, offset=start)
                own = own if kept is None else own & kept
                seen = own | (~own.any(-1, keepdim=True) if kept is None else ~own.any(-1, keepdim=True) & kept)
            if seen is None:
                return scores.argmax(-1)
            best = scores.masked_fill(~seen, -math.inf).max(-1)
            return best.indices.masked_fill(best.values == -math.inf, -1)

        return dense.by_rows(part, n, batch * heads * m)

    def _join(self, prototypes: Heads, q: Stream, how: How) -> Stream:
        dtype = self.out.weight.dtype
        p, keep = prototypes.transpose(1, 2).flatten(2).to(dtype), masks.split(how.mask)[1]
        product = self.product(p * q.to(dtype))
        counted = product
        if keep is not None and not how.cross:  # a masked token asks, but for itself alone
            counted = product * keep.unsqueeze(-1).to(dtype)
        length = torch.linalg.vector_norm(counted, dim=1, keepdim=True).clamp(min=1e-12)
        return self.out(product / length * self.alpha + p)

    def _normed(self, z: Float[Tensor, "batch context_dim height width"]) -> Tensor:
        """The batch norm, in at least float32."""
        norm, wide = self.context_norm, widened(z.dtype)
        if norm.training or norm.weight.dtype == wide:
            return norm(z).to(wide)
        mean, var, weight, bias = (
            getattr(norm, name).to(wide) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(z.to(wide), mean, var, weight, bias, eps=norm.eps)

    def _forward(self, x, context, how):
        q, k = self._queries(x, context), self._split(self._pixels(context, how))
        won = self._winners(self._split(q), k, how).unsqueeze(-1)
        p = k.gather(2, won.clamp(min=0).expand(-1, -1, -1, k.shape[3]))
        return self._join(p.masked_fill(won < 0, 0.0), q, how)

    def _weights(self, x, context, how):
        q, k = self._split(self._queries(x, context)), self._split(self._pixels(context, how))
        won = self._winners(q, k, how).unsqueeze(-1)
        return (won == torch.arange(k.shape[2], device=k.device)).to(context.dtype)

    def _read(self, weights, x, context, how):
        k = self._split(self._pixels(context, how))
        return self._join(weights.to(k.dtype) @ k, self._queries(x, context), how)
