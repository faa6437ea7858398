"""Handwritten digits as 64 pixel tokens: the 8 x 8 images that scikit-learn ships (1,797; a fifth held out)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from crosslight.errors import require
from crosslight.tasks import data
from crosslight.tasks.base import Size, Task, task
from crosslight.tasks.trunk import Pooled


@cache
def load() -> tuple[Tensor, Tensor]:
    """(1797, 64) grey values from 0 to 1 and the digits, in a fixed random order."""
    digits = require("sklearn.datasets", "compare").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]


@task
class Digits(Task):
    """Which digit do 64 pixel tokens show? Each token is one grey value; only its position says where it stands."""

    name = "digits"
    pattern = "noncausal-self"
    metric = "accuracy"
    size = Size(dim=32, heads=4, depth=2)
    steps = 300
    batch_size = 32
    lr = 1e-2
    test = 360

    def batches(self, seed, batch_size):
        x, y = load()
        x, y = x[self.test :], y[self.test :]
        for index in data.shuffled(len(x), batch_size, seed):
            yield {"x": x[index], "y": y[index]}

    def model(self, entrant, size):
        return Pooled(torch.nn.Linear(1, size.dim), entrant, size, length=64, out=10, grid=(8, 8))

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"].unsqueeze(-1)), batch["y"])

    def evaluate(self, model):
        device = next(model.parameters()).device
        x, y = (t[: self.test].to(device) for t in load())
        logits = model(x.unsqueeze(-1))
        return {
            "accuracy": (logits.argmax(-1) == y).float().mean().item(),
            "loss": F.cross_entropy(logits, y).item(),
        }

    def example(self):
        x, y = load()
        return {"x": x[:1], "y": y[:1]}

    def labels(self, example):
        pixels = [f"({i // 8}, {i % 8})" for i in range(64)]
        return {"rows": pixels, "columns": pixels, "image": example["x"].view(8, 8)}
