"""CBAM: a channel gate, then a spatial gate, each from mean and maximum.

Woo et al., "CBAM: Convolutional Block Attention Module", 2018, arXiv 1807.06521.

    M_c = sigmoid(MLP(mean_space F) + MLP(max_space F))          (batch, C, 1, 1), MLP: C -> C / r -> C with ReLU
    F'  = M_c * F
    M_s = sigmoid(conv_7x7([mean_C F' ; max_C F']))              (batch, 1, H, W)
    F'' = M_s * F'

Squeeze-and-excitation has the mean alone and no spatial gate. Both gates are modules of their own, and ``order`` and
``pool`` give the paper's ablations: one gate alone, the reverse order, both side by side, one kind of pooling. It
stands at the end of each residual branch, before the addition: ``crosslight.insert(model, "cbam")``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.maps.base import MapAttention, mean
from crosslight.registry import register

CARD = Card(
    id="cbam",
    kind="map",
    group="maps",
    title="CBAM: Convolutional Block Attention Module",
    year=2018,
    paper="1807.06521",
    code="Jongchan/attention-module",
    summary="Gates channels, then places, each from the mean and the maximum over the other axes.",
    cost="n",
    small={"reduction": 4},
    checked="timm.layers.CbamModule with the same weights; parameter count 2 C^2 / r + 2 k^2; invariances of the gates",
    differs="The authors' code normalises the spatial gate (BatchNorm, norm=True) and has biases in the MLP "
    "(bias=True); the paper's equations have neither.",
    evidence=Evidence(
        claim="A small ResNet with CBAM in its residual branches is 2 points more accurate than the plain one",
        task="cluttered-digits",
        metric="accuracy",
        margin=0.02,
        baseline="none",
        options={"reduction": 4},
    ),
)

_ORDERS = ("channel-spatial", "spatial-channel", "parallel", "channel", "spatial")


def _pool(x: Tensor, kinds: tuple[str, ...], axes: tuple[int, ...]) -> list[Tensor]:
    return [(mean if kind == "avg" else _largest)(x, axes) for kind in kinds]


def _largest(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The maximum over neighbouring axes, which stay as 1."""
    # The gradient of `max` goes to the place it chose, that of `amax` compares the whole map with it: 2 to 3 times.
    largest = x.flatten(axes[0], axes[-1]).max(axes[0], keepdim=True).values
    return largest.view(*(1 if axis in axes else side for axis, side in enumerate(x.shape)))


def _check_pool(pool: tuple[str, ...]) -> tuple[str, ...]:
    pool = (pool,) if isinstance(pool, str) else tuple(pool)
    expect(pool in (("avg", "max"), ("avg",), ("max",)), "pool", pool, "('avg', 'max'), ('avg',) or ('max',)")
    return pool


class ChannelGate(MapAttention):
    """sigmoid(sum over the poolings of MLP(pooled x)), (batch, channels, 1, 1)."""

    def __init__(
        self, channels: int, reduction: int = 16, *, pool: tuple[str, ...] = ("avg", "max"), bias: bool = False
    ) -> None:
        super().__init__(channels)
        expect(0 < reduction <= channels, "reduction", reduction, f"between 1 and the {channels} channels")
        self.pool = _check_pool(pool)
        hidden = channels // reduction
        self.mlp = nn.Sequential(nn.Linear(channels, hidden, bias), nn.ReLU(), nn.Linear(hidden, channels, bias))

    def _weights(self, x):
        scores = sum(self.mlp(p.flatten(1)) for p in _pool(x, self.pool, (2, 3)))
        return scores.sigmoid()[..., None, None]


class SpatialGate(MapAttention):
    """sigmoid(conv(the poolings of x over its channels)), (batch, 1, height, width)."""

    def __init__(
        self, channels: int, kernel: int = 7, *, pool: tuple[str, ...] = ("avg", "max"), norm: bool = False
    ) -> None:
        super().__init__(channels)
        expect(kernel > 0 and kernel % 2 == 1, "spatial_kernel", kernel, "an odd number >= 1")
        self.pool = _check_pool(pool)
        self.conv = nn.Conv2d(len(self.pool), 1, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1) if norm else None

    def _weights(self, x):
        scores = self.conv(torch.cat(_pool(x, self.pool, (1,)), 1))
        return (scores if self.norm is None else self.norm(scores)).sigmoid()


@register(CARD)
class CBAM(MapAttention):
    """M_s * (M_c * x); (batch, channels, height, width). `weights` is the product of both gates.

    Args:
        channels: of the map.
        reduction: r, channels to hidden units of the MLP.
        spatial_kernel: side of the spatial gate's convolution.
        pool: what the gates pool by, ("avg", "max") or one of them.
        order: "channel-spatial", "spatial-channel", "parallel" (both gates read x), "channel" or "spatial" alone.
        norm: BatchNorm in the spatial gate, as in the authors' code.
        bias: biases in the MLP, as in the authors' code.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        spatial_kernel: int = 7,
        pool: tuple[str, ...] = ("avg", "max"),
        order: str = "channel-spatial",
        norm: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(channels)
        expect(order in _ORDERS, "order", repr(order), f"one of {', '.join(_ORDERS)}")
        self.order = order
        if order != "spatial":
            self.channel = ChannelGate(channels, reduction, pool=pool, bias=bias)
        if order != "channel":
            self.spatial = SpatialGate(channels, spatial_kernel, pool=pool, norm=norm)

    def _weights(self, x):
        if self.order == "parallel":
            return self.channel.weights(x) * self.spatial.weights(x)
        first, *rest = self.order.split("-")
        gate = getattr(self, first).weights(x)
        for name in rest:
            gate = gate * getattr(self, name).weights(x * gate)
        return gate

    def _forward(self, x):
        if self.order == "parallel":
            return super()._forward(x)
        for name in self.order.split("-"):  # without the product of the gates, which is as large as x
            x = getattr(self, name)(x)
        return x
