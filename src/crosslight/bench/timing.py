"""Timing calls against each other: warm, interleaved, and compared pair by pair.

Other work on a machine slows whatever runs at that moment. Calls that take turns suffer alike, so the ratio of two
calls in the same round holds where their times do not; the median over rounds drops the rounds that were disturbed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)

    def ratio(self, baseline: Times) -> float:
        """How many times as long as ``baseline``: the median over the rounds that both took part in."""
        return statistics.median(a / b for a, b in zip(self.rounds, baseline.rounds, strict=True))


def once(call: Call, device: torch.device | str = "cpu") -> float:
    """Seconds of one call; waits for the device."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else None
    if wait:
        wait()
    start = time.perf_counter()
    call()
    if wait:
        wait()
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Call], rounds: int = 7, *, seconds: float = 0.0, device: torch.device | str = "cpu"
) -> dict[str, Times]:
    """Time calls that were warmed up in turns, ``rounds`` times each, and on until ``seconds`` have passed.

    Each round starts with another call, so that none always follows the same one. At most 20 times ``rounds``.
    """
    names, taken = list(calls), {name: [] for name in calls}  # type: ignore[var-annotated]
    start = time.perf_counter()
    for turn in _turns(rounds, seconds, start):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            taken[name].append(once(calls[name], device))
    return {name: Times(tuple(times)) for name, times in taken.items()}


def _turns(rounds: int, seconds: float, start: float) -> Iterator[int]:
    turn = 0
    while turn < rounds or (turn < 20 * rounds and time.perf_counter() - start < seconds):
        yield turn
        turn += 1
