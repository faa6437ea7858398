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


#: Parts of the standard library that are tests, applications or copies of other projects.
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils"}


@cache
def sources(held_out: bool) -> tuple[Path, ...]:
    """Source files of the running Python's standard library, sorted by name.

    One in ten is held out, chosen by its name, so that the split is the same on every machine.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    names = [name for name in names if not LEFT_OUT & set(name.parts)]
    expect(len(names) > 100, "standard library", f"{len(names)} source files", "the .py sources of the running Python")
    return tuple(root / name for name in names if (zlib.crc32(name.as_posix().encode()) % 10 == 0) == held_out)
