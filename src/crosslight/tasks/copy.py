"""Copying: the decoder writes the context out again, token by token. The exact answer needs the right one of m tokens
at every step."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from crosslight.tasks.base import Size, Task, task
from crosslight.tasks.trunk import EncoderDecoder


@task
class Copy(Task):
    """Copy ``length`` random symbols of ``symbols``; accuracy over the symbols, chance is 1 / symbols."""

    name = "copy"
    pattern = "causal-cross"
    metric = "accuracy"
    size = Size(dim=32, heads=4, depth=2)
    steps = 300
    batch_size = 32
    lr = 5e-3

    def __init__(self, length: int = 32, symbols: int = 16) -> None:
        self.length, self.symbols = length, symbols

    def _batch(self, count: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
        return {"source": torch.randint(1, self.symbols + 1, (count, self.length), generator=draw)}

    def batches(self, seed, batch_size):
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield self._batch(batch_size, draw)

    def _held_out(self) -> dict[str, torch.Tensor]:
        return self._batch(128, torch.Generator().manual_seed(2**32 - 1))

    def model(self, entrant, size):
        return EncoderDecoder(entrant, size, self.symbols + 1, self.length, self.length)

    def _logits(self, model, batch):
        return model(batch["source"], F.pad(batch["source"][:, :-1], (1, 0)))

    def loss(self, model, batch):
        return F.cross_entropy(self._logits(model, batch).flatten(0, 1), batch["source"].flatten())

    def evaluate(self, model):
        batch = {"source": self._held_out()["source"].to(next(model.parameters()).device)}
        return {"accuracy": (self._logits(model, batch).argmax(-1) == batch["source"]).float().mean().item()}

    def example(self):
        return {"source": self._held_out()["source"][:1]}

    def labels(self, example):
        symbols = [str(s) for s in example["source"][0].tolist()]
        return {"rows": symbols, "columns": symbols}
