"""Images whose label takes both scales: a coarse shape of brightness under a fine texture.

A 24 x 24 image shows one of three shapes (square, frame, cross) of random place and size as a change of brightness, and
all over it horizontal or vertical stripes of period two, with noise. The label is the number of the shape, or with
vertical stripes the next number: the stripes alone say nothing about it, the shape alone leaves two choices.

The trunk has two branches, one for each scale: 4 x 4 patches of what a 2 x 2 mean takes out of the image, and 4 x 4
patches of the 12 x 12 means. Each sees one cue, and a sum of what they make of it does not give the label. The entrant
lets them exchange after each block; "none" leaves it out, so that only the logits of the branches are averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.tasks.base import Batch, Entrant, Size, Task, task
from crosslight.tasks.trunk import Block, Positions, SelfAttention

if TYPE_CHECKING:
    from jaxtyping import Float

SIDE, SHAPES, PATCH = 24, 3, 4
TOKENS = {"small": (SIDE // PATCH) ** 2, "large": (SIDE // 2 // PATCH) ** 2}


class _Stage(nn.Module):
    def __init__(self, entrant: Entrant, size: Size) -> None:
        super().__init__()
        streams = dict.fromkeys(TOKENS, size.dim)
        self.blocks = nn.ModuleDict(
            {name: Block(None, dim, SelfAttention(dim, size.heads, causal=False)) for name, dim in streams.items()}
        )
        self.entrant = (
            None
            if entrant.id == "none"
            else registry.create(entrant.id, **{"streams": streams, "heads": size.heads, **entrant.options})
        )

    def forward(self, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        streams = {name: self.blocks[name](x) for name, x in streams.items()}
        return streams if self.entrant is None else {**streams, **self.entrant(streams)}


class _TwoBranches(nn.Module):
    """Two ViTs with a class token each, and the mean of their logits."""

    def __init__(self, entrant: Entrant, size: Size) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({name: nn.Conv2d(1, size.dim, PATCH, PATCH) for name in TOKENS})
        self.positions = nn.ModuleDict({name: Positions(1 + n, size.dim) for name, n in TOKENS.items()})
        self.stages = nn.ModuleList(_Stage(entrant, size) for _ in range(size.depth))
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(size.dim), nn.Linear(size.dim, SHAPES)) for name in TOKENS}
        )

    def forward(self, images: Float[Tensor, "batch 1 24 24"]) -> Float[Tensor, "batch 3"]:
        coarse = F.avg_pool2d(images, 2)
        fine = images - coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        streams = {}
        for name, x in (("small", fine), ("large", coarse)):
            tokens = self.embed[name](x).flatten(2).transpose(1, 2)
            streams[name] = self.positions[name](F.pad(tokens, (0, 0, 1, 0)))  # the class token is its position
        for stage in self.stages:
            streams = stage(streams)
        return torch.stack([self.heads[name](x[:, 0]) for name, x in streams.items()]).mean(0)


def draw(count: int, generator: torch.Generator) -> Batch:
    """Images (count, 1, 24, 24) and labels (count)."""
    shape = torch.randint(SHAPES, (count, 1, 1), generator=generator)
    vertical = torch.randint(2, (count, 1, 1), generator=generator)
    half = torch.randint(3, 5, (count, 1, 1), generator=generator)
    centre = torch.randint(4, SIDE // 2 - 4, (count, 2, 1, 1), generator=generator)
    row, column = torch.arange(SIDE).view(1, -1, 1), torch.arange(SIDE).view(1, 1, -1)
    # The shape lies on the grid of 2 x 2 means, and the stripes are even in each of them.
    y, x = (row // 2 - centre[:, 0]).abs(), (column // 2 - centre[:, 1]).abs()
    square = (y <= half) & (x <= half)
    frame = square & ((y >= half - 1) | (x >= half - 1))
    cross = square & ((y <= 1) | (x <= 1))
    inside = torch.where(shape == 0, square, torch.where(shape == 1, frame, cross))
    stripes = torch.where(vertical == 1, column, row) % 2
    noise = 0.2 * torch.randn(count, SIDE, SIDE, generator=generator)
    return {"x": (inside + stripes + noise).unsqueeze(1), "y": ((shape + vertical) % SHAPES).view(-1)}


@task
class TwoScales(Task):
    """Classify images by a coarse shape and a fine texture together."""

    name = "two-scales"
    kind = "fusion"
    metric = "accuracy"
    size = Size(dim=32, heads=4, depth=2)
    steps = 300
    batch_size = 32
    lr = 3e-3

    def batches(self, seed, batch_size):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(batch_size, generator)

    def model(self, entrant, size):
        return _TwoBranches(entrant, size)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def evaluate(self, model):
        device = next(model.parameters()).device
        batch = draw(500, torch.Generator().manual_seed(1_000_003))
        logits, y = model(batch["x"].to(device)), batch["y"].to(device)
        return {
            "accuracy": (logits.argmax(-1) == y).float().mean().item(),
            "loss": F.cross_entropy(logits, y).item(),
        }

    def example(self):
        return draw(1, torch.Generator().manual_seed(1_000_003))
