"""The contract of kind map: attention over feature maps, (batch, channels, *space) -> the same shape.

Most maps are gates: ``y = x * weights(x)``, with weights in [0, 1] that broadcast to x. A map that does more than
gate overrides `_forward` and says ``multiplicative = False``; its weights are then what its docstring says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from crosslight.cards import Card
from crosslight.errors import CrosslightError, expect

if TYPE_CHECKING:
    from jaxtyping import Float

    FeatureMap = Float[Tensor, "batch channels *space"]
    Gate = Float[Tensor, "#batch #channels *space"]


def mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The mean over some axes, which stay as 1."""
    # The gradient of `Tensor.mean` is divided at the size of the map: a quarter of the time of a gate on a CPU.
    dtype = torch.promote_types(x.dtype, torch.float32)  # sums of many places are beyond float16
    total = x.sum(axes, keepdim=True, dtype=dtype)
    return (total / (x.numel() // total.numel())).to(x.dtype)


class MapAttention(nn.Module):
    """Attention over a feature map of ``channels`` channels. Subclasses write `_weights`."""

    card: ClassVar[Card]
    #: The output is ``x * weights(x)``, and the weights are in [0, 1].
    multiplicative: ClassVar[bool] = True
    #: How many axes the space may have: 1 (a signal), 2 (an image), 3 (a volume or a clip).
    space: ClassVar[tuple[int, ...]] = (2,)

    def __init__(self, channels: int) -> None:
        super().__init__()
        expect(isinstance(channels, int) and channels > 0, "channels", channels, "a positive int")
        self.channels = channels

    def _weights(self, x: FeatureMap) -> Gate:
        raise NotImplementedError

    def _forward(self, x: FeatureMap) -> FeatureMap:
        # Expanded by itself: the backward pass of a large map is then up to an eighth faster on a CPU.
        return x * self._weights(x).expand_as(x)

    def forward(self, x: FeatureMap) -> FeatureMap:
        """Attend.

        Raises:
            CrosslightError: x has another rank or another number of channels.
        """
        return self._forward(self._checked(x))

    def weights(self, x: FeatureMap) -> Gate:
        """The gate, in a shape that broadcasts to x."""
        return self._weights(self._checked(x))

    def _checked(self, x: Tensor) -> Tensor:
        holds = isinstance(x, Tensor) and x.dim() - 2 in self.space and x.shape[1] == self.channels and x.numel() > 0
        if not holds:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            shapes = " or ".join(f"(batch, {self.channels}{', side >= 1' * axes})" for axes in self.space)
            raise CrosslightError(f"x: got {got}, expected {shapes}")
        return x
