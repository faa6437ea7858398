"""The difference of two keyed values, read by one head: its weights must be able to subtract.

Every example is a set of tokens, each a key and a value. The query names two keys, a and b, and the answer is
value(a) - value(b). All around the entrant is linear and it has one head, so that the sign cannot come from anywhere
but the weights: weights that are positive and sum to 1 explain at most half of the variance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight.tasks.base import Entrant, Size, Task, task
from crosslight.tasks.trunk import attention


class SignedReader(nn.Module):
    """A query made of two keys reads keyed values once: (batch, n), (batch, n, width), (batch, 2) -> (batch, width)."""

    def __init__(self, entrant: Entrant, dim: int, keys: int, width: int) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(keys, dim), nn.Linear(width, dim, bias=False)
        self.plus, self.minus = nn.Embedding(keys, dim), nn.Embedding(keys, dim)
        self.entrant = attention(entrant, Size(dim=dim, heads=1, depth=1))
        self.out = nn.Linear(dim, width)

    def forward(self, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        query = self.plus(asked[:, 0]) + self.minus(asked[:, 1])
        return self.out(self.entrant(query.unsqueeze(1), self.key(keys) + self.value(values)).squeeze(1))


@task
class Subtract(Task):
    """Answer value(a) - value(b) over ``keys`` tokens with values of ``width`` numbers; predicting zero gives r2 0."""

    name = "subtract"
    pattern = "noncausal-cross"
    metric = "r2"
    size = Size(dim=32, heads=1, depth=1)
    steps = 1000
    batch_size = 64
    lr = 1e-2

    def __init__(self, keys: int = 8, width: int = 4) -> None:
        self.keys, self.width = keys, width

    def _batch(self, count: int, draw: torch.Generator) -> dict[str, Tensor]:
        keys = torch.rand(count, self.keys, generator=draw).argsort(1)
        values = torch.randn(count, self.keys, self.width, generator=draw)
        where = torch.rand(count, self.keys, generator=draw).argsort(1)[:, :2]
        a, b = (values[torch.arange(count), where[:, i]] for i in (0, 1))
        return {"keys": keys, "values": values, "asked": keys.gather(1, where), "y": a - b}

    def batches(self, seed, batch_size):
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield self._batch(batch_size, draw)

    def _held_out(self) -> dict[str, Tensor]:
        return self._batch(512, torch.Generator().manual_seed(2**32 - 1))

    def model(self, entrant, size):
        return SignedReader(entrant, size.dim, self.keys, self.width)

    def loss(self, model, batch):
        return F.mse_loss(model(batch["keys"], batch["values"], batch["asked"]), batch["y"])

    def evaluate(self, model):
        batch = {name: t.to(next(model.parameters()).device) for name, t in self._held_out().items()}
        return {"r2": 1 - (self.loss(model, batch) / batch["y"].square().mean()).item()}

    def example(self):
        return {name: t[:1] for name, t in self._held_out().items()}

    def labels(self, example):
        a, b = example["asked"][0].tolist()
        return {"rows": [f"{a} - {b}"], "columns": [str(key) for key in example["keys"][0].tolist()]}
