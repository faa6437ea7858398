"""k-means cross-attention: each pixel chooses one cluster centre, and the centres gather their pixels.

Yu, Wang, Qiao, Collins, Zhu, Adam, Yuille, Chen, "kMaX-DeepLab: k-means Mask Transformer", 2022, arXiv 2207.04044.

    plain         C' = C + softmax over pixels (Q_c K_p^T) V_p
    k-means       C' = C + onehot of argmax over centres (S) V_p

    h   = gelu(BN(W_p gelu(z))),  c = gelu(BN(W_c x))           pixels (batch, m, dim), centres (batch, n, dim)
    f   = l2(BN(W_3 gelu(BN(W_2 gelu(BN(DWConv5x5(h)))))))                (batch, m, mask_dim)
    S   = BN_1((BN(W_k c)) f^T)                                           mask logits (batch, n, m)
    A   = for each pixel 1 at its best centre, else 0                     no gradient
    y   = BN_0(W_u BN(A BN(W_v h)))                                       what is added to the centres

S is the layer's prediction of masks, and the mask head learns from a loss on it alone (`logits`), as A passes no
gradient: `logits` of every layer are supervised in the paper. BN_1 has one channel and starts at 0.1, BN_0 at 0, so
that a new layer changes nothing. A centre sums its pixels up, without dividing by their number and without 1/sqrt(d).
Centres are learned where ``x`` is None, and the output is then C', with the centres in it. ``context_grid`` is the
shape of the pixels; without it they are a line.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.attention.precision import widened
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Centres = Float[Tensor, "batch n dim"]
    Pixels = Float[Tensor, "batch m dim"]

CARD = Card(
    id="kmax-deeplab",
    kind="token",
    group="slots",
    title="kMaX-DeepLab: k-means Mask Transformer",
    year=2022,
    paper="2207.04044",
    code="bytedance/kmax-deeplab",
    summary="Each pixel goes to the one centre whose mask logit is largest, and the centres add their pixels up.",
    patterns=("noncausal-cross",),
    why_not="Centres have no order and compete for all pixels.",
    cost="n",
    mask="keys",
    small={"heads": 1, "queries": 5, "assign": "softmax"},
    checked="the layer written out; scikit-learn's KMeans step by step",
    differs="The residual, the self-attention and MLP of the centres and the class head are the caller's. As the "
    "mask head learns from its own loss only, the conformance suite, which asks that the output teaches all "
    "parameters, runs the softmax form, and the row's tests run the suite on the k-means form. assign='softmax' is "
    "the paper's baseline, a softmax over pixels of the same logits. In training the batch norms count masked pixels "
    "too.",
    evidence=Evidence(
        claim="separates generated shapes better than a softmax over pixels (here without the mask loss)",
        task="shapes-ari",
        metric="ari",
        margin=0.05,
        options={"queries": 4},
        baseline="kmax-deeplab",
        baseline_options={"queries": 4, "assign": "softmax"},
    ),
)


def assigned(logits: Float[Tensor, "batch n m"]) -> Int[Tensor, "batch m"]:
    """The centre that each pixel chooses."""
    return logits.detach().argmax(1)


def gathered(values: Pixels, centre: Int[Tensor, "batch m"], centres: int) -> Centres:
    """The sum of each centre's pixels."""
    index = centre.unsqueeze(-1).expand_as(values)
    return values.new_zeros(values.shape[0], centres, values.shape[2]).scatter_add(1, index, values)


class TokenNorm(nn.BatchNorm1d):
    """Batch normalisation of (batch, length, channels), with the constants of the authors' code."""

    def __init__(self, channels: int, weight: float = 1.0) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)
        nn.init.constant_(self.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def normed(dim_in: int, dim_out: int, *, bias: bool = False, weight: float = 1.0) -> nn.Sequential:
    """Linear and batch norm, whose scale starts at ``weight``."""
    return nn.Sequential(nn.Linear(dim_in, dim_out, bias), TokenNorm(dim_out, weight))


@register(CARD)
class KMeansAttention(Mechanism):
    """x (batch, n, dim), or learned centres, gather the pixels of context (batch, m, context_dim).

    Args:
        heads: 1, as a pixel has one centre.
        queries: how many centres are learned, for x None.
        mask_dim: width of the features and kernels whose products are the mask logits.
        assign: "argmax" over centres, or the baseline "softmax" over pixels.
        context_grid: (height, width) of the context.
    """

    learned_queries = True
    exempt = {"training_leaves_out_padding": "batch norm counts all tokens of a batch, as PyTorch has it"}

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        queries: int = 128,
        mask_dim: int = 128,
        assign: str = "argmax",
        context_grid: Grid | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads == 1, "heads", heads, "1: a pixel has one centre")
        expect(queries > 0, "queries", queries, "a positive int")
        expect(mask_dim > 0, "mask_dim", mask_dim, "a positive int")
        expect(assign in ("argmax", "softmax"), "assign", repr(assign), "'argmax' or 'softmax'")
        self.heads, self.assign, self.context_grid = 1, assign, context_grid
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.pixel, self.centre = normed(self.context_dim, dim), normed(dim, dim)
        self.around, self.around_norm = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, bias=False), TokenNorm(dim)
        self.mix, self.feature = normed(dim, dim), normed(dim, mask_dim, bias=True)
        self.kernel, self.logit_norm = normed(dim, mask_dim), nn.BatchNorm2d(1, eps=1e-3, momentum=0.01)
        nn.init.constant_(self.logit_norm.weight, 0.1)
        self.v, self.read_norm = normed(dim, dim), TokenNorm(dim)
        self.out = normed(dim, dim, weight=0.0)

    def logits(self, x: Centres | None, context: Tensor, *, mask: Tensor | None = None) -> Float[Tensor, "batch n m"]:
        """S, for the mask loss. Batch norms keep their running statistics: a step of training has a call of the layer
        too, which counts the batch."""
        x, context, how = self._checked(x, context, mask, False, None)
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        before = [norm.track_running_stats for norm in norms]
        try:
            for norm in norms:
                norm.track_running_stats = False  # in training the statistics of the batch, and no trace of them
            return self._logits(x, self._pixels(context), how)
        finally:
            for norm, tracks in zip(norms, before, strict=True):
                norm.track_running_stats = tracks

    def _pixels(self, context: Tensor) -> Pixels:
        return F.gelu(self.pixel(F.gelu(context)))

    def _logits(self, x: Centres | None, pixels: Pixels, how: How) -> Float[Tensor, "batch n m"]:
        m, keep = pixels.shape[1], masks.split(how.mask)[1]
        grid = (1, m) if self.context_grid is None else self.context_grid
        expect(len(grid) == 2 and math.prod(grid) == m, "context_grid", grid, f"(height, width) of the {m} pixels")
        if keep is not None:  # as beyond the border
            pixels = pixels * keep.unsqueeze(-1).to(pixels.dtype)
        around = self.around(pixels.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        feature = self.feature(F.gelu(self.mix(F.gelu(self.around_norm(around)))))
        x = self.queries.expand(pixels.shape[0], -1, -1) if x is None else x
        kernel = self.kernel(F.gelu(self.centre(x)))
        return self.logit_norm((kernel @ F.normalize(feature, dim=-1).transpose(1, 2)).unsqueeze(1)).squeeze(1)

    def _shares(
        self, logits: Float[Tensor, "batch n m"], keep: Bool[Tensor, "batch m"] | None
    ) -> Float[Tensor, "batch n m"]:
        """A, as a matrix."""
        seen = None if keep is None else keep.unsqueeze(1)
        if self.assign == "softmax":
            return dense.softmax(logits, seen)
        centre = torch.arange(logits.shape[1], device=logits.device)[:, None]
        one = assigned(logits).unsqueeze(1) == centre
        return (one if seen is None else one & seen).to(logits.dtype)

    def _join(self, read: Centres, x: Centres | None) -> Centres:
        update = self.out(self.read_norm(read))
        return update if x is not None else self.queries + update

    def _forward(self, x, context, how):
        pixels, keep = self._pixels(context), masks.split(how.mask)[1]
        v = self.v(pixels)
        if self.assign == "softmax":
            return self._join(self._shares(self._logits(x, pixels, how), keep) @ v, x)
        with torch.no_grad():
            logits = self._logits(x, pixels, how)
        if keep is not None:
            v = v * keep.unsqueeze(-1).to(v.dtype)
        # The pixels of a centre may be many: they are summed in at least float32.
        read = gathered(v.to(widened(v.dtype)), assigned(logits), logits.shape[1])
        return self._join(read.to(v.dtype), x)

    def _weights(self, x, context, how):
        logits = self._logits(x, self._pixels(context), how)
        return self._shares(logits, masks.split(how.mask)[1]).unsqueeze(1)

    def _read(self, weights, x, context, how):
        return self._join(weights.squeeze(1) @ self.v(self._pixels(context)), x)
