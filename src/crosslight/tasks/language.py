"""A byte language model over the sources of the running Python's own standard library.

Training reads windows from nine files in ten; held out are windows from the others, chosen by their names.
"""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from crosslight.errors import expect
from crosslight.tasks import data
from crosslight.tasks.base import Size, Task, task
from crosslight.tasks.trunk import LanguageModel


def to_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class ByteModel(Task):
    """Predict each byte of a text from those before it, in windows of ``length`` bytes.

    Subclasses say what is read and what is held out.
    """

    pattern = "causal-self"
    metric = "bits_per_byte"
    higher_is_better = False
    size = Size(dim=64, heads=4, depth=2)
    steps = 400
    batch_size = 16
    lr = 5e-3
    #: Held-out windows, spread evenly over the held-out text.
    test: ClassVar[int] = 128

    def __init__(self, length: int = 64) -> None:
        expect(isinstance(length, int) and length >= 2, "length", repr(length), "an int of at least 2")
        self.length = length

    def texts(self) -> tuple[Tensor, Tensor]:
        """Training text and held-out text, as bytes."""
        raise NotImplementedError

    def batches(self, seed, batch_size):
        text, _ = self.texts()
        for starts in data.drawn(len(text) - self.length, batch_size, seed):
            yield {"tokens": data.windows(text, starts, self.length + 1).long()}

    def _held_out(self) -> Tensor:
        _, text = self.texts()
        last = len(text) - self.length - 1
        count = min(self.test, last + 1)
        starts = torch.arange(count) * (last // max(count - 1, 1))
        return data.windows(text, starts, self.length + 1).long()

    def model(self, entrant, size):
        return LanguageModel(entrant, size, 256, self.length)

    def loss(self, model, batch):
        tokens = batch["tokens"]
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def evaluate(self, model):
        device = next(model.parameters()).device
        tokens = self._held_out().to(device)
        losses = [self.loss(model, {"tokens": part}) * len(part) for part in tokens.split(16)]
        return {"bits_per_byte": (torch.stack(losses).sum() / len(tokens)).item() / math.log(2)}

    def example(self):
        return {"tokens": self._held_out()[:1]}

    def labels(self, example):
        seen = [repr(chr(byte))[1:-1] for byte in example["tokens"][0, :-1].tolist()]
        return {"rows": seen, "columns": seen}


@cache
def library() -> tuple[Tensor, Tensor]:
    """The standard library's sources, training and held-out."""
    train, test = (b"\n".join(path.read_bytes() for path in data.sources(held_out)) for held_out in (False, True))
    return to_bytes(train), to_bytes(test)


@task
class Language(ByteModel):
    """A byte language model over the standard library's sources."""

    name = "language"

    def texts(self):
        return library()
