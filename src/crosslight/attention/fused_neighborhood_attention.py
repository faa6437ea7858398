"""Neighbourhood attention on grids of one to three axes, at a cost that follows the windows.

Hassani, Hwu and Shi, "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock
Level", 2024, arXiv 2403.04690; the mechanism: Hassani et al., "Neighborhood Attention Transformer", 2022,
arXiv 2204.07143.

Each token reads the k tokens nearest to it on each axis. On an axis of length L with dilation t, the tokens of equal
remainder by t form a group of length G, in which the one at place p reads

    from max(0, min(p - floor(k / 2), G - k))  on, k places         at a border the window moves, and keeps its size
    from max(0, p - k + 1) to p                                     on a causal axis

    y_i = softmax(q_i K[N(i)]^T / sqrt(d)) V[N(i)],   N(i) = the product of the windows of the axes

q, k, v (batch, heads, n, d), tokens in row-major order of ``grid`` = (W,), (H, W) or (T, H, W); one axis without it.

The paper's fused kernel lets a tile of queries meet the keys around all its windows, with the mask applied inside and
no buffer of scores. Here tiles are boxes of the grid (`engines.plans`) and run through the sparse engine. Unlike plain
multi-head attention a token reads a bounded number of keys, and where it stands in the grid matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse
from crosslight.engines.masks import Mask, Neighbourhood
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

CARD = Card(
    id="fused-neighborhood-attention",
    kind="system",
    group="system",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    year=2024,
    paper="2403.04690",
    code="SHI-Labs/NATTEN",
    summary="Each token reads its nearest tokens on a grid of one to three axes, computed tile by tile.",
    patterns=("noncausal-self", "causal-self"),
    why_not="The neighbours of a token are tokens of the same grid.",
    cost="n",
    decode="state",
    small={"kernel_size": 3},
    checked="natten.na1d, na2d and na3d (1e-5), and dense softmax under the explicit matrix (1e-10), with dilation and "
    "causal axes",
    differs="The paper asks for kernel_size * dilation <= the length of each axis; here a window that is larger reads "
    "the whole axis (its group, if dilated). causal=True makes the first axis causal, and in grids of more axes "
    "also hides what comes later in row-major order. Decoding takes the tokens as one axis.",
    evidence=Evidence(
        claim="5 x 5 windows on 8 x 8 digits are not worse than full attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"kernel_size": 5},
    ),
)


@register(CARD)
class NeighbourhoodAttention(Core):
    """softmax over the windows of a grid.

    Args:
        kernel_size, dilation: for all axes, or one number an axis.
        is_causal: axes on which a token reads none beyond itself.
    """

    grouped = True
    takes_grid = True

    def __init__(
        self,
        heads: int,
        head_dim: int,
        kernel_size: int | tuple[int, ...] = 7,
        dilation: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
    ) -> None:
        super().__init__(heads, head_dim)
        for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
            sides = value if isinstance(value, tuple | list) else (value,)
            expect(all(side >= 1 for side in sides), name, value, "numbers >= 1")
        self.kernel_size, self.dilation, self.is_causal = kernel_size, dilation, is_causal

    def rule(self, n: int, grid: Grid | None = None, causal: bool = False) -> Mask:
        """Which keys a query reads."""
        grid = (n,) if grid is None else tuple(grid)
        expect(1 <= len(grid) <= 3, "grid", grid, "one to three axes")
        axes = tuple(bool(on) for on in _per_axis("is_causal", self.is_causal, grid))
        kernel = _per_axis("kernel_size", self.kernel_size, grid)
        dilation = _per_axis("dilation", self.dilation, grid)
        if not causal:
            return Neighbourhood(grid, kernel, dilation, axes)
        rule = Neighbourhood(grid, kernel, dilation, (True, *axes[1:]))
        return rule if len(grid) == 1 else masks.causal() & rule

    def forward(self, q, k, v, *, mask=None, causal=False, grid=None):
        return sparse.attend(q, k, v, mask=masks.join(self.rule(q.shape[2], grid, causal), mask))

    def weights(self, q, k, *, mask=None, causal=False, grid=None):
        return dense.weights(q, k, mask=masks.join(self.rule(q.shape[2], grid, causal), mask))

    def read(self, weights, v, *, grid=None):
        return super().read(weights, v)

    def step(self, q, k, v, state=None, **extra):
        kernel, dilation = self.rule(1, causal=True).kernel[0], self.rule(1, causal=True).dilation[0]  # type: ignore[attr-defined]
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        y = dense.attend(q, k, v, mask=_behind(q.shape[2], k, kernel, dilation))
        kept = max(0, k.shape[2] - (kernel - 1) * dilation)  # what no later query reads
        return y, (k[:, :, kept:].contiguous(), v[:, :, kept:].contiguous())


def _behind(n: int, k: Tensor, kernel: int, dilation: int) -> Mask:
    """The causal window of the last ``n`` tokens."""
    m = k.shape[2]
    i, j = torch.arange(m - n, m, device=k.device)[:, None], torch.arange(m, device=k.device)
    distance = i - j
    near = (distance >= 0) & (distance < kernel * dilation) & (distance % dilation == 0)
    return masks.Pairs(near[None, None])


def _per_axis(name: str, value, grid: Grid) -> tuple:
    if not isinstance(value, tuple | list):
        return (value,) * len(grid)
    expect(len(value) == len(grid), name, value, f"a number, or one for each axis of grid = {grid}")
    return tuple(value)
