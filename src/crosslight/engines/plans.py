"""Block plans: which tiles of the attention matrix a mask needs, found without the matrix.

A `Plan` is a list of parts, a `Part` a number of equal tiles, and each of its two sides says which tokens a tile takes:
`Stride` (evenly spaced spans, read in place) or `Index` (listed units of tokens, gathered). Planners:

- `plan`: blocks of queries with the blocks of keys that `Mask.blocks` lets through. Bands become strides.
- `neighbourhoods`: boxes of a grid with the box around all their windows.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslight.engines.masks import And, Causal, Keys, Mask, Neighbourhood, join, pack

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True)
class Stride:
    """Tile t takes the tokens start + t * step, ..., start + t * step + rows - 1."""

    start: int
    step: int
    rows: int

    #: Tokens per unit, as of `Index`.
    unit = 1

    def take(self, x: Tensor, first: int, stop: int) -> Tensor:
        """Of x (s, length, dim), contiguous: (s, stop - first, rows, dim), a view."""
        return self._view(x, first, stop, 0, self.rows)

    def add_(self, x: Tensor, first: int, stop: int, y: Tensor) -> None:
        """Add y, (s, stop - first, rows, dim), to the tokens of x that it stands for."""
        step = self.step if stop - first > 1 else self.rows
        for begin in range(0, self.rows, step):  # spans overlap, pieces of one step do not
            piece = y[:, :, begin : begin + step]
            self._view(x, first, stop, begin, piece.shape[2]).add_(piece)

    def positions(self, first: int, stop: int, device: torch.device) -> Int[Tensor, "tiles rows"]:
        tile = torch.arange(first, stop, device=device, dtype=torch.int32)
        return self.start + tile[:, None] * self.step + torch.arange(self.rows, device=device, dtype=torch.int32)

    def _view(self, x: Tensor, first: int, stop: int, begin: int, rows: int) -> Tensor:
        offset = x.storage_offset() + (self.start + first * self.step + begin) * x.stride(1)
        size = (x.shape[0], stop - first, rows, x.shape[2])
        return x.as_strided(size, (x.stride(0), self.step * x.stride(1), x.stride(1), 1), offset)


@dataclass(frozen=True, eq=False)
class Index:
    """Tile t takes the units index[t], each of ``unit`` tokens in sequence; -1 is an empty place."""

    index: Int[Tensor, "tiles places"]
    unit: int

    @property
    def rows(self) -> int:
        return self.index.shape[1] * self.unit

    def _flat(self, x: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """x as a table of units, and the places of the tiles in it."""
        units = x.shape[1] // self.unit
        index = self.index[first:stop].clamp(min=0).flatten().to(x.device)
        index = (torch.arange(x.shape[0], device=x.device)[:, None] * units + index).flatten()
        return x.view(x.shape[0] * units, self.unit * x.shape[2]), index

    def take(self, x: Tensor, first: int, stop: int) -> Tensor:
        table, index = self._flat(x, first, stop)
        return table.index_select(0, index).view(x.shape[0], stop - first, self.rows, x.shape[2])

    def add_(self, x: Tensor, first: int, stop: int, y: Tensor) -> None:
        """As `Stride.add_`; y must be zero in empty places."""
        table, index = self._flat(x, first, stop)
        table.index_add_(0, index, y.reshape(index.shape[0], -1))

    def positions(self, first: int, stop: int, device: torch.device) -> Int[Tensor, "tiles rows"]:
        index = self.index[first:stop].to(device, torch.int32)
        token = index[..., None] * self.unit + torch.arange(self.unit, device=device, dtype=torch.int32)
        return token.masked_fill(index[..., None] < 0, -1).flatten(1)


Side = Stride | Index


@dataclass(frozen=True)
class Part:
    """``count`` tiles of equal shape."""

    count: int
    queries: Side
    keys: Side
    #: The mask lets all pairs through.
    whole: bool = False

    @property
    def area(self) -> int:
        """Scores of one tile."""
        return self.queries.rows * self.keys.rows

    @property
    def step(self) -> int:
        """By how much query and key move together from tile to tile; 0 if they do not."""
        q, k = self.queries, self.keys
        return q.step if isinstance(q, Stride) and isinstance(k, Stride) and q.step == k.step else 0


@dataclass(frozen=True)
class Plan:
    """The tiles that hold every visible pair; each query lies in at most one tile."""

    parts: tuple[Part, ...]
    #: Keys must be padded to a multiple of this.
    unit: int

    @property
    def area(self) -> int:
        """Scores that are computed for a head."""
        return sum(part.count * part.area for part in self.parts)

    @property
    def work(self) -> float:
        """What it costs, in scores: a row that is moved costs about as much as 32 scores."""
        return sum(part.count * (part.area + 32 * (part.queries.rows + part.keys.rows)) for part in self.parts)


#: Block sizes that are tried where the caller names none.
SIZES = (32, 64, 128, 256)
#: Strides of fewer tiles than this are gathered with the other blocks instead.
SHORTEST = 3
_plans: OrderedDict[tuple, Plan] = OrderedDict()


def plan(
    mask: Mask | None, causal: bool, n: int, m: int, block_q: int | None = None, block_k: int | None = None
) -> Plan:
    """The tiles of a mask, at a cost of (n / block) * (m / block). Plans of masks without tensors are kept.

    Args:
        mask: any rule. Rules that hold tensors are read once for all batch entries and heads together,
            key padding not at all.
        causal: also j <= i.
        block_q, block_k: the sides of the blocks; the best of a few if not given.
    """
    # Padding leaves few blocks out, and a plan without it can be kept.
    mask = join(*[term for term in _conjuncts(mask) if not isinstance(term, Keys)])
    text, tensors = pack(mask)
    key = (text, causal, n, m, block_q, block_k)
    if not tensors and key in _plans:
        return _plans[key]
    rule = join(Causal() if causal else None, mask)
    made = neighbourhoods(rule, n, m) if block_q is None else None
    if made is None:
        sizes = [(block_q, block_k or block_q)] if block_q is not None else _sizes(n, m)
        made = min((_blocks(rule, n, m, q, k) for q, k in sizes), key=lambda p: p.work)
    if not tensors:
        _plans[key] = made
        if len(_plans) > 256:
            _plans.popitem(last=False)
    return made


def _sizes(n: int, m: int) -> list[tuple[int, int]]:
    # Small blocks of a long sequence would make the table of blocks itself large.
    sizes = [size for size in SIZES if n * m // size**2 <= 1 << 20 and size < 2 * max(n, m)]
    return [(size, size) for size in sizes or SIZES[-1:]]


def block_table(mask: Mask | None, n: int, m: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """For each block of queries and keys: may any pair be visible, are all? Two boolean matrices."""
    device = next(iter(pack(mask)[1]), torch.empty(0)).device
    i0 = torch.arange(0, n, block_q, device=device)[:, None]
    j0 = torch.arange(0, m, block_k, device=device)
    i1, j1 = (i0 + block_q).clamp(max=n) - 1, (j0 + block_k).clamp(max=m) - 1
    shape = (i0.shape[0], j0.shape[0])
    if mask is None:
        every = torch.ones(shape, dtype=torch.bool)
        return every, every
    some, every = mask.blocks((i0, i1, j0, j1))
    return some.expand(shape).cpu(), every.expand(shape).cpu()


def _blocks(mask: Mask | None, n: int, m: int, block_q: int, block_k: int) -> Plan:
    some, every = block_table(mask, n, m, block_q, block_k)
    every = every & (torch.arange(some.shape[1]) < m // block_k)  # the last block may stick out
    counts = some.sum(1)
    first = some.int().argmax(1)
    last = some.shape[1] - 1 - some.flip(1).int().argmax(1)
    whole = (every | ~some).all(1)
    full = m // block_k * block_k
    # Blocks of queries that read one span of keys at one distance from them can be read in place.
    spans: dict[tuple[int, int], list[int]] = {}
    lists: list[int] = []
    rows = zip(counts.tolist(), first.tolist(), last.tolist(), strict=True)
    for block, (count, low, high) in enumerate(rows):
        if count == 0:
            continue
        if (block + 1) * block_q > n:  # a shorter block stands alone
            lists.append(block)
        elif count == high - low + 1 and (high + 1) * block_k <= full:
            spans.setdefault((count, low * block_k - block * block_q), []).append(block)
        else:
            lists.append(block)
    parts = []
    for (count, distance), blocks in spans.items():
        step = blocks[1] - blocks[0] if len(blocks) > 1 else 1
        if len(blocks) < SHORTEST or any(b - a != step for a, b in itertools.pairwise(blocks)):
            lists += blocks
            continue
        queries = Stride(blocks[0] * block_q, step * block_q, block_q)
        keys = Stride(queries.start + distance, queries.step, count * block_k)
        parts.append(Part(len(blocks), queries, keys, bool(whole[blocks].all())))
    parts += _listed(some, counts, whole, sorted(lists), n, block_q, block_k)
    return Plan(tuple(parts), block_k)


def _listed(
    some: Tensor, counts: Tensor, whole: Tensor, blocks: Sequence[int], n: int, block_q: int, block_k: int
) -> list[Part]:
    """Parts that gather their keys, with blocks of queries that read about as many keys in one part."""
    if not blocks:
        return []
    grain = max(1, math.ceil(int(counts.max()) / 8))
    classes: dict[tuple[int, bool], list[int]] = {}
    for block in blocks:
        short = (block + 1) * block_q > n
        classes.setdefault((math.ceil(int(counts[block]) / grain), short), []).append(block)
    parts = []
    for (_, short), members in classes.items():
        chosen = torch.tensor(members)
        width = int(counts[chosen].max())
        # Sorting puts the block numbers that are read first, in their order.
        numbers = torch.arange(some.shape[1]).expand(len(members), -1)
        keys = numbers.masked_fill(~some[chosen], some.shape[1]).sort(1).values[:, :width]
        keys = keys.masked_fill(keys == some.shape[1], -1)
        even = bool((counts[chosen] == width).all())
        if short:
            queries: Side = Stride(members[0] * block_q, block_q, n - members[0] * block_q)
        elif len(members) == 1 or bool((chosen.diff() == members[1] - members[0]).all()):
            step = members[1] - members[0] if len(members) > 1 else 1
            queries = Stride(members[0] * block_q, step * block_q, block_q)
        else:
            queries = Index(chosen[:, None] * block_q + torch.arange(block_q), 1)
        parts.append(Part(len(members), queries, Index(keys, block_k), even and bool(whole[chosen].all())))
    return parts


def _conjuncts(mask: Mask | None) -> tuple[Mask, ...]:
    if isinstance(mask, And):
        return _conjuncts(mask.left) + _conjuncts(mask.right)
    return () if mask is None else (mask,)


#: Side of a box of queries by the rank of the grid.
BOX = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


def neighbourhoods(mask: Mask | None, n: int, m: int) -> Plan | None:
    """Boxes of queries with the boxes around their windows, where the mask is a neighbourhood with more than a plain
    band in it; None for any other mask."""
    found = [term for term in _conjuncts(mask) if isinstance(term, Neighbourhood)]
    if not found or n != m or len(found[0].grid) > 3 or (len(found[0].grid) == 1 and found[0].dilation[0] == 1):
        return None
    rule = found[0]
    sides = [_boxes(rule, axis, BOX[len(rule.grid)][axis]) for axis in range(len(rule.grid))]
    queries, keys = sides[0]
    for axis in range(1, len(sides)):
        side = rule.grid[axis]
        queries, keys = (_product(a, b, side) for a, b in zip((queries, keys), sides[axis], strict=True))
    return Plan((Part(queries.shape[0], Index(queries, 1), Index(keys, 1)),), 1)


def _product(outer: Tensor, inner: Tensor, side: int) -> Tensor:
    """Every tile of the outer axes with every tile of the next one, (tiles, tokens)."""
    a, b = outer[:, None, :, None], inner[None, :, None, :]
    token = (a * side + b).masked_fill((a < 0) | (b < 0), -1)
    return token.flatten(2).flatten(0, 1)


def _boxes(rule: Neighbourhood, axis: int, size: int) -> tuple[Tensor, Tensor]:
    """The tiles of one axis: their queries and the keys around all their windows, (tiles, cells), -1 where empty."""
    side, dilation = rule.grid[axis], rule.dilation[axis]
    queries, keys = [], []
    for remainder in range(min(dilation, side)):  # cells of different remainder do not meet
        group = torch.arange(remainder, side, dilation)
        first, last, _ = rule.window(axis, group)
        # Tiles of about equal size, so that little is padded.
        for cells in group.chunk(math.ceil(len(group) / size)):
            at = slice((int(cells[0]) - remainder) // dilation, (int(cells[-1]) - remainder) // dilation + 1)
            queries.append(cells)
            keys.append(torch.arange(int(first[at].min()), int(last[at].max()) + 1, dilation))
    return _padded(queries), _padded(keys)


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
