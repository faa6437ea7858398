"""What the vision backbones of this room share: a pyramid of stages, the pre-norm block, the MLP.

A row whose paper builds a network of its layer sets ``network`` on its layer class: a subclass of `Pyramid` (or any
module) with ``presets`` and ``published`` parameter counts, which ``create(id, preset=...)`` builds. What only one
paper has (its stem, its block's extra convolutions) stays in that row's file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from crosslight.engines.positions import Grid
from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Float

    Map = Float[Tensor, "batch dim height width"]
    Tokens = Float[Tensor, "batch n dim"]


def to_tokens(x: Map) -> tuple[Tokens, Grid]:
    """A feature map as its tokens in reading order, and the grid that `to_map` needs."""
    return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


def to_map(x: Tokens, grid: Grid) -> Map:
    """The inverse of `to_tokens`."""
    return x.transpose(1, 2).unflatten(2, grid)


class Mlp(nn.Sequential):
    """Linear, activation, linear."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__(nn.Linear(dim, hidden), activation(), nn.Linear(hidden, dim))


class Block(nn.Module):
    """x + attend(norm x), then x + mlp(norm x), on tokens of a grid.

    Args:
        attend: a mechanism of width ``dim``; it is handed ``grid=``.
        mlp_ratio: hidden width of the MLP over ``dim``.
    """

    def __init__(self, dim: int, attend: nn.Module, mlp_ratio: float = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(dim, eps=eps), attend
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=eps), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tokens, grid: Grid) -> Tokens:
        x = x + self.attend(self.norm1(x), grid=grid)
        return x + self.mlp(self.norm2(x))


class Pyramid(nn.Module):
    """Images (batch, channels, height, width) -> logits (batch, classes).

    Args:
        stages: modules from map to map, each halving (the first: quartering) the resolution and then attending.
        dim: width of the last stage.
        classes: outputs of the linear head; 0 gives the pooled features instead.
        norm: over the pooled width, before the head.
    """

    def __init__(
        self, stages: Sequence[nn.Module], dim: int, *, classes: int = 1000, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        expect(len(stages) > 0, "stages", "none", "at least one")
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dim) if norm is None else norm
        self.head: nn.Module = nn.Linear(dim, classes) if classes else nn.Identity()

    def features(self, images: Map) -> list[Map]:
        """The feature map after each stage, for detection and segmentation."""
        expect(images.dim() == 4, "images", tuple(images.shape), "(batch, channels, height, width)")
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        return self.head(self.norm(self.features(images)[-1].mean((2, 3))))


def initialise(model: nn.Module) -> None:
    """Truncated normal of 0.02 for linear weights and zero biases, as the vision backbones use."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
