"""Positions: rotations of queries and keys, and biases on scores. A layer takes any of them as ``position=``.

`Bias` objects answer for any index tensors, so that sparse executors evaluate them on the blocks they read only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Grid = tuple[int, ...]


class Rotation(nn.Module):
    """Position as a rotation of queries and keys."""

    def rotate(
        self, x: Float[Tensor, "batch heads n dim"], *, offset: int = 0, grid: Grid | None = None
    ) -> Float[Tensor, "batch heads n dim"]:
        raise NotImplementedError


class Bias(nn.Module):
    """Position as a bias that is added to the scores."""

    def bias(self, i: Int[Tensor, "*i"], j: Int[Tensor, "*j"]) -> Float[Tensor, "heads ..."]:
        """The bias of queries at positions ``i`` on keys at ``j``, for index tensors that broadcast."""
        raise NotImplementedError


class _Turn(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) of the two halves of the channels, in the layout of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (a, b), y = x.chunk(2, -1), x * torch.cat([cos, cos], -1)
        left, right = y.chunk(2, -1)
        left.addcmul_(b, sin, value=-1)
        right.addcmul_(a, sin)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Turn.apply(grads[0], cos, -sin), None, None


def _turn(x: Tensor, angles: Float[Tensor, "n *parts half"]) -> Tensor:
    return _Turn.apply(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


class Rotary(Rotation):
    """RoPE (Su et al. 2021, arXiv 2104.09864): the pair (c, c + dim/2) turns by position * base^(-2c/dim).

    Pairs are the two halves, as in Llama and transformers.
    """

    def __init__(self, dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        expect(dim % 2 == 0, "Rotary(dim)", dim, "an even head width")
        self.dim, self.base = dim, base

    def positions(self, token: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The position of each token: its number, unless a subclass counts otherwise."""
        return token

    def rotate(self, x, *, offset=0, grid=None):
        # In at least float32: angles of far positions do not survive half precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = self.base ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=dtype) / self.dim)
        token = torch.arange(offset, offset + x.shape[2], device=x.device)
        return _turn(x, self.positions(token).to(dtype)[:, None] * rate)


class Rotary2d(Rotation):
    """RoPE over a grid: the first half of the channels turns by the row, the second by the column."""

    def __init__(self, dim: int, base: float = 100.0) -> None:
        super().__init__()
        expect(dim % 4 == 0, "Rotary2d(dim)", dim, "a head width that is a multiple of 4")
        self.dim, self.base = dim, base

    def rotate(self, x, *, offset=0, grid=None):
        expect(grid is not None and len(grid) == 2, "grid", grid, "(height, width), which Rotary2d needs")
        dtype = torch.promote_types(x.dtype, torch.float32)
        half = self.dim // 2
        rate = self.base ** (-torch.arange(0, half, 2, device=x.device, dtype=dtype) / half)
        cell = torch.arange(x.shape[2], device=x.device)
        place = torch.stack([cell // grid[1], cell % grid[1]], 1).to(dtype)
        return _turn(x.unflatten(-1, (2, half)), place[..., None] * rate).flatten(-2)


class ALiBi(Bias):
    """ALiBi (Press et al. 2021, arXiv 2108.12409): -slope_h * |i - j|, slope_h = 2^(-8 (h+1) / heads)."""

    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
        slopes += [2 ** (-4 * (2 * h + 1) / power) for h in range(heads - power)]
        self.register_buffer("slopes", torch.tensor(slopes, dtype=torch.get_default_dtype()), persistent=False)

    def bias(self, i, j):
        distance = (i - j).abs().to(self.slopes.dtype)
        return -self.slopes.view(-1, *[1] * distance.dim()) * distance


class RelativeBias(Bias):
    """A learned bias a head for each bucket of i - j (T5, Raffel et al. 2019, arXiv 1910.10683): half of the
    ``buckets`` for each direction, exact up to half of those, then logarithmic up to ``max_distance``."""

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Parameter(torch.zeros(heads, buckets))

    def bucket(self, i, j):
        distance, half = j - i, self.buckets // 2
        side = (distance > 0).long() * half
        distance, exact = distance.abs(), half // 2
        far = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact) * (half - exact)
        return side + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=half - 1))

    def bias(self, i, j):
        return self.table[:, self.bucket(i, j)]


class RelativeBias2d(Bias):
    """A learned bias a head for each offset (row, column) inside a fixed grid (Swin, Liu et al. 2021,
    arXiv 2103.14030)."""

    def __init__(self, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))

    def bias(self, i, j):
        height, width = self.grid
        return self.table[:, i // width - j // width + height - 1, i % width - j % width + width - 1]


def make(position: str | nn.Module | None, *, heads: int, head_dim: int) -> nn.Module | None:
    """A position by name ("rope", "rope2d", "alibi", "relative"), or as it is."""
    if position is None or isinstance(position, Rotation | Bias):
        return position
    named = {
        "rope": lambda: Rotary(head_dim),
        "rope2d": lambda: Rotary2d(head_dim),
        "alibi": lambda: ALiBi(heads),
        "relative": lambda: RelativeBias(heads),
    }
    expect(position in named, "position", repr(position), f"a Rotation, a Bias or one of {', '.join(named)}")
    return named[position]()  # type: ignore[index]
