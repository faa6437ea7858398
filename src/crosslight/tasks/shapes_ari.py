"""Unsupervised segmentation of small pictures of two or three coloured squares and discs.

An autoencoder whose bottleneck is a few slots: the entrant's slots read the pixels' features, each slot is decoded
alone into a picture and a mask, and the masks, softmaxed over the slots, blend the pictures (spatial broadcast decoder,
Watters et al. 2019, arXiv 1901.07017). It is trained to reconstruct and sees no labels. The score is the adjusted
Rand index of the masks against the shapes, over the pixels of shapes only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight.errors import require
from crosslight.tasks.base import Entrant, Size, Task, task
from crosslight.tasks.trunk import attention, mlp

SIDE = 12
COLOURS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0))


class PixelPositions(nn.Module):
    """Adds a linear map of each pixel's distances to the four borders, over (..., side * side, dim)."""

    grid: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        ramp = torch.linspace(0, 1, SIDE)
        row, column = ramp.view(-1, 1).expand(SIDE, SIDE), ramp.expand(SIDE, SIDE)
        grid = torch.stack([row, column, 1 - row, 1 - column], -1).flatten(0, 1)
        self.register_buffer("grid", grid, persistent=False)
        self.linear = nn.Linear(4, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.grid)


class SlotAutoencoder(nn.Module):
    """Pictures (batch, 3, side, side) -> reconstructions and masks (batch, slots, side * side)."""

    def __init__(self, entrant: Entrant, dim: int, slots: int) -> None:
        super().__init__()
        # A pixel's colour and place are all that these pictures need: no convolutions.
        self.embed, self.positions = nn.Linear(3, dim), PixelPositions(dim)
        self.features = nn.Sequential(nn.LayerNorm(dim), mlp(dim))
        self.entrant = attention(entrant, Size(dim=dim, heads=1, depth=1))
        # Entrants without queries of their own get these.
        learned = getattr(self.entrant, "learned_queries", False)
        self.queries = None if learned else nn.Parameter(torch.randn(1, slots, dim))
        self.broadcast = PixelPositions(dim)
        self.decode = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.features(self.positions(self.embed(x.flatten(2).mT)))
        queries = None if self.queries is None else self.queries.expand(len(z), -1, -1)
        slots = self.entrant(queries, z)
        pixels = self.decode(self.broadcast(slots.unsqueeze(2)))
        picture, mask = pixels[..., :3], pixels[..., 3].softmax(1)
        return (mask.unsqueeze(-1) * picture).sum(1).mT.view_as(x), mask


@task
class ShapesARI(Task):
    """Tell ``shapes[0]`` to ``shapes[1]`` shapes of different colours apart by reconstruction alone."""

    name = "shapes-ari"
    pattern = "noncausal-cross"
    metric = "ari"
    size = Size(dim=32, heads=1, depth=1)
    steps = 1500
    batch_size = 16
    lr = 6e-3

    def __init__(self, shapes: tuple[int, int] = (2, 3), slots: int = 4) -> None:
        self.shapes, self.slots = shapes, slots

    def _batch(self, count: int, draw: torch.Generator) -> dict[str, Tensor]:
        """Pictures, and the number of the shape that each pixel shows, 0 for the background."""
        row, column = torch.arange(SIDE).view(-1, 1), torch.arange(SIDE)
        low, high = self.shapes
        present = torch.randint(low, high + 1, (count,), generator=draw)
        colours = torch.tensor(COLOURS)[torch.rand(count, len(COLOURS), generator=draw).argsort(1)[:, :high]]
        x = torch.zeros(count, SIDE, SIDE, 3)
        label = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
        for shape in range(high):  # a later shape hides what is behind it
            radius = torch.randint(2, 4, (count, 1, 1), generator=draw)
            y0, x0 = torch.randint(2, SIDE - 2, (2, count, 1, 1), generator=draw)
            down, across = (row - y0).abs(), (column - x0).abs()
            disc = torch.rand(count, 1, 1, generator=draw) < 0.5
            inside = torch.where(disc, down**2 + across**2 <= radius**2 + 1, torch.maximum(down, across) <= radius)
            inside &= (shape < present).view(-1, 1, 1)
            x = torch.where(inside.unsqueeze(-1), colours[:, shape, None, None], x)
            label = torch.where(inside, shape + 1, label)
        return {"x": x.permute(0, 3, 1, 2), "label": label}

    def batches(self, seed, batch_size):
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield self._batch(batch_size, draw)

    def _held_out(self) -> dict[str, Tensor]:
        return self._batch(256, torch.Generator().manual_seed(2**32 - 1))

    def model(self, entrant, size):
        return SlotAutoencoder(entrant, size.dim, self.slots)

    def loss(self, model, batch):
        return F.mse_loss(model(batch["x"])[0], batch["x"])

    def evaluate(self, model):
        score = require("sklearn.metrics", "compare").adjusted_rand_score
        batch, device = self._held_out(), next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # slots that are drawn are drawn alike for every model
            picture, mask = model(batch["x"].to(device))
        found, label = mask.argmax(1).cpu(), batch["label"].flatten(1)
        scores = [score(truth[truth > 0], guess[truth > 0]) for truth, guess in zip(label, found, strict=True)]
        return {"ari": sum(scores) / len(scores), "mse": F.mse_loss(picture.cpu(), batch["x"]).item()}

    def example(self):
        return {name: t[:1] for name, t in self._held_out().items()}

    def labels(self, example):
        return {
            "rows": [f"slot {i}" for i in range(self.slots)],
            "columns": [f"({y}, {x})" for y in range(SIDE) for x in range(SIDE)],
            "image": example["x"][0].mean(0),
        }
