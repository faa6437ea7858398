"""The position of the largest of n random numbers, which one query token reads: exact, and a matter of choosing."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from crosslight.tasks.base import Size, Task, task
from crosslight.tasks.trunk import Reader


@task
class ArgmaxPosition(Task):
    """Name the position of the largest of ``length`` numbers; chance is 1 / length."""

    name = "argmax-position"
    pattern = "noncausal-cross"
    metric = "accuracy"
    size = Size(dim=32, heads=4, depth=2)
    steps = 600
    batch_size = 64
    lr = 5e-3

    def __init__(self, length: int = 16) -> None:
        self.length = length

    def _batch(self, count: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.randn(count, self.length, generator=draw)
        return {"x": x, "y": x.argmax(1)}

    def batches(self, seed, batch_size):
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield self._batch(batch_size, draw)

    def _held_out(self) -> dict[str, torch.Tensor]:
        return self._batch(512, torch.Generator().manual_seed(2**32 - 1))

    def model(self, entrant, size):
        return Reader(nn.Linear(1, size.dim), entrant, size, self.length, 1, self.length)

    def _logits(self, model, batch):
        return model(batch["x"].unsqueeze(-1)).squeeze(1)

    def loss(self, model, batch):
        return F.cross_entropy(self._logits(model, batch), batch["y"])

    def evaluate(self, model):
        batch = {name: t.to(next(model.parameters()).device) for name, t in self._held_out().items()}
        return {"accuracy": (self._logits(model, batch).argmax(-1) == batch["y"]).float().mean().item()}

    def example(self):
        return {name: t[:1] for name, t in self._held_out().items()}

    def labels(self, example):
        return {"rows": ["query"], "columns": [f"{v:.2f}" for v in example["x"][0].tolist()]}
