"""Deformable attention: all queries read the same few points of the map, which move to where the input is worth it.

Xia, Pan, Song, Li, Huang, "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention", 2023,
arXiv 2309.01430; the layer: Xia et al., "Vision Transformer with Deformable Attention", 2022, arXiv 2201.00520.

A map of H x W tokens, coordinates in [-1, 1] on both axes, g groups of channels with points of their own:

    p   = uniform grid of H/r x W/r reference points
    dp  = conv1x1(GELU(LayerNorm(depthwise k x k, stride r (Q))))      2 channels, Q = W_q x
    dp  = s tanh(dp) / (points - 1)                                    only if ``offset_range`` s is given
    xs  = bilinear(x; clip(p + dp))                                    n_s = H W / r^2 sampled features
    y   = W_o softmax(Q (W_k xs)^T / sqrt(d) + B) W_v xs
    B   = bilinear(table; (q - p - dp) / 2)                            (2H-1) x (2W-1) a head, read between its entries

Shapes (batch, n, dim) with ``grid=(H, W)``; without it tokens are one row. The points are shared by all queries, so
that cost is n n_s, and the matrix over the tokens is softmax(...) S with S the bilinear weights.

`Network` is DAT++: convolutional stem and downsampling; its block adds a depthwise convolution (local perception
unit), then attends in windows and deformably in turn, then an MLP with a depthwise convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention import grouped
from crosslight.attention.backbone import Pyramid, to_map, to_tokens
from crosslight.attention.base import Mechanism
from crosslight.attention.fused_neighborhood_attention import NeighbourhoodAttention
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import UnsupportedPattern, expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n dim"]
    Map = Float[Tensor, "batch channels height width"]
    Points = Float[Tensor, "batch groups points 2"]

CARD = Card(
    id="dat-plus-plus",
    kind="token",
    group="sparse",
    title="DAT++: Spatially Dynamic Vision Transformer with Deformable Attention",
    year=2023,
    paper="2309.01430",
    code="LeapLabTHU/DAT",
    summary="Keys and values are few features, sampled between the tokens at points that the input moves.",
    patterns=("noncausal-self",),
    why_not="Where the points move is read from all of the map that they sample.",
    cost="n^2",
    mask="keys",
    small={"stride": 2, "kernel": 3, "size": 4},
    checked="the equations written out point by point; full attention at stride 1 and attention to bilinear samples "
    "of the grid, both without offsets; the published parameter counts of the three sizes",
    differs="Reference points span the map from corner to corner as in the paper; the released code moves them by half "
    "a point (``shifted``). Points are clipped to the map with offset_range too. Masked tokens weigh nothing in a "
    "sample. With several groups the matrix shown averages over the groups, whose points differ, and cannot be read in "
    "place of the attention.",
    evidence=Evidence(
        claim="a quarter of the keys, at points that move, is not worse than full attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"stride": 2, "kernel": 5, "size": 8},
    ),
)


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, x: Map) -> Map:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@register(CARD)
class DeformableAttention(Mechanism):
    """softmax attention to sampled features.

    Args:
        stride: r, tokens to a point on each axis.
        kernel: k of the convolution that moves the points, an odd number.
        groups: g, a divisor of heads.
        offset_range: s, how many points far a point may move; None for anywhere on the map.
        size: H and W of the map for which the table of biases is made; it is read at any other. 0 for no biases.
        shifted: reference points as in the released code.
    """

    network: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        stride: int = 8,
        kernel: int = 9,
        groups: int = 1,
        offset_range: float | None = None,
        size: int = 56,
        shifted: bool = False,
    ) -> None:
        super().__init__(dim)
        expect(isinstance(heads, int) and heads > 0, "heads", heads, "a positive int")
        expect(dim % heads == 0, "dim", dim, f"a multiple of heads = {heads}")
        expect(isinstance(stride, int) and stride >= 1, "stride", stride, "a positive int")
        expect(kernel >= 1 and kernel % 2 == 1, "kernel", kernel, "an odd number")
        expect(groups >= 1 and heads % groups == 0, "groups", groups, f"a divisor of heads = {heads}")
        self.heads, self.groups, self.offset_range, self.shifted = heads, groups, offset_range, shifted
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        wide = dim // groups
        self.offset = nn.Sequential(
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide),
            MapNorm(wide),
            nn.GELU(),
            nn.Conv2d(wide, 2, 1, bias=False),
        )
        self.table = nn.Parameter(torch.empty(heads, 2 * size - 1, 2 * size - 1)) if size else None
        if self.table is not None:
            nn.init.trunc_normal_(self.table, std=0.01)

    def points(self, x: Stream, *, grid: Any = None, keep: Bool[Tensor, "batch n"] | None = None) -> Points:
        """Where keys and values are sampled: (row, column) from -1 to 1."""
        return self._points(self.q(x), grouped.plane(grid, x.shape[1]), keep)

    def _points(self, q: Stream, grid: tuple[int, int], keep: Tensor | None) -> Points:
        image = to_map(q if keep is None else q * keep[..., None].to(q.dtype), grid)
        moved = self.offset(image.unflatten(1, (self.groups, -1)).flatten(0, 1))
        # Half precision would not tell neighbouring places apart.
        moved = moved.to(torch.promote_types(q.dtype, torch.float32))
        sides = moved.shape[2:]
        if self.offset_range is not None:
            reach = moved.new_tensor([self.offset_range / max(1, side - 1) for side in sides])
            moved = moved.tanh() * reach.view(1, 2, 1, 1)
        start = _centres(sides, moved, 0.5 if self.shifted else 0.0)
        moved = moved.flatten(2).mT.unflatten(0, (len(q), self.groups))
        return (start + moved).clamp(-1, 1)

    def _sampled(
        self, x: Stream, points: Points, grid: tuple[int, int], keep: Tensor | None
    ) -> tuple[Float[Tensor, "batch points dim"], Bool[Tensor, "batch points"] | None]:
        """Features at the points, and which of them have any token that may be read."""
        wide = x.to(points.dtype)
        if keep is not None:
            wide = torch.cat([wide * keep[..., None].to(wide.dtype), keep[..., None].to(wide.dtype)], -1)
            image = to_map(wide, grid)
            image, share = image[:, :-1].unflatten(1, (self.groups, -1)), image[:, None, -1:]
            image = torch.cat([image, share.expand(-1, self.groups, -1, -1, -1)], 2)
        else:
            image = to_map(wide, grid).unflatten(1, (self.groups, -1))
        at = points.flip(-1).flatten(0, 1)[:, None]  # grid_sample takes (column, row)
        y = F.grid_sample(image.flatten(0, 1), at, mode="bilinear", align_corners=True)
        y = y.squeeze(2).unflatten(0, (len(x), self.groups))
        there = None
        if keep is not None:
            y, share = y[:, :, :-1], y[:, :, -1:]
            some = share > EPS
            y, there = (y / torch.where(some, share, 1)) * some.to(y.dtype), some.any(1).squeeze(1)
        return y.flatten(1, 2).mT.to(x.dtype), there

    def _bias(self, points: Points, grid: tuple[int, int]) -> Float[Tensor, "batch heads n points"] | None:
        if self.table is None:
            return None
        batch = len(points)
        apart = (_centres(grid, points, 0.0)[:, None] - points.flatten(0, 1)[:, None]) / 2
        tables = self.table.to(points.dtype).unflatten(0, (self.groups, -1)).expand(batch, -1, -1, -1, -1)
        y = F.grid_sample(tables.flatten(0, 1), apart.flip(-1), mode="bilinear", align_corners=True)
        return y.unflatten(0, (batch, self.groups)).flatten(1, 2)

    def _split(self, t: Tensor) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _merge(self, y: Heads) -> Stream:
        return self.out(y.transpose(1, 2).flatten(2))

    def _read_points(self, x, how):
        keep, grid = masks.split(how.mask)[1], grouped.plane(how.grid, x.shape[1])
        q = self.q(x)
        points = self._points(q, grid, keep)
        sampled, there = self._sampled(x, points, grid, keep)
        mask = None if there is None else masks.keys(there)
        bias = self._bias(points, grid)
        return self._split(q), sampled, points, mask, None if bias is None else bias.to(x.dtype)

    def _forward(self, x, context, how):
        q, sampled, _, mask, bias = self._read_points(x, how)
        k, v = self._split(self.k(sampled)), self._split(self.v(sampled))
        return self._merge(dense.attend(q, k, v, mask=mask, bias=bias))

    def _weights(self, x, context, how):
        q, sampled, points, mask, bias = self._read_points(x, how)
        on_points = dense.weights(q, self._split(self.k(sampled)), mask=mask, bias=bias)
        keep, grid = masks.split(how.mask)[1], grouped.plane(how.grid, x.shape[1])
        # How much of each token is in each sample.
        shares: Tensor | float = 1.0
        for axis, side in enumerate(grid):
            place = torch.arange(side, device=x.device, dtype=points.dtype)
            near = (1 - ((points[..., axis, None] + 1) / 2 * (side - 1) - place).abs()).clamp(min=0)
            shares = shares * (near[..., :, None] if axis == 0 else near[..., None, :])
        assert isinstance(shares, Tensor)
        shares = shares.flatten(3)
        if keep is not None:
            shares = shares * keep[:, None, None].to(shares.dtype)
        total = shares.sum(-1, keepdim=True)
        some = total > EPS
        # The mean over the groups whose sample holds something.
        shares = (shares / torch.where(some, total, 1) * some).sum(1, keepdim=True) / some.sum(1, keepdim=True).clamp(1)
        return on_points @ shares.to(x.dtype)

    def _read(self, weights, x, context, how):
        if self.groups > 1:
            raise UnsupportedPattern("read: dat-plus-plus with several groups has no one matrix for all channels")
        return self._merge(weights @ self._split(self.v(x)))


#: Samples that hold less than this of readable tokens are not read.
EPS = 1e-6


def _centres(sides: Sequence[int], like: Tensor, shift: float) -> Float[Tensor, "cells 2"]:
    """Evenly spaced places from corner to corner, in the middle where there is one only."""
    axes = [
        ((torch.arange(side, device=like.device, dtype=like.dtype) + shift) * (2 / max(1, side - 1)) - min(1, side - 1))
        for side in sides
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


class ConvMlp(nn.Module):
    """Linear, x + depthwise 3 x 3, GELU, linear, on maps."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.rise, self.fall = nn.Conv2d(dim, dim * ratio, 1), nn.Conv2d(dim * ratio, dim, 1)
        self.conv = nn.Conv2d(dim * ratio, dim * ratio, 3, padding=1, groups=dim * ratio)

    def forward(self, x: Map) -> Map:
        x = self.rise(x)
        return self.fall(F.gelu(x + self.conv(x)))


class PerceptionBlock(nn.Module):
    """x + conv3x3(x), x + attend(norm x), x + mlp(norm x), on maps."""

    def __init__(self, dim: int, attend: nn.Module, ratio: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.attend = MapNorm(dim), attend
        self.norm2, self.mlp = MapNorm(dim), ConvMlp(dim, ratio)

    def forward(self, x: Map) -> Map:
        x = x + self.local(x)
        tokens, grid = to_tokens(self.norm1(x))
        x = x + to_map(self.attend(tokens, grid=grid), grid)
        return x + self.mlp(self.norm2(x))


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits.

    Args:
        dim: width of the first stage; it doubles from stage to stage.
        groups, strides, kernels: of the deformable layers of each stage.
        window: side of the neighbourhoods; the last stage has none.
        head_dim: width of the heads.
        image: side of the images of training, for the tables of biases.
        shifted: as of `DeformableAttention`; True for released weights.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"dim": 64, "groups": [1, 2, 4, 8]},
        "small": {"dim": 96, "groups": [1, 2, 3, 6]},
        "base": {"dim": 128, "groups": [2, 4, 8, 16]},
    }
    #: Of the released models.
    published: ClassVar[dict[str, int]] = {"tiny": 23_949_018, "small": 53_106_579, "base": 93_662_924}

    def __init__(
        self,
        dim: int = 64,
        groups: Sequence[int] = (1, 2, 4, 8),
        *,
        depths: Sequence[int] = (2, 4, 18, 2),
        strides: Sequence[int] = (8, 4, 2, 1),
        kernels: Sequence[int] = (9, 7, 5, 3),
        window: int = 7,
        head_dim: int = 32,
        ratio: int = 4,
        image: int = 224,
        shifted: bool = False,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stages = []
        for i, depth in enumerate(depths):
            wide = dim << i
            if i == 0:
                down: list[nn.Module] = [nn.Conv2d(channels, dim // 2, 3, 2, 1), MapNorm(dim // 2), nn.GELU()]
                down += [nn.Conv2d(dim // 2, dim, 3, 2, 1), MapNorm(dim)]
            else:
                down = [nn.Conv2d(wide // 2, wide, 3, 2, 1, bias=False), MapNorm(wide)]
            blocks = []
            for j in range(depth):
                if j % 2 == 0 and i < len(depths) - 1:
                    attend: nn.Module = NeighbourhoodAttention.build(wide, wide // head_dim, kernel_size=window)
                else:
                    how: dict[str, Any] = {
                        "stride": strides[i],
                        "kernel": kernels[i],
                        "groups": groups[i],
                        "shifted": shifted,
                    }
                    attend = DeformableAttention(wide, wide // head_dim, size=image // (4 << i), **how)
                blocks.append(PerceptionBlock(wide, attend, ratio))
            stages.append(nn.Sequential(*down, *blocks))
        super().__init__(stages, wide, classes=classes, norm=nn.Identity())
        # The normalisation comes before the mean over the map.
        self.last = MapNorm(wide)

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        return self.head(self.last(self.features(images)[-1]).mean((2, 3)))


DeformableAttention.network = Network
