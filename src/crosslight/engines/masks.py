"""Symbolic masks: who may read whom, as a rule over positions instead of a matrix.

A `Mask` answers three questions about query positions i and key positions j, from which every backend is served:
`visible` (element-wise, on index tensors that broadcast), `dense` (the boolean matrix) and `blocks` (for tiles of
queries and keys: may any pair be visible, are all?). Masks combine with ``&``, ``|`` and ``~``:

>>> mask = causal() & window(128) | sink(4)

Python binds ``&`` tighter than ``|``: the line reads "(causal and near) or among the first four".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

Tile = tuple[Tensor, Tensor, Tensor, Tensor]  # first and last query, first and last key of each tile; they broadcast


class Mask:
    """A rule that says which keys a query may read."""

    def visible(
        self, b: Int[Tensor, "*b"], h: Int[Tensor, "*h"], i: Int[Tensor, "*i"], j: Int[Tensor, "*j"]
    ) -> Bool[Tensor, "..."]:
        """Whether query ``i`` may read key ``j``, for index tensors of batch, head, query and key that broadcast."""
        raise NotImplementedError

    def blocks(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """For each tile: may any pair be visible, and are all pairs visible? Both answers err to the safe side."""
        some = torch.ones(torch.broadcast_shapes(*(t.shape for t in tile)), dtype=torch.bool, device=tile[0].device)
        return some, torch.zeros_like(some)

    def dense(
        self, batch: int, heads: int, n: int, m: int, *, device: torch.device | None = None, offset: int = 0
    ) -> Bool[Tensor, "#batch #heads n m"]:
        """The matrix of the rule; ``offset`` is the position of the first query (decoding). Batch and head axes
        stay of size 1 where the rule does not depend on them."""
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(-1, 1, 1)
        i = torch.arange(offset, offset + n, device=device).view(-1, 1)
        j = torch.arange(m, device=device)
        seen = self.visible(b, h, i, j)
        while seen.dim() < 4:
            seen = seen.unsqueeze(0)
        return seen.expand(*seen.shape[:2], n, m)

    def terms(self) -> tuple[Mask, ...]:
        """The rules whose conjunction this is."""
        return (self,)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)


@dataclass(frozen=True, eq=False)
class And(Mask):
    left: Mask
    right: Mask

    def visible(self, b, h, i, j):
        return self.left.visible(b, h, i, j) & self.right.visible(b, h, i, j)

    def blocks(self, tile):
        (some_l, all_l), (some_r, all_r) = self.left.blocks(tile), self.right.blocks(tile)
        return some_l & some_r, all_l & all_r

    def terms(self):
        return self.left.terms() + self.right.terms()


@dataclass(frozen=True, eq=False)
class Or(Mask):
    left: Mask
    right: Mask

    def visible(self, b, h, i, j):
        return self.left.visible(b, h, i, j) | self.right.visible(b, h, i, j)

    def blocks(self, tile):
        (some_l, all_l), (some_r, all_r) = self.left.blocks(tile), self.right.blocks(tile)
        return some_l | some_r, all_l | all_r


@dataclass(frozen=True, eq=False)
class Not(Mask):
    inner: Mask

    def visible(self, b, h, i, j):
        return ~self.inner.visible(b, h, i, j)

    def blocks(self, tile):
        some, every = self.inner.blocks(tile)
        return ~every, ~some


@dataclass(frozen=True)
class Causal(Mask):
    """Query i reads keys up to itself: j <= i."""

    def visible(self, b, h, i, j):
        return j <= i

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        return j0 <= i1, j1 <= i0


@dataclass(frozen=True)
class Window(Mask):
    """Query i reads keys at most ``radius`` away: |i - j| <= radius; with causal() that is radius + 1 keys."""

    radius: int

    def visible(self, b, h, i, j):
        return (i - j).abs() <= self.radius

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        some = (i0 - j1 <= self.radius) & (j0 - i1 <= self.radius)
        return some, (i1 - j0 <= self.radius) & (j1 - i0 <= self.radius)


@dataclass(frozen=True)
class Dilated(Mask):
    """Query i reads keys whose distance is a multiple of ``step``."""

    step: int

    def visible(self, b, h, i, j):
        return (i - j) % self.step == 0


@dataclass(frozen=True)
class Sink(Mask):
    """Every query reads the first ``count`` keys."""

    count: int

    def visible(self, b, h, i, j):
        return (j < self.count) & (i >= 0)

    def blocks(self, tile):
        i0, _, j0, j1 = tile
        return (j0 < self.count) & (i0 >= 0), (j1 < self.count) & (i0 >= 0)


@dataclass(frozen=True, eq=False)
class Segments(Mask):
    """Query i reads keys of its own segment (documents packed into one row)."""

    queries: Int[Tensor, "batch n"]
    keys: Int[Tensor, "batch m"]

    def visible(self, b, h, i, j):
        return self.queries[b, i] == self.keys[b, j]


@dataclass(frozen=True, eq=False)
class Keys(Mask):
    """Key padding: ``keep[b, j]`` is True where key j may be read."""

    keep: Bool[Tensor, "batch m"]

    def visible(self, b, h, i, j):
        return self.keep[b, j]


@dataclass(frozen=True, eq=False)
class Pairs(Mask):
    """An explicit matrix, (#batch, #heads, n, m), True where query i may read key j."""

    keep: Bool[Tensor, "#batch #heads n m"]

    def visible(self, b, h, i, j):
        batch, heads = self.keep.shape[:2]
        return self.keep[b if batch > 1 else torch.zeros_like(b), h if heads > 1 else torch.zeros_like(h), i, j]

    def dense(self, batch, heads, n, m, *, device=None, offset=0):
        return self.keep[:, :, offset : offset + n, :m]


def causal() -> Mask:
    """j <= i."""
    return Causal()


def window(radius: int) -> Mask:
    """|i - j| <= radius."""
    expect(radius >= 0, "window(radius)", radius, "a number >= 0")
    return Window(radius)


def dilated(step: int) -> Mask:
    """(i - j) is a multiple of step; combine with `window`."""
    expect(step >= 1, "dilated(step)", step, "a number >= 1")
    return Dilated(step)


def sink(count: int) -> Mask:
    """j < count."""
    expect(count >= 0, "sink(count)", count, "a number >= 0")
    return Sink(count)


def segments(queries: Int[Tensor, "batch n"], keys: Int[Tensor, "batch m"] | None = None) -> Mask:
    """Both in the same segment; ``keys`` defaults to ``queries``."""
    return Segments(queries, queries if keys is None else keys)


def keys(keep: Bool[Tensor, "batch m"]) -> Mask:
    """Key padding, True = may be read."""
    expect(keep.dim() == 2 and keep.dtype == torch.bool, "keys(keep)", _seen(keep), "a bool tensor (batch, m)")
    return Keys(keep)


def _seen(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"


def as_mask(mask: Mask | Tensor | None, *, batch: int, heads: int, n: int, m: int) -> Mask | None:
    """Check a user's mask and give it its symbolic form.

    A tensor is boolean, True = may be read: (batch, m) for key padding, (batch, n, m) or (batch, heads, n, m).
    """
    if mask is None or isinstance(mask, Mask):
        for term in mask.terms() if mask is not None else ():
            if isinstance(term, Keys):
                expect(
                    tuple(term.keep.shape) == (batch, m), "mask", _seen(term.keep), f"bool (batch, m) = ({batch}, {m})"
                )
        return mask
    shapes = ((batch, m), (batch, n, m), (batch, heads, n, m), (batch, 1, n, m), (1, 1, n, m), (1, heads, n, m))
    expect(
        mask.dtype == torch.bool and tuple(mask.shape) in shapes,
        "mask",
        _seen(mask),
        f"bool (batch, m) = ({batch}, {m}), (batch, n, m) = ({batch}, {n}, {m}) or (batch, heads, n, m)",
    )
    if mask.dim() == 2:
        return Keys(mask)
    return Pairs(mask.unsqueeze(1) if mask.dim() == 3 else mask)


def split(mask: Mask | None) -> tuple[bool, Bool[Tensor, "batch m"] | None, Mask | None]:
    """A mask as its causal flag, its key padding and the rest, for backends that have a fast path for each."""
    is_causal, keep, rest = False, None, None
    for term in mask.terms() if mask is not None else ():
        if isinstance(term, Causal):
            is_causal = True
        elif isinstance(term, Keys):
            keep = term.keep if keep is None else keep & term.keep
        else:
            rest = term if rest is None else rest & term
    return is_causal, keep, rest


def join(*masks: Mask | None) -> Mask | None:
    """The conjunction of the masks that are given."""
    joined = None
    for mask in masks:
        if mask is not None:
            joined = mask if joined is None else joined & mask
    return joined
