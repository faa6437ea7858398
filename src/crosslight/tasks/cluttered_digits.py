"""Digits on clutter: which digit stands somewhere among fragments of others and noise?

The digits are the 8 x 8 images that scikit-learn ships, a fifth held out; scenes are drawn anew for each batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.tasks.base import Entrant, Size, Task, task
from crosslight.tasks.digits import load

SIDE, DIGIT, FRAGMENT = 16, 8, 4


def scenes(x: Tensor, y: Tensor, count: int, fragments: int, noise: float, draw: torch.Generator) -> dict[str, Tensor]:
    """``count`` scenes (count, 1, SIDE, SIDE) with the digit that each shows whole."""

    def at_random(size: int) -> tuple[Tensor, Tensor]:
        top = torch.randint(SIDE - size + 1, (2, count), generator=draw)
        rows, columns = (start[:, None] + torch.arange(size) for start in top)
        return rows[:, :, None], columns[:, None, :]

    images, each = x.view(-1, DIGIT, DIGIT), torch.arange(count)[:, None, None]
    scene = noise * torch.randn(count, SIDE, SIDE, generator=draw)
    for _ in range(fragments):
        other = images[torch.randint(len(x), (count,), generator=draw)]
        row, column = torch.randint(DIGIT - FRAGMENT + 1, (2,), generator=draw).tolist()
        rows, columns = at_random(FRAGMENT)
        scene[each, rows, columns] += other[:, row : row + FRAGMENT, column : column + FRAGMENT]
    index = torch.randint(len(x), (count,), generator=draw)
    rows, columns = at_random(DIGIT)
    scene[each, rows, columns] += images[index]
    return {"x": scene.unsqueeze(1), "y": y[index]}


class Block(nn.Module):
    """A basic residual block whose branch ends in the entrant."""

    def __init__(self, channels: int, out: int, stride: int, entrant: Entrant) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.attention: nn.Module = nn.Identity()
        if entrant.id != "none":
            self.attention = registry.create(entrant.id, channels=out, **entrant.options)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.attention(self.branch(x)) + self.shortcut(x))


class TinyResNet(nn.Module):
    """A stem and ``depth`` residual blocks, each but the first at half the side and twice the channels."""

    def __init__(self, entrant: Entrant, size: Size) -> None:
        super().__init__()
        widths = [size.dim * 2**i for i in range(size.depth)]
        self.stem = nn.Sequential(nn.Conv2d(1, size.dim, 3, padding=1, bias=False), nn.BatchNorm2d(size.dim), nn.ReLU())
        self.blocks = nn.Sequential(
            *(
                Block(before, width, 1 if i == 0 else 2, entrant)
                for i, (before, width) in enumerate(zip([size.dim, *widths], widths, strict=False))
            )
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@task
class ClutteredDigits(Task):
    """Which digit is whole in a 16 x 16 scene of noise and fragments of digits? A small ResNet, the entrant at the end
    of each residual branch."""

    name = "cluttered-digits"
    kind = "map"
    metric = "accuracy"
    size = Size(dim=12, heads=1, depth=3)
    steps = 400
    batch_size = 64
    lr = 5e-3
    test = 360

    def __init__(self, fragments: int = 4, noise: float = 0.1) -> None:
        self.fragments, self.noise = fragments, noise

    def batches(self, seed, batch_size):
        x, y = (t[self.test :] for t in load())
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield scenes(x, y, batch_size, self.fragments, self.noise, draw)

    def model(self, entrant, size):
        return TinyResNet(entrant, size)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def _held_out(self, count: int) -> dict[str, Tensor]:
        x, y = (t[: self.test] for t in load())
        return scenes(x, y, count, self.fragments, self.noise, torch.Generator().manual_seed(0))

    def evaluate(self, model):
        device = next(model.parameters()).device
        batch = {key: t.to(device) for key, t in self._held_out(1500).items()}
        logits = torch.cat([model(part) for part in batch["x"].split(500)])
        return {
            "accuracy": (logits.argmax(-1) == batch["y"]).float().mean().item(),
            "loss": F.cross_entropy(logits, batch["y"]).item(),
        }

    def example(self):
        return self._held_out(1)
