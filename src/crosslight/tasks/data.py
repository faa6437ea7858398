"""What the tasks share: the order of training examples, windows of a stream, the standard library's sources."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from crosslight.errors import expect


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches without end: every example once an epoch, in an order that depends on the seed alone."""
    order = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, count)
    while True:
        epoch = torch.randperm(count, generator=order)
        yield from epoch[: count - count % batch_size].split(batch_size)


def drawn(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Random numbers below ``count`` without end, for the starts of windows."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(count, (batch_size,), generator=order)


def windows(stream: Tensor, starts: Tensor, length: int) -> Tensor:
    """(len(starts), length): windows of a stream of tokens."""
    return stream[starts[:, None] + torch.arange(length)]


def held_out(path: Path) -> bool:
    """One file in ten, chosen by its name, so that the split is the same on every machine and in every version."""
    return zlib.crc32(path.name.encode()) % 10 == 0


@cache
def sources() -> tuple[Path, ...]:
    """The top-level modules of the running Python's standard library, sorted by name."""
    found = tuple(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    expect(len(found) > 20, "standard library", f"{len(found)} source files", "the .py sources of the running Python")
    return found
