"""Handwritten digits under another brightness and contrast each time, as 4 x 4 patches.

The digits are the 8 x 8 images that scikit-learn ships, a fifth held out. An image x becomes a x + b: a is drawn from
1 / ``contrast`` to ``contrast``, evenly on a logarithmic scale, and b from 0 to ``brightness``; in training anew each
time, and of held-out images once. Which digit it is depends on neither.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.errors import expect
from crosslight.tasks.base import task
from crosslight.tasks.digits import Digits, load
from crosslight.tasks.trunk import Pooled

SIDE, PATCH = 8, 4


class Patches(nn.Module):
    """Images (batch, 1, 8, 8) -> patches in reading order, embedded linearly, (batch, 4, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(PATCH**2, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.unfold(images, PATCH, stride=PATCH).transpose(1, 2))


@task
class JitteredDigits(Digits):
    """Which digit, in whatever light? A row enters as the network of its paper where that has a size for 8 x 8 images
    (as those whose subject is how patches are embedded); any other layer stands in a trunk on patches that are embedded
    linearly."""

    name = "jittered-digits"
    steps = 400
    lr = 3e-3

    def __init__(self, contrast: float = 4.0, brightness: float = 1.0) -> None:
        expect(contrast >= 1, "contrast", contrast, "a factor of at least 1")
        self.contrast, self.brightness = contrast, brightness

    def _jittered(self, x: Tensor, draw: torch.Generator) -> Tensor:
        a, b = torch.rand(2, len(x), 1, generator=draw)
        return (self.contrast ** (2 * a - 1) * x + self.brightness * b).view(-1, 1, SIDE, SIDE)

    def batches(self, seed, batch_size):
        draw = torch.Generator().manual_seed(seed)
        for batch in super().batches(seed, batch_size):
            yield {**batch, "x": self._jittered(batch["x"], draw)}

    def _held_out(self) -> dict[str, Tensor]:
        x, y = (t[: self.test] for t in load())
        return {"x": self._jittered(x, torch.Generator().manual_seed(2**32 - 1)), "y": y}

    def model(self, entrant, size):
        network = None if entrant.id == "none" else getattr(registry.factory(entrant.id)[0], "network", None)
        if getattr(network, "presets", {}).get("tiny", {}).get("image") == SIDE:
            sizes = {"patch": PATCH, "dim": size.dim, "heads": size.heads, "depth": size.depth}
            return registry.create(entrant.id, preset="tiny", **sizes, **entrant.options)
        grid = (SIDE // PATCH, SIDE // PATCH)
        return Pooled(Patches(size.dim), entrant, size, length=grid[0] * grid[1], out=10, grid=grid)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def evaluate(self, model):
        device = next(model.parameters()).device
        batch = {name: t.to(device) for name, t in self._held_out().items()}
        logits = model(batch["x"])
        return {
            "accuracy": (logits.argmax(-1) == batch["y"]).float().mean().item(),
            "loss": F.cross_entropy(logits, batch["y"]).item(),
        }

    def example(self):
        return {name: t[:1] for name, t in self._held_out().items()}

    def labels(self, example):
        side = SIDE // PATCH
        patches = [f"({i // side}, {i % side})" for i in range(side**2)]
        return {"rows": patches, "columns": patches}
