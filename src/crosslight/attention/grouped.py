"""What mechanisms that cut a grid into groups share: the cutting, and attention of each group on its own keys.

A `Cut` says which tokens form a group. `attend` runs softmax attention of the queries of each group on the listed keys
of that group, with any mask asked for these pairs alone, so that nothing of the size of the matrix is built.
`GroupCore` is attention of each group on itself, of which a mechanism says how tokens are grouped and what is added to
the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslight.attention.base import AttentionLayer, Core, How
from crosslight.engines import dense, masks
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Grid
from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Heads = Float[Tensor, "batch heads n dim"]
    Stream = Float[Tensor, "batch n dim"]
    Groups = Float[Tensor, "batch*groups cells dim"]


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

    def split(self, x: Stream) -> Groups:
        """The tokens of each group in reading order, zeros in places beyond the grid."""
        cells = x.unflatten(1, self.grid)
        down, right = (count * size - side for count, size, side in zip(self.count, self.size, self.grid, strict=True))
        if down or right:  # padding by nothing would copy
            cells = F.pad(cells, (0, 0, 0, right, 0, down))
        cells = cells.unflatten(2, self._axis(1)).unflatten(1, self._axis(0))
        return cells.permute(self._order()).reshape(-1, self.size[0] * self.size[1], x.shape[2])

    def join(self, y: Groups) -> Stream:
        """The inverse of `split`."""
        cells = y.reshape(-1, *self.count, *self.size, y.shape[-1])
        back = sorted(range(6), key=self._order().__getitem__)
        cells = cells.permute(back).flatten(3, 4).flatten(1, 2)
        height, width = self.grid
        return (cells if self.whole else cells[:, :height, :width]).flatten(1, 2)

    def _axis(self, axis: int) -> tuple[int, int]:
        """How the cells of an axis are laid out: by place and group, or by group and place."""
        return (self.size[axis], self.count[axis]) if self.spread else (self.count[axis], self.size[axis])

    def _order(self) -> tuple[int, ...]:
        """Of (batch, rows as `_axis`, columns as `_axis`, dim): batch, groups, places, dim."""
        return (0, 2, 4, 1, 3, 5) if self.spread else (0, 1, 3, 2, 4, 5)

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


class GroupLayer(AttentionLayer):
    """`AttentionLayer` around a `GroupCore`, whose stream is put into groups once, in place of queries, keys, values
    and output one by one."""

    core: GroupCore

    def _forward(self, x, context, how):
        cut = self.core.cut(x.shape[1], how.grid)
        plain = how.mask is None and not how.causal and self.position is None
        if not (plain and cut.whole) or forced() == "reference":
            return super()._forward(x, context, how)
        groups = cut.split(x)
        q, k, v = self._heads(groups, groups, How())
        return cut.join(self._merge(self.core.within(q, k, v, cut.size), groups))


class GroupCore(Core):
    """softmax(q_i K_g^T / sqrt(d) + B) V_g of the tokens of the own group g; q, k, v (batch, heads, n, d).

    Args:
        side: cells of a group on an axis; at most the side of the grid.
        spread: groups of cells at equal distances in place of windows.
    """

    takes_grid = True
    layer = GroupLayer

    def __init__(self, heads: int, head_dim: int, side: int, spread: bool = False) -> None:
        super().__init__(heads, head_dim)
        self._side, self._spread = side, spread

    def biases(self, size: tuple[int, int]) -> Float[Tensor, "heads offsets offsets"] | None:
        """B for the offsets 1 - side to side - 1 on both axes of a group, if the mechanism has one."""
        return None

    def cut(self, n: int, grid: Grid | None = None) -> Cut:
        """The groups of a map."""
        height, width = plane(grid, n)
        return Cut((height, width), (min(self._side, height), min(self._side, width)), self._spread)

    def within(self, q: Heads, k: Heads, v: Heads, size: tuple[int, int]) -> Heads:
        """Attention of groups, which are the batch."""
        bias = self._inside(size, q.device)
        return dense.attend(q, k, v, bias=None if bias is None else bias[None])

    def forward(self, q, k, v, *, mask=None, causal=False, grid=None):
        if forced() == "reference":
            return self.weights(q, k, mask=mask, causal=causal, grid=grid) @ v
        cut = self.cut(q.shape[2], grid)
        members, mask = cut.members(q.device), masks.join(masks.causal() if causal else None, mask)
        k, v = take(k, members), take(v, members)
        return attend(q, k, v, members, members, mask=mask, bias=self._inside(cut.size, q.device), whole=cut.whole)

    def weights(self, q, k, *, mask=None, causal=False, grid=None):
        cut = self.cut(q.shape[2], grid)
        number, row, column = cut.places(q.device)
        together, biases = masks.Pairs((number[:, None] == number)[None, None]), self.biases(cut.size)
        # Offsets between groups mean nothing: any will do.
        bias = None if biases is None else of_offsets(biases, row[:, None] - row, column[:, None] - column)[None]
        return dense.weights(q, k, mask=masks.join(together, mask), causal=causal, bias=bias)

    def read(self, weights, v, *, grid=None):
        return super().read(weights, v)

    def step(self, q, k, v, state=None, **extra):
        if state is None or state[0].shape[2] == self._side:  # a new window begins
            state = (k[:, :, :0], v[:, :, :0])
        k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        biases, distance = self.biases((1, self._side)), torch.arange(k.shape[2] - 1, -1, -1, device=q.device)
        bias = None if biases is None else of_offsets(biases, torch.zeros_like(distance), distance)[None, :, None]
        return dense.attend(q, k, v, bias=bias), (k, v)

    def _inside(self, size: tuple[int, int], device: torch.device) -> Float[Tensor, "heads cells cells"] | None:
        biases = self.biases(size)
        return None if biases is None else of_offsets(biases, *inside(size, device))
