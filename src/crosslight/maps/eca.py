"""ECA: channel attention by one small convolution across neighbouring channels.

Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", 2019, arXiv 1910.03151.

    s = mean of x over space                      (batch, C)
    w = sigmoid(conv1d_k(s))                      (batch, C), one kernel of k weights for all channels, zero padding
    y = x * w                                     (batch, C, *space)
    k = |log2(C) / gamma + b / gamma|_odd         truncated, plus one if even

Squeeze-and-excitation mixes all channels through a bottleneck with 2 C^2 / r weights; here a gate sees the k channels
around its own, and the module has k weights. It stands at the end of each residual branch, before the addition:
``crosslight.insert(model, "eca")``.
"""

from __future__ import annotations

import math

from torch import nn

from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.maps.base import MapAttention, mean
from crosslight.registry import register

CARD = Card(
    id="eca",
    kind="map",
    group="maps",
    title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    year=2019,
    paper="1910.03151",
    code="BangguWu/ECANet",
    summary="Gates channels by one convolution over their pooled values: k weights, no bottleneck.",
    cost="n",
    checked="timm.layers.EcaModule with the same weights; k for 64 to 2048 channels; band of the gate's Jacobian",
    differs="timm never takes a kernel below 3; the paper's rule gives 1 for up to 4 channels, and is followed.",
    evidence=Evidence(
        claim="A small ResNet with ECA in its residual branches is 2 points more accurate than the plain one",
        task="cluttered-digits",
        metric="accuracy",
        margin=0.02,
        baseline="none",
    ),
)


def kernel_size(channels: int, gamma: float = 2, b: float = 1) -> int:
    """|log2(channels) / gamma + b / gamma|_odd."""
    k = int(abs((math.log2(channels) + b) / gamma))
    return k if k % 2 else k + 1


@register(CARD)
class ECA(MapAttention):
    """x * sigmoid(conv1d_k(mean(x))); (batch, channels, *space).

    Args:
        channels: of the map.
        gamma, b: of the rule for the kernel size.
        kernel: odd kernel size, in place of the rule.
    """

    space = (1, 2, 3)

    def __init__(self, channels: int, *, gamma: float = 2, b: float = 1, kernel: int | None = None) -> None:
        super().__init__(channels)
        kernel = kernel_size(channels, gamma, b) if kernel is None else kernel
        expect(kernel > 0 and kernel % 2 == 1, "kernel", kernel, "an odd number >= 1")
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def _weights(self, x):
        gate = self.conv(mean(x, tuple(range(2, x.dim()))).flatten(1).unsqueeze(1)).sigmoid()
        return gate.view(*x.shape[:2], *[1] * (x.dim() - 2))
