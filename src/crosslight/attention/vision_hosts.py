"""DeiT, PVT, PVTv2, Swin and CSwin as hosts: networks in which a row puts its attention in place of theirs.

DeiT: Touvron et al., arXiv 2012.12877. PVT: Wang et al., arXiv 2102.12122. PVTv2: Wang et al., arXiv 2106.13797.
Swin: Liu et al., arXiv 2103.14030. CSwin: Dong et al., arXiv 2107.00652.

    "deit"   one stage of patches after a class token, plus learned positions; blocks       norm, class token, head
    "pvt"    patches, normalised, plus learned positions; blocks                            mean, head
    "pvtv2"  overlapping patches, normalised; blocks with a 3 x 3 convolution in the MLP    norm a stage, mean, head
    "swin"   patches, normalised, later merged by four; blocks                              norm, mean, head
    "cswin"  overlapping patches, normalised; blocks                                        norm, mean, head

A host is built for images of one side, as the layers that papers put into it have positions of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.backbone import Block, Pyramid, initialise, to_map, to_tokens
from crosslight.attention.softmax import Softmax
from crosslight.engines import dense
from crosslight.engines.positions import Grid, RelativeBias2d
from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Float

    Stream = Float[Tensor, "batch n dim"]
    Map = Float[Tensor, "batch channels height width"]
    #: The layer of a block: of which stage, of which number in it, width, heads, grid.
    Attend = Callable[[int, int, int, int, Grid], nn.Module]

Design = Literal["deit", "pvt", "pvtv2", "swin", "cswin"]


def cut(x: Stream, grid: Grid, window: Grid) -> Float[Tensor, "windows h w dim"]:
    """Tokens of a grid as windows, which divide its sides."""
    image = x.unflatten(1, grid).unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return image.transpose(2, 3).flatten(0, 2)


def joined(windows: Float[Tensor, "windows h w dim"], grid: Grid) -> Stream:
    """The inverse of `cut`."""
    height, width = windows.shape[1:3]
    image = windows.unflatten(0, (-1, grid[0] // height, grid[1] // width)).transpose(2, 3)
    return image.flatten(3, 4).flatten(1, 2).flatten(1, 2)


class Windows(nn.Module):
    """Swin's attention: in square windows with relative biases, whose borders may be shifted.

    Args:
        grid: the map, whose sides are multiples of the window.
        shift: rows and columns by which the windows are moved, down and to the right. Those that go over the border
            go on at the other side, where tokens read those of their own side only.
    """

    def __init__(self, dim: int, heads: int, grid: Grid, *, window: int, shift: int = 0) -> None:
        super().__init__()
        expect(all(side % window == 0 for side in grid), "window", window, f"a divisor of the sides of {grid}")
        self.window, self.shift = window, shift
        near = RelativeBias2d(heads, (window, window))
        nn.init.trunc_normal_(near.table, std=0.02)
        self.attend = Softmax.build(dim, heads, position=near)

    def forward(self, x: Stream, grid: Grid) -> Stream:
        window = (self.window, self.window)
        windows = cut(self._rolled(x, grid, -self.shift), grid, window).flatten(1, 2)
        y = self.attend(windows, mask=self._together(x, grid))
        return self._rolled(joined(y.unflatten(1, window), grid), grid, self.shift)

    @staticmethod
    def _rolled(x: Stream, grid: Grid, by: int) -> Stream:
        return x.unflatten(1, grid).roll((by, by), (1, 2)).flatten(1, 2) if by else x

    def _together(self, x: Stream, grid: Grid) -> Tensor | None:
        """Which tokens of each window lie on the same side of the map."""
        if self.shift == 0:
            return None
        sides = [torch.arange(side, device=x.device) >= side - self.shift for side in grid]
        side = sides[0][:, None] * 2 + sides[1].long()
        windows = cut(side.view(1, -1, 1), grid, (self.window, self.window)).flatten(1)
        return (windows[:, :, None] == windows[:, None]).repeat(x.shape[0], 1, 1)


class Stripes(nn.Module):
    """CSwin's attention: half of the heads read columns of ``stripe`` tokens' width, half read rows of that height, or
    all the whole map if it is no wider. A depthwise 3 x 3 convolution of the values is added stripe by stripe."""

    def __init__(self, dim: int, heads: int, grid: Grid, *, stripe: int) -> None:
        super().__init__()
        expect(all(side % stripe == 0 for side in grid), "stripe", stripe, f"a divisor of the sides of {grid}")
        self.shapes = [grid] if max(grid) == stripe else [(grid[0], stripe), (stripe, grid[1])]
        halves = len(self.shapes)
        expect(heads % halves == 0 and dim % heads == 0, "heads", heads, f"an even number that divides dim = {dim}")
        self.heads, width = heads // halves, dim // halves
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in self.shapes)

    def forward(self, x: Stream, grid: Grid) -> Stream:
        halves = zip(*(p(x).chunk(len(self.shapes), -1) for p in (self.q, self.k, self.v)), strict=True)
        each = zip(halves, self.shapes, self.convs, strict=True)
        return self.out(torch.cat([self._within(qkv, grid, shape, conv) for qkv, shape, conv in each], -1))

    def _within(self, qkv: Sequence[Stream], grid: Grid, shape: Grid, conv: nn.Module) -> Stream:
        windows = [cut(t, grid, shape) for t in qkv]
        q, k, v = (t.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2) for t in windows)
        y = dense.attend(q, k, v).transpose(1, 2).flatten(2).unflatten(1, shape)
        return joined(y + conv(windows[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1), grid)


class Patches(nn.Module):
    """A convolution, then LayerNorm."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Map) -> tuple[Stream, Grid]:
        tokens, grid = to_tokens(self.conv(x))
        return self.norm(tokens), grid


class Merging(nn.Module):
    """Four tokens side by side, column by column, normalised and projected to one."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, dim, bias=False)

    def forward(self, x: Map) -> tuple[Stream, Grid]:
        grid = (x.shape[2] // 2, x.shape[3] // 2)
        four = x.permute(0, 2, 3, 1).unflatten(2, (grid[1], 2)).unflatten(1, (grid[0], 2))
        four = four.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        return self.project(self.norm(four)), grid


class ConvMlp(nn.Module):
    """Linear, depthwise 3 x 3, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Stream, grid: Grid) -> Stream:
        return self.out(nn.functional.gelu(to_tokens(self.conv(to_map(self.into(x), grid)))[0]))


class ConvBlock(Block):
    """The pre-norm block with `ConvMlp`."""

    def __init__(self, dim: int, attend: nn.Module, mlp_ratio: float, eps: float) -> None:
        super().__init__(dim, attend, mlp_ratio, eps)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))  # type: ignore[assignment]

    def forward(self, x, grid):
        x = x + self.attend(self.norm1(x), grid=grid)
        return x + self.mlp(self.norm2(x), grid)


class Stage(nn.Module):
    """A coarser map, learned positions if there are any, blocks, a norm."""

    def __init__(self, coarser: nn.Module, blocks: Sequence[nn.Module], places: Tensor | None, norm: nn.Module) -> None:
        super().__init__()
        self.coarser, self.blocks, self.norm = coarser, nn.ModuleList(blocks), norm
        self.places = None if places is None else nn.Parameter(places)

    def forward(self, x: Map) -> Map:
        x, grid = self.coarser(x)
        x = x if self.places is None else x + self.places
        for block in self.blocks:
            x = block(x, grid)
        return to_map(self.norm(x), grid)


class ClassStage(nn.Module):
    """A class token before patches, learned positions, and blocks, which are told no grid."""

    def __init__(self, channels: int, dim: int, patch: int, patches: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(channels, dim, patch, patch), nn.ModuleList(blocks)
        self.cls, self.places = (nn.Parameter(0.02 * torch.randn(1, n, dim)) for n in (1, 1 + patches))

    def tokens(self, x: Map) -> tuple[Stream, Grid]:
        """The class token and those of the patches."""
        x, grid = to_tokens(self.patches(x))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x, None)
        return x, grid

    def forward(self, x: Map) -> Map:
        tokens, grid = self.tokens(x)
        return to_map(tokens[:, 1:], grid)


class Host(Pyramid):
    """Images (batch, channels, image, image) -> logits.

    Args:
        design: "deit", "pvt", "pvtv2", "swin" or "cswin".
        attend: what builds the attention of a block from its stage, its number there, width, heads and grid. In
            "deit" a class token comes before the tokens of the grid.
        dims, depths, heads, mlp_ratios: of each stage; "deit" has one.
        image: side of the images, a multiple of 4 * 2^(stages - 1), of "deit" of its patch.
        patch: side of DeiT's patches.
    """

    def __init__(
        self,
        design: Design,
        attend: Attend,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratios: Sequence[float],
        *,
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        expect(design in get_args(Design), "design", repr(design), f"one of {', '.join(get_args(Design))}")
        expect(design != "deit" or len(dims) == 1, "dims", dims, "one stage of deit")
        coarsest = patch if design == "deit" else 4 << (len(dims) - 1)
        expect(image > 0 and image % coarsest == 0, "image", image, f"a multiple of {coarsest}")
        swin, self.image = design == "swin", image
        block, eps = ConvBlock if design == "pvtv2" else Block, 1e-5 if "swin" in design else 1e-6
        stages: list[nn.Module] = []
        for i, (dim, depth, h, ratio) in enumerate(zip(dims, depths, heads, mlp_ratios, strict=True)):
            side, before = image // (patch if design == "deit" else 4 << i), dims[i - 1] if i else channels
            blocks = [block(dim, attend(i, j, dim, h, (side, side)), ratio, eps) for j in range(depth)]
            if design == "deit":
                stages.append(ClassStage(channels, dim, patch, side * side, blocks))
                continue
            stages.append(
                Stage(
                    Merging(before, dim) if swin and i else Patches(before, dim, *self._patch(design, i)),
                    blocks,
                    0.02 * torch.randn(1, side * side, dim) if design == "pvt" else None,
                    nn.LayerNorm(dim, eps=eps) if design == "pvtv2" else nn.Identity(),
                )
            )
        norm = nn.LayerNorm(dims[-1], eps=eps) if "swin" in design or design == "deit" else nn.Identity()
        super().__init__(stages, dims[-1], classes=classes, norm=norm)
        initialise(self)

    @staticmethod
    def _patch(design: Design, stage: int) -> tuple[int, int, int]:
        """Kernel, stride and padding."""
        stride = 2 if stage else 4
        if design not in ("pvtv2", "cswin"):
            return stride, stride, 0
        return 2 * stride - 1, stride, stride // 2 if design == "cswin" else stride - 1

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        shape = (self.image, self.image)
        expect(images.shape[2:] == shape, "images", tuple(images.shape), f"images of {shape}, for which it was built")
        first = self.stages[0]
        if isinstance(first, ClassStage):
            return self.head(self.norm(first.tokens(images)[0][:, 0]))
        return self.head(self.norm(to_tokens(self.features(images)[-1])[0]).mean(1))
