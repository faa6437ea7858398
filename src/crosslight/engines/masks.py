"""Symbolic masks: who may read whom, as a rule over positions instead of a matrix.

A `Mask` answers three questions about query positions i and key positions j, from which every backend is served:
`visible` (element-wise, on index tensors that broadcast), `dense` (the boolean matrix) and `blocks` (for tiles of
queries and keys: may any pair be visible, are all?). Masks combine with ``&``, ``|`` and ``~``:

>>> mask = causal() & window(128) | sink(4)

Python binds ``&`` tighter than ``|``: the line reads "(causal and near) or among the first four".
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

Tile = tuple[Tensor, Tensor, Tensor, Tensor]  # first and last query, first and last key of each tile; they broadcast


class Mask:
    """A rule that says which keys a query may read. Rules are dataclasses, so that `pack` can take them apart."""

    #: All rules by class name, for `unpack`.
    kinds: ClassVar[dict[str, type[Mask]]] = {}

    @property
    def shared(self) -> bool:
        """Whether the rule is the same for every batch entry and head."""
        return False

    @property
    def period(self) -> int:
        """The rule stays the same when query and key move together by a multiple of this; 0 if there is no such."""
        return 0

    def __init_subclass__(cls) -> None:
        Mask.kinds[cls.__name__] = cls

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


@dataclass(frozen=True)
class And(Mask):
    left: Mask
    right: Mask

    @property
    def shared(self):
        return self.left.shared and self.right.shared

    @property
    def period(self):
        return math.lcm(self.left.period, self.right.period)

    def visible(self, b, h, i, j):
        return self.left.visible(b, h, i, j) & self.right.visible(b, h, i, j)

    def blocks(self, tile):
        (some_l, all_l), (some_r, all_r) = self.left.blocks(tile), self.right.blocks(tile)
        return some_l & some_r, all_l & all_r

    def terms(self):
        return self.left.terms() + self.right.terms()


@dataclass(frozen=True)
class Or(Mask):
    left: Mask
    right: Mask

    @property
    def shared(self):
        return self.left.shared and self.right.shared

    @property
    def period(self):
        return math.lcm(self.left.period, self.right.period)

    def visible(self, b, h, i, j):
        return self.left.visible(b, h, i, j) | self.right.visible(b, h, i, j)

    def blocks(self, tile):
        (some_l, all_l), (some_r, all_r) = self.left.blocks(tile), self.right.blocks(tile)
        return some_l | some_r, all_l | all_r


@dataclass(frozen=True)
class Not(Mask):
    inner: Mask

    @property
    def shared(self):
        return self.inner.shared

    @property
    def period(self):
        return self.inner.period

    def visible(self, b, h, i, j):
        return ~self.inner.visible(b, h, i, j)

    def blocks(self, tile):
        some, every = self.inner.blocks(tile)
        return ~every, ~some


@dataclass(frozen=True)
class Causal(Mask):
    """Query i reads keys up to itself: j <= i."""

    shared, period = True, 1

    def visible(self, b, h, i, j):
        return j <= i

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        return j0 <= i1, j1 <= i0


@dataclass(frozen=True)
class Window(Mask):
    """Query i reads keys at most ``radius`` away: |i - j| <= radius; with causal() that is radius + 1 keys."""

    radius: int
    shared, period = True, 1

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
    shared, period = True, 1

    def visible(self, b, h, i, j):
        return (i - j) % self.step == 0

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        nearest, farthest = i0 - j1, i1 - j0  # distances in the tile are all the numbers between these
        some = torch.div(farthest, self.step, rounding_mode="floor") * self.step >= nearest
        single = nearest == farthest
        return some, some & (single | (self.step == 1))


@dataclass(frozen=True)
class SameBlock(Mask):
    """Query i reads the keys of its own block: i // size == j // size."""

    size: int
    shared = True

    @property
    def period(self):
        return self.size

    def visible(self, b, h, i, j):
        return i // self.size == j // self.size

    def blocks(self, tile):
        i0, i1, j0, j1 = (t // self.size for t in tile)
        return (i0 <= j1) & (j0 <= i1), (i0 == i1) & (j0 == j1) & (i0 == j0)


@dataclass(frozen=True)
class Sink(Mask):
    """Every query reads the first ``count`` keys."""

    count: int
    shared = True

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

    def blocks(self, tile):
        some, every = super().blocks(tile)
        i0, i1, j0, j1 = (t.long().view((1,) * (some.dim() - t.dim()) + t.shape) for t in tile)
        q, k = self.queries, self.keys
        # In rising segments, as of packed documents, the ends of a tile bound what lies between.
        rising = (q.diff(dim=1) >= 0).all() & (k.diff(dim=1) >= 0).all()
        q0, q1, k0, k1 = q[:, i0], q[:, i1], k[:, j0], k[:, j1]
        meet = ((q0 <= k1) & (k0 <= q1)).any(0)
        same = ((q0 == k1) & (k0 == q1)).all(0)
        return some & (meet | ~rising), every | (same & rising)


@dataclass(frozen=True, eq=False)
class Keys(Mask):
    """Key padding: ``keep[b, j]`` is True where key j may be read."""

    keep: Bool[Tensor, "batch m"]

    def visible(self, b, h, i, j):
        return self.keep[b, j]

    def blocks(self, tile):
        _, _, j0, j1 = tile
        some, _ = super().blocks(tile)
        count = torch.nn.functional.pad(self.keep.cumsum(1), (1, 0))
        kept = count[:, (j1 + 1).long()] - count[:, j0.long()]
        return some & (kept > 0).any(0), some & (kept == j1 - j0 + 1).all(0)


@dataclass(frozen=True, eq=False)
class Pairs(Mask):
    """An explicit matrix, (#batch, #heads, n, m), True where query i may read key j."""

    keep: Bool[Tensor, "#batch #heads n m"]

    def visible(self, b, h, i, j):
        batch, heads = self.keep.shape[:2]
        return self.keep[b if batch > 1 else torch.zeros_like(b), h if heads > 1 else torch.zeros_like(h), i, j]

    def dense(self, batch, heads, n, m, *, device=None, offset=0):
        return self.keep[:, :, offset : offset + n, :m]


@dataclass(frozen=True)
class Neighbourhood(Mask):
    """Neighbourhood attention over a grid (Hassani et al. 2022, arXiv 2204.07143): query i reads, on each axis, the
    ``kernel`` cells nearest to it among those at a distance that is a multiple of ``dilation``. At a border the window
    moves inwards and keeps its size; on a ``causal`` axis it ends at the query, and is cut at the start. A window
    larger than the axis reads the whole axis.

    Tokens are the cells of ``grid`` in row-major order; ``kernel``, ``dilation`` and ``causal`` hold one value an axis.
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    shared = True

    def window(self, axis: int, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a cell's window on an axis: first and last cell, and the remainder by dilation that its cells share."""
        side, kernel, dilation = self.grid[axis], self.kernel[axis], self.dilation[axis]
        remainder, place = cell % dilation, cell // dilation  # a group of equal remainder, the place in the group
        group = (side - remainder + dilation - 1) // dilation
        if self.causal[axis]:
            first = (place - kernel + 1).clamp(min=0)
            last = place
        else:
            first = torch.minimum(place - kernel // 2, group - kernel).clamp(min=0)
            last = torch.minimum(first + kernel, group) - 1
        return first * dilation + remainder, last * dilation + remainder, remainder

    def cells(self, token: Tensor) -> list[Tensor]:
        """The coordinates of tokens."""
        cells = []
        for axis in range(len(self.grid)):
            inner = math.prod(self.grid[axis + 1 :])
            cells.append(token // inner % self.grid[axis])
        return cells

    def visible(self, b, h, i, j):
        seen = None
        for axis, (query, key) in enumerate(zip(self.cells(i), self.cells(j), strict=True)):
            first, last, remainder = self.window(axis, query)
            near = (first <= key) & (key <= last)
            if self.dilation[axis] > 1:
                near = near & (key % self.dilation[axis] == remainder)
            seen = near if seen is None else seen & near
        return seen

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        some, every = super().blocks(tile)
        inner, reach = math.prod(self.grid[1:]), (self.kernel[0] - 1) * self.dilation[0]
        first, last = i0 // inner - reach, i1 // inner + reach  # holds for every remainder and at the borders
        if self.dilation[0] == 1:
            first, last = self.window(0, i0 // inner)[0], self.window(0, i1 // inner)[1]
        some = some & (first <= j1 // inner) & (j0 // inner <= last)
        if len(self.grid) == 1 and self.dilation[0] == 1:
            every = some & (self.window(0, i1)[0] <= j0) & (j1 <= self.window(0, i0)[1])
        return some, every


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


def same_block(size: int) -> Mask:
    """i // size == j // size."""
    expect(size >= 1, "same_block(size)", size, "a number >= 1")
    return SameBlock(size)


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


def pack(mask: Mask | None) -> tuple[str, list[Tensor]]:
    """A mask as text and tensors, which an operator can take as arguments; `unpack` rebuilds it."""
    tensors: list[Tensor] = []
    return _packed(mask, tensors), tensors


def _packed(value: Any, tensors: list[Tensor]) -> str:
    if isinstance(value, Mask):
        fields = [_packed(getattr(value, name), tensors) for name in value.__dataclass_fields__]  # type: ignore[attr-defined]
        return f'["{type(value).__name__}",{",".join(fields)}]' if fields else f'["{type(value).__name__}"]'
    if isinstance(value, Tensor):
        tensors.append(value)
        return f'{{"tensor":{len(tensors) - 1}}}'
    if isinstance(value, tuple):
        return f"[{','.join([_packed(part, tensors) for part in value])}]"
    if value is None:
        return "null"
    return str(value).lower()  # a number or a truth value


def unpack(text: str, tensors: list[Tensor]) -> Mask | None:
    """The mask that `pack` took apart."""

    def build(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["tensor"]]
        if not isinstance(value, list):
            return value
        if value and isinstance(value[0], str):
            return Mask.kinds[value[0]](*map(build, value[1:]))
        return tuple(map(build, value))

    return build(json.loads(text))
