"""What mechanisms that cut a grid into groups share: the cutting, and attention of each group on its own keys.

A `Cut` says which tokens form a group. `attend` runs softmax attention of the queries of each group on the listed keys
of that group, with any mask asked for these pairs alone, so that nothing of the size of the matrix is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslight.engines import dense, masks
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Grid
from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Heads = Float[Tensor, "batch heads n dim"]


def plane(grid: Grid | None, n: int) -> tuple[int, int]:
    """The grid as (height, width); tokens without a grid are one row."""
    if grid is None:
        return 1, n
    expect(len(grid) == 2, "grid", grid, "(height, width)")
    return int(grid[0]), int(grid[1])


@dataclass(frozen=True)
class Cut:
    """A grid cut into ``count`` groups an axis, each of ``size`` cells an axis.

    A group is a window of neighbours, or with ``spread`` the cells at equal distances of ``count`` over the whole axis.
    The grid is filled up to whole groups at its end.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    spread: bool = False

    @property
    def count(self) -> tuple[int, int]:
        return math.ceil(self.grid[0] / self.size[0]), math.ceil(self.grid[1] / self.size[1])

    @property
    def whole(self) -> bool:
        """Whether no group has an empty place."""
        return self.grid[0] % self.size[0] == 0 and self.grid[1] % self.size[1] == 0

    def members(self, device: torch.device) -> Int[Tensor, "groups cells"]:
        """The tokens of each group in reading order, -1 in places beyond the grid."""
        sides = []
        for side, size, count in zip(self.grid, self.size, self.count, strict=True):
            group, place = torch.arange(count, device=device)[:, None], torch.arange(size, device=device)
            cell = group + place * count if self.spread else group * size + place
            sides.append(torch.where(cell < side, cell, -1))
        rows, columns = sides[0][:, None, :, None], sides[1][None, :, None, :]
        token = torch.where((rows >= 0) & (columns >= 0), rows * self.grid[1] + columns, -1)
        return token.flatten(2).flatten(0, 1)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token: the number of its group, and its row and column in the group."""
        token = torch.arange(self.grid[0] * self.grid[1], device=device)
        number, inside = [], []
        for axis, cell in enumerate((token // self.grid[1], token % self.grid[1])):
            size, count = self.size[axis], self.count[axis]
            number.append(cell % count if self.spread else cell // size)
            inside.append(cell // count if self.spread else cell % size)
        return number[0] * self.count[1] + number[1], inside[0], inside[1]


def of_offsets(
    table: Float[Tensor, "heads offsets offsets"], dy: Int[Tensor, "*pairs"], dx: Int[Tensor, "*pairs"]
) -> Float[Tensor, " heads *pairs"]:
    """The entries of a table of the offsets 1 - side to side - 1 on both axes."""
    index = (dy + table.shape[1] // 2) * table.shape[2] + dx + table.shape[2] // 2
    return table.flatten(1).index_select(1, index.flatten()).unflatten(1, index.shape)


def inside(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column offsets of each pair of places in a group of this size."""
    place = torch.arange(size[0] * size[1], device=device)
    row, column = place // size[1], place % size[1]
    return row[:, None] - row, column[:, None] - column


def take(x: Heads, tokens: Int[Tensor, "groups cells"]) -> Float[Tensor, "batch heads groups cells dim"]:
    """The listed tokens; empty places hold the first token."""
    # Heads are cut out of a stream, whose tokens lie in one piece: so they are copied, and `attend` need not again.
    listed = x.transpose(1, 2).index_select(1, tokens.clamp(min=0).flatten())
    return listed.unflatten(1, tokens.shape).permute(0, 3, 1, 2, 4)


def put_back(y: Float[Tensor, "batch heads groups cells dim"], tokens: Int[Tensor, "groups cells"], n: int) -> Heads:
    """The inverse of `take`, where each of the n tokens is listed once."""
    place = tokens.new_empty(n + 1)
    place[tokens.flatten()] = torch.arange(tokens.numel(), device=tokens.device)  # empty places go to the last one
    return y.flatten(2, 3).transpose(1, 2).index_select(1, place[:n]).transpose(1, 2)


def visible(
    mask: Mask | None, queries: Int[Tensor, "groups cells"], keys: Int[Tensor, "groups listed"], batch: int, heads: int
) -> Bool[Tensor, "#batch groups #heads #cells listed"]:
    """Which listed keys a query may read."""
    i, j = queries[:, None, :, None], keys[:, None, None, :]
    b = torch.arange(batch, device=queries.device).view(-1, 1, 1, 1, 1)
    h = torch.arange(heads, device=queries.device).view(-1, 1, 1)
    there = (j >= 0)[None]
    if mask is None:
        return there
    return there & mask.visible(b, h, i.clamp(min=0), j.clamp(min=0))


def attend(
    q: Heads,
    k: Float[Tensor, "batch heads groups listed dim"],
    v: Float[Tensor, "batch heads groups listed dim"],
    queries: Int[Tensor, "groups cells"],
    keys: Int[Tensor, "groups listed"],
    *,
    mask: Mask | None = None,
    bias: Float[Tensor, "heads cells listed"] | None = None,
    whole: bool = False,
    scale: float | None = None,
) -> Heads:
    """softmax(q k^T * scale + bias) v inside each group.

    Args:
        q: (batch, heads, n, dim), each token of which is listed once in ``queries``.
        k, v: what `take` gives for ``keys``, to which a mechanism may have added something.
        queries, keys: token numbers, -1 for an empty place.
        whole: there are no empty places.
        scale: 1/sqrt(dim) unless given.
    """
    batch, heads, n = q.shape[:3]
    grouped = take(q, queries).transpose(1, 2).flatten(0, 1)
    k, v = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    pairs = None
    if mask is not None or not whole:
        seen = visible(mask, queries, keys, batch, heads)
        seen = seen.expand(batch, len(queries), *seen.shape[2:3], queries.shape[1], keys.shape[1])
        pairs = masks.Pairs(seen.flatten(0, 1))
    y = dense.attend(grouped, k, v, mask=pairs, bias=None if bias is None else bias[None], scale=scale)
    return put_back(y.unflatten(0, (batch, -1)).transpose(1, 2), queries, n)
