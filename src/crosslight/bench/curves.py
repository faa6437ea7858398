"""Reading curves over length: how fast they grow, and where one crosses another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


def growth(curve: Mapping[int, float]) -> float | None:
    """The exponent e of value ~ n^e, by least squares on the logarithms; None for fewer than two lengths."""
    points = [(math.log(n), math.log(value)) for n, value in curve.items() if value > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


@dataclass(frozen=True)
class Crossing:
    """The shortest length at which a method is faster than a baseline.

    ``bound`` is "at" for a crossing between two measured lengths, "at most" where the method is faster from the first
    one on, and "above" where it is slower at all of them.
    """

    length: float
    bound: Literal["at", "at most", "above"]

    def __str__(self) -> str:
        sign = {"at": "", "at most": "≤ ", "above": "> "}[self.bound]
        return f"{sign}{self.length:,.0f}"


def efficiency_length(method: Mapping[int, float], baseline: Mapping[int, float]) -> Crossing | None:
    """Where the time of ``method`` falls below that of ``baseline`` (CAB, arXiv 2210.07661).

    Between two measured lengths the times are taken as straight lines on logarithmic axes. None if they share no
    length.
    """
    shared = sorted(set(method) & set(baseline))
    if not shared:
        return None
    gaps = [(n, math.log(method[n] / baseline[n])) for n in shared]
    if gaps[0][1] < 0:
        return Crossing(shared[0], "at most")
    for (n0, gap0), (n1, gap1) in pairwise(gaps):
        if gap1 < 0:
            return Crossing(n0 * (n1 / n0) ** (gap0 / (gap0 - gap1)), "at")
    return Crossing(shared[-1], "above")
