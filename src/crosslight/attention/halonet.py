"""HaloNet: blocks of queries that read their block and a halo around it, with learned relative positions.

Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens, "Scaling Local Self-Attention for Parameter Efficient Visual
Backbones", 2021, arXiv 2103.12731.

A map is cut into b x b blocks; all queries of a block share the (b + 2h) x (b + 2h) cells of block and halo:

    s_ij = q_i . k_j / sqrt(d) + q_i . r^row_(row j - row i) + q_i . r^col_(col j - col i)
    y_i  = softmax(s_i) V                    over the b + 2h squared cells, O(n (b + 2h)^2 d)

That is between a window around each pixel, which moves b^2 times the memory, and plain blocks (h = 0), which never
meet. The map goes on with h zeros at its border: their keys and values are zero, but they share in the softmax. The
relative logits are computed as b + 2h further channels of a query on each axis, which meet one-hot channels of the
keys, so that no bias of the size of the scores is kept. Without ``grid=(H, W)`` tokens are one row in blocks of b.

Attention downsampling, ``core(q, k, v, grid=grid, stride=s)``: only every s-th query of a block, on both axes, asks.

`Network` is the paper's: ResNet bottlenecks in which the attention stands for the 3 x 3 convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention import grouped
from crosslight.attention.backbone import Pyramid, to_map, to_tokens
from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Heads = Float[Tensor, "batch heads n dim"]
    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="halonet",
    kind="token",
    group="sparse",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    year=2021,
    paper="2103.12731",
    summary="The queries of a block read the block and a halo around it, with learned row and column offsets.",
    patterns=("noncausal-self", "causal-self"),
    why_not="A halo lies around a block of the same map.",
    cost="n",
    decode="state",
    small={"block": 4, "halo": 1},
    checked="timm's HaloAttn and its network of them with the same weights; the equations pixel by pixel; the "
    "published parameter counts of H0 to H7",
    differs="There is no released code. The tables of offsets have 2 (b + 2h) - 1 entries an axis, as timm's, of which "
    "2 b + 2 h - 1 are used. timm counts offsets of strided queries as if these were neighbours; here they are offsets "
    "on the map. Cells more than h beyond the map (of blocks that stick out) are not read. Any mask, the causal form "
    "(in which cells after the query in reading order, zeros too, are not read) and decoding, of one row, are ours. "
    "The hybrids with convolutions in the first stages are left out.",
    evidence=Evidence(
        claim="blocks of 4 x 4 with a halo of 2 on 8 x 8 digits are not worse than full attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"block": 4, "halo": 2},
    ),
)


@dataclass(frozen=True)
class Windows:
    """The blocks of a map, filled up to whole ones at its end, and the cells around each.

    Attributes:
        grid, block, halo: sides of the map, of a block, and the width of the halo, on both axes.
        stride: of the queries of a block.
    """

    grid: tuple[int, int]
    block: tuple[int, int]
    halo: tuple[int, int]
    stride: int
    device: torch.device

    def axis(self, axis: int) -> tuple[Int[Tensor, "blocks places"], Int[Tensor, "blocks cells"]]:
        """Where the queries and the cells of each block are."""
        side, block, halo = self.grid[axis], self.block[axis], self.halo[axis]
        start = torch.arange(0, side, block, device=self.device)[:, None]
        cells = torch.arange(-halo, block + halo, device=self.device)
        return start + torch.arange(0, block, self.stride, device=self.device), start + cells

    @property
    def places(self) -> tuple[int, int]:
        """Queries of a block on both axes."""
        return math.ceil(self.block[0] / self.stride), math.ceil(self.block[1] / self.stride)

    @property
    def out(self) -> tuple[int, int]:
        """The map of the queries."""
        return math.ceil(self.grid[0] / self.stride), math.ceil(self.grid[1] / self.stride)

    def both(self, which: int) -> tuple[Int[Tensor, "blocks items"], Int[Tensor, "blocks items"]]:
        """Row and column of every query (0) or cell (1) of each block."""
        rows, columns = self.axis(0)[which], self.axis(1)[which]
        shape = (rows.shape[0], columns.shape[0], rows.shape[1], columns.shape[1])
        rows, columns = rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)
        return rows.flatten(2).flatten(0, 1), columns.flatten(2).flatten(0, 1)

    def token(self, row: Tensor, column: Tensor, stride: int = 1) -> Tensor:
        """The number of the token there, -1 beyond the map."""
        inside = (row >= 0) & (row < self.grid[0]) & (column >= 0) & (column < self.grid[1])
        width = math.ceil(self.grid[1] / stride)
        return torch.where(inside, row // stride * width + column // stride, -1)


@register(CARD)
class Halo(Core):
    """q, k (batch, heads, n, d), v (batch, heads, n, value_dim).

    Args:
        block: b, side of a block of queries.
        halo: h, cells around it that are read too.
    """

    takes_grid = True
    network: ClassVar[type[nn.Module]]

    def __init__(self, heads: int, head_dim: int, *, block: int = 8, halo: int = 3) -> None:
        super().__init__(heads, head_dim)
        expect(isinstance(block, int) and block >= 1, "block", block, "a positive int")
        expect(isinstance(halo, int) and halo >= 0, "halo", halo, "an int >= 0")
        self.block, self.halo = block, halo
        #: r of the offsets 1 - b - 2h to b + 2h - 1, seen from the corner of the halo.
        self.rows, self.columns = (nn.Parameter(torch.empty(2 * (block + 2 * halo) - 1, head_dim)) for _ in range(2))
        for table in (self.rows, self.columns):
            nn.init.trunc_normal_(table, std=head_dim**-0.5)

    def forward(self, q, k, v, *, mask=None, causal=False, grid=None, stride=1):
        windows = self._windows(q, grid, stride)
        q, k, seen = self._scored(q, k, mask, causal, windows)
        v, width = self._cells(v, windows), v.shape[3]
        # The fast kernels want queries, keys and values of one width.
        most = max(width, q.shape[3])
        q, k, v = (F.pad(t, (0, most - t.shape[3])) for t in (q, k, v))
        return self._put_back(dense.attend(q, k, v, mask=seen, scale=1.0)[..., :width], windows)

    def weights(self, q, k, *, mask=None, causal=False, grid=None, stride=1):
        windows, (batch, n) = self._windows(q, grid, stride), (q.shape[0], q.shape[2])
        q, k, seen = self._scored(q, k, mask, causal, windows)
        held = dense.weights(q, k, mask=seen, scale=1.0).unflatten(0, (batch, -1))
        token = windows.token(*windows.both(1))
        index = torch.where(token < 0, n, token)[None, :, None, None].expand(held.shape)  # zeros into a last column
        rows = held.new_zeros(*held.shape[:4], n + 1).scatter_add(4, index, held)[..., :n]
        return self._put_back(rows.flatten(0, 1), windows)

    def read(self, weights, v, *, grid=None):
        return super().read(weights, v)

    def step(self, q, k, v, state=None, **extra):
        before, length = (None, 0) if state is None else state
        place = length % self.block
        if before is None:
            # The row starts with zeros.
            before = (F.pad(k, (0, 0, self.halo, 0))[:, :, :-1], F.pad(v, (0, 0, self.halo, 0))[:, :, :-1])
        k, v = (torch.cat([old, new], 2) for old, new in zip(before, (k, v), strict=True))
        offset = self._corner + torch.arange(-self.halo - place, 1, device=q.device)
        relative = self.columns[offset] + self.rows[self._corner]
        y = dense.attend(q, k, v, bias=q @ relative.mT)
        kept = slice(-self.halo or k.shape[2], None) if place + 1 == self.block else slice(None)
        return y, ((k[:, :, kept], v[:, :, kept]), length + 1)

    @property
    def _corner(self) -> int:
        """Where the tables hold the offset 0."""
        return self.block + 3 * self.halo - 1

    def _windows(self, q: Heads, grid: Grid | None, stride: int) -> Windows:
        height, width = grouped.plane(grid, q.shape[2])
        expect(stride == 1 or self.block % stride == 0, "stride", stride, f"a divisor of block = {self.block}")
        block = (min(self.block, height), min(self.block, width))
        return Windows((height, width), block, (0 if grid is None else self.halo, self.halo), stride, q.device)

    def _cells(self, x: Heads, windows: Windows) -> Float[Tensor, "windows heads cells dim"]:
        """The cells of each window, zero beyond the map."""
        token = windows.token(*windows.both(1))
        padded = F.pad(x, (0, 0, 0, 1))
        cells = padded.index_select(2, torch.where(token < 0, x.shape[2], token).flatten())
        return cells.unflatten(2, token.shape).transpose(1, 2).flatten(0, 1)

    def _scored(
        self, q: Heads, k: Heads, mask: Mask | None, causal: bool, windows: Windows
    ) -> tuple[Tensor, Tensor, Mask | None]:
        """Queries and keys of each window, of which the products are the scores, and which cells are read."""
        batch, heads, places = q.shape[0], q.shape[1], windows.places
        asking = windows.token(*windows.both(0))
        own = grouped.take(q, asking).transpose(1, 2).flatten(0, 1)
        k = self._cells(k, windows)
        sides = [windows.block[i] + 2 * windows.halo[i] for i in range(2)]
        square = own.unflatten(2, places)
        by_row = torch.einsum("...yxd,ycd->...yxc", square, self._relative(self.rows, 0, windows))
        by_column = torch.einsum("...yxd,xcd->...yxc", square, self._relative(self.columns, 1, windows))
        q = torch.cat([own * own.shape[-1] ** -0.5, by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)
        cell = torch.arange(sides[0] * sides[1], device=q.device)[:, None]
        row, column = (torch.arange(side, device=q.device) for side in sides)
        one_hot = [cell // sides[1] == row, cell % sides[1] == column]
        k = torch.cat([k, torch.cat(one_hot, 1).to(k.dtype).expand(*k.shape[:2], -1, -1)], -1)
        return q, k, self._read_cells(mask, causal, windows, batch, heads)

    def _relative(self, table: Tensor, axis: int, windows: Windows) -> Float[Tensor, "places cells dim"]:
        place = self.places(windows.places[axis], windows.stride, table.device)
        cell = torch.arange(-windows.halo[axis], windows.block[axis] + windows.halo[axis], device=table.device)
        return table[cell - place[:, None] + self._corner]

    def places(self, count: int, stride: int, device: torch.device) -> Int[Tensor, " count"]:
        """Where the queries of a block stand on an axis."""
        return torch.arange(count, device=device) * stride

    def _read_cells(self, mask: Mask | None, causal: bool, windows: Windows, batch: int, heads: int) -> Mask | None:
        whole = all(side % block == 0 for side, block in zip(windows.grid, windows.block, strict=True))
        if whole and mask is None and not causal:
            return None
        (row, column), (asking_row, asking_column) = windows.both(1), windows.both(0)
        token, asking = windows.token(row, column), windows.token(asking_row, asking_column)
        reach: Bool[Tensor, "windows cells"] = torch.ones_like(row, dtype=torch.bool)
        for at, axis in ((row, 0), (column, 1)):
            reach = reach & (at < windows.grid[axis] + windows.halo[axis])
        seen = grouped.visible(mask, asking, token, batch, heads) | ((token < 0) & reach)[:, None, None]
        if causal:
            i, i_, j, j_ = asking_row[..., None], asking_column[..., None], row[:, None], column[:, None]
            seen = seen & ((j < i) | ((j == i) & (j_ <= i_)))[:, None]
        return masks.Pairs(seen.expand(batch, -1, -1, asking.shape[1], -1).flatten(0, 1))

    def _put_back(self, y: Float[Tensor, "windows heads places dim"], windows: Windows) -> Heads:
        asking = windows.token(*windows.both(0), stride=windows.stride)
        y = y.unflatten(0, (-1, asking.shape[0])).transpose(1, 2)
        return grouped.put_back(y, asking, windows.out[0] * windows.out[1])


class Attend(nn.Module):
    """`Halo` on a map, in place of a 3 x 3 convolution: from ``dim`` to ``out`` channels, without biases."""

    def __init__(self, dim: int, out: int, *, head_dim: int, block: int, halo: int, stride: int) -> None:
        super().__init__()
        self.heads, self.stride = dim // head_dim, stride
        self.q, self.k, self.v = (nn.Linear(dim, width, bias=False) for width in (dim, dim, out))
        self.core = Halo(self.heads, head_dim, block=block, halo=halo)

    def forward(self, x: Map) -> Map:
        tokens, grid = to_tokens(x)
        q, k, v = (part(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = self.core(q, k, v, grid=grid, stride=self.stride)
        out = (math.ceil(grid[0] / self.stride), math.ceil(grid[1] / self.stride))
        return to_map(y.transpose(1, 2).flatten(2), out)


def convolve(dim: int, out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out))


class Bottleneck(nn.Module):
    """relu(shortcut(x) + 1 x 1 (attention (1 x 1 (x)))), each with a batch norm.

    Args:
        dim, inner, out: channels of x, inside and of the output.
        values: channels of the attention's values.
    """

    def __init__(self, dim: int, inner: int, values: int, out: int, *, stride: int, **attention: Any) -> None:
        super().__init__()
        self.enter = convolve(dim, inner)
        self.attend = Attend(inner, values, stride=stride, **attention)
        self.norm, self.leave = nn.BatchNorm2d(values), convolve(values, out)
        self.shortcut = convolve(dim, out, stride=stride) if stride > 1 or dim != out else nn.Identity()

    def forward(self, x: Map) -> Map:
        y = self.attend(self.enter(x).relu())
        return (self.leave(self.norm(y).relu()) + self.shortcut(x)).relu()


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits.

    Args:
        block, halo: of all attentions.
        values, out: r_v and r_b, widths of the values and of the blocks' outputs over 64, 128, 256 and 512.
        depth: of the third stage; the others have 3 blocks.
        final: channels of a last 1 x 1 convolution; None for none.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "h0": {"block": 8, "halo": 3, "values": 1.0, "out": 0.5, "depth": 7},
        "h1": {"block": 8, "halo": 3, "values": 1.0, "out": 1.0, "depth": 10},
        "h2": {"block": 8, "halo": 3, "values": 1.0, "out": 1.25, "depth": 11},
        "h3": {"block": 10, "halo": 3, "values": 1.0, "out": 1.5, "depth": 12, "final": 1024},
        "h4": {"block": 12, "halo": 2, "values": 1.0, "out": 3.0, "depth": 12, "final": 1280},
        "h5": {"block": 14, "halo": 2, "values": 2.5, "out": 2.0, "depth": 23, "final": 1536},
        "h6": {"block": 8, "halo": 4, "values": 3.0, "out": 2.75, "depth": 24, "final": 1536},
        "h7": {"block": 10, "halo": 3, "values": 4.0, "out": 3.5, "depth": 26, "final": 2048},
    }

    def __init__(
        self,
        dim: int = 64,
        *,
        block: int = 8,
        halo: int = 3,
        values: float = 1.0,
        out: float = 1.0,
        depth: int = 10,
        final: int | None = None,
        head_dim: int = 16,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stem = nn.Sequential(convolve(channels, dim, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages: list[nn.Module] = []
        before = dim
        for i, count in enumerate((3, 3, depth, 3)):
            inner = dim << i
            blocks: list[nn.Module] = [] if i else [stem]
            for j in range(count):
                blocks.append(
                    Bottleneck(
                        before,
                        inner,
                        int(inner * values),
                        int(inner * out),
                        stride=2 if i and j == 0 else 1,
                        head_dim=head_dim,
                        block=block,
                        halo=halo,
                    )
                )
                before = int(inner * out)
            stages.append(nn.Sequential(*blocks))
        last = nn.Sequential(convolve(before, final), nn.ReLU()) if final else nn.Identity()
        super().__init__(stages, final or before, classes=classes, norm=nn.Identity())
        self.last = last

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        return self.head(self.last(self.features(images)[-1]).mean((2, 3)))


Halo.network = Network
