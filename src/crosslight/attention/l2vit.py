"""L2ViT: linear global attention with a floor under its denominator, and convolutions that concentrate it again.

Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv 2501.16182.

    Q = ReLU(X W_q),  K = ReLU(X W_k),  V = X W_v                                   (n, d) of each head
    LGA: O_i = q_i (t sum_j k_j^T v_j) / max(q_i . sum_j k_j, c)                     t learned a head, from d^(-1/2)
    LCM: Z = DWC(BatchNorm(GELU(DWC(Y))))                                           7 x 7 depthwise on the image
    y = Y + LCM(LayerNorm(Y)),   Y = W_o [O_1 ; ... ; O_h]                          (batch, n, dim)

Weights stay positive, as those of softmax; what linear attention lacks is their concentration, and the local
concentration module brings each token back to its neighbourhood. The floor c keeps the division stable: where it
binds, rows sum to less than t. Time O(n d^2). With ``grid=(H, W)`` the convolutions are those of the image; without it
tokens are one row.

`Network` is the paper's pyramid, in which a block of attention inside 7 x 7 windows and one of LGA and LCM take turns;
a depthwise 3 x 3 convolution, added, tells each attention and the MLP after the windows where tokens are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.attention.backbone import Block, Pyramid, initialise, to_map, to_tokens
from crosslight.attention.base import AttentionLayer, Core, How
from crosslight.attention.twins import LSA
from crosslight.cards import Card, Evidence
from crosslight.engines import linear, masks
from crosslight.engines.dense import repeat_heads
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads n dim"]
    Stream = Float[Tensor, "batch n dim"]
    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="l2vit",
    kind="token",
    group="linear",
    title="The Linear Attention Resurrection in Vision Transformer",
    year=2025,
    paper="2501.16182",
    code="ChuanyangZheng/L2ViT",
    summary="ReLU linear attention with a bounded denominator, re-concentrated by depthwise convolutions.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="The convolutions that concentrate the output read to all sides of a token.",
    cost="n",
    mask="keys",
    small={"floor": 1.0, "kernel": 3},
    checked="the explicit row-normalised matrix of ReLU features times t; the convolutions through torch modules; the "
    "parameter counts of the authors' code and, rounded, of their table",
    differs="In the paper the module LCM is a residual branch of its own in the block, over the sum of attention and "
    "stream, and so it is in the network; as a layer, which does not see its residual stream, it is one over the "
    "attention's output. Where a map of the network is no multiple of the window, its border reads fewer keys (the "
    "released code: zeros, unmasked). Stochastic depth is left to training.",
    evidence=Evidence(
        claim="linear attention with LCM is on par with softmax attention on images",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"floor": 1.0},
    ),
)


class LocalConcentration(nn.Module):
    """LCM: tokens as an image, depthwise convolution, GELU, batch norm, depthwise convolution."""

    def __init__(self, dim: int, kernel: int = 7) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.first = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.scale = nn.BatchNorm2d(dim)
        self.second = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Stream, grid: tuple[int, ...] | None, keep: Bool[Tensor, "batch n"] | None) -> Stream:
        """Cells that are not kept are zero before each convolution."""
        shape = grid or (1, x.shape[1])
        held = None if keep is None else keep.unflatten(1, shape).unsqueeze(1)

        def kept(t: Tensor) -> Tensor:
            return t if held is None else t.masked_fill(~held, 0)

        image = self.norm(x).transpose(1, 2).unflatten(-1, shape)
        image = self.scale(nn.functional.gelu(self.first(kept(image))))
        return self.second(kept(image)).flatten(2).transpose(1, 2)


class L2ViTLayer(AttentionLayer):
    """The layer around `L2ViT`, which concentrates what it read."""

    def __init__(self, core: L2ViT, dim: int, **own: Any) -> None:
        super().__init__(core, dim, **own)
        self.lcm = LocalConcentration(dim, core.kernel) if core.kernel else None

    def _concentrated(self, y: Heads, x: Stream, how: How) -> Stream:
        merged = self._merge(y, x)
        if self.lcm is None:
            return merged
        # Padding of a context says nothing of the queries.
        return merged + self.lcm(merged, how.grid, None if how.cross else masks.split(how.mask)[1])

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        return self._concentrated(self.core(q, k, v, mask=how.mask), x, how)

    def _read(self, weights, x, context, how):
        return self._concentrated(self.core.read(weights, self._values(context)), x, how)


@register(CARD)
class L2ViT(Core):
    """q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        floor: c, the least denominator; 100 in the released model, for some thousand tokens.
        kernel: side of the layer's two convolutions, an odd number; 0 for attention alone.
    """

    grouped = True
    layer = L2ViTLayer
    network: ClassVar[type[nn.Module]]

    def __init__(self, heads: int, head_dim: int, *, floor: float = 100.0, kernel: int = 7) -> None:
        super().__init__(heads, head_dim)
        expect(floor > 0, "floor", floor, "a number > 0")
        expect(kernel == 0 or (kernel > 0 and kernel % 2 == 1), "kernel", kernel, "an odd number, or 0")
        self.floor, self.kernel = floor, kernel
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 1 / math.sqrt(head_dim)))

    def forward(self, q, k, v, *, mask=None, causal=False):
        return linear.attend(*self._features(q, k, mask), v)

    def weights(self, q, k, *, mask=None, causal=False):
        return linear.weights(*self._features(q, k, mask))

    def _features(self, q: Heads, k: Heads, mask: masks.Mask | None) -> tuple[Heads, Heads]:
        """ReLU features, those of the queries times t and over the denominator."""
        q, k, keep = q.relu(), k.relu(), masks.split(mask)[1]
        if keep is not None:
            k = k.masked_fill(~keep[:, None, :, None], 0)
        total = (q * repeat_heads(k.sum(2, keepdim=True), self.heads)).sum(-1, keepdim=True)
        return q * self.temperature / total.clamp(min=self.floor), k


class Position(nn.Module):
    """x plus a depthwise 3 x 3 convolution of its map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Stream, grid: tuple[int, int]) -> Stream:
        return x + to_tokens(self.conv(to_map(x, grid)))[0]


class WindowBlock(Block):
    """Attention inside windows, then an MLP, each after a position."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, window: int) -> None:
        super().__init__(dim, LSA.build(dim, heads, window=window), mlp_ratio)
        self.position1, self.position2 = Position(dim), Position(dim)

    def forward(self, x, grid):
        x = self.position1(x, grid)
        x = x + self.attend(self.norm1(x), grid=grid)
        x = self.position2(x, grid)
        return x + self.mlp(self.norm2(x))


class GlobalBlock(Block):
    """A position, linear attention over the whole map, its concentration, and an MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, kernel: int, floor: float) -> None:
        super().__init__(dim, L2ViT.build(dim, heads, floor=floor, kernel=0), mlp_ratio)
        self.position, self.concentrate = Position(dim), LocalConcentration(dim, kernel)

    def forward(self, x, grid):
        x = self.position(x, grid)
        x = x + self.attend(self.norm1(x), grid=grid)
        x = x + self.concentrate(x, grid, None)
        return x + self.mlp(self.norm2(x))


class Stem(nn.Module):
    """Two convolutions of stride 2, then LayerNorm."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, dim // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Map) -> Map:
        tokens, grid = to_tokens(self.convs(x))
        return to_map(self.norm(tokens), grid)


class Halving(nn.Module):
    """LayerNorm, then patches of 2 x 2."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm, self.patches = nn.LayerNorm(channels), nn.Conv2d(channels, dim, 2, stride=2)

    def forward(self, x: Map) -> Map:
        tokens, grid = to_tokens(x)
        return self.patches(to_map(self.norm(tokens), grid))


class Stage(nn.Module):
    """A coarser map, then blocks."""

    def __init__(self, coarser: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.coarser, self.blocks = coarser, nn.ModuleList(blocks)

    def forward(self, x: Map) -> Map:
        tokens, grid = to_tokens(self.coarser(x))
        for block in self.blocks:
            tokens = block(tokens, grid)
        return to_map(tokens, grid)


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits, from sides that are multiples of 32.

    Args:
        window: side of the windows in every other block, from the first on.
        kernel: side of the convolutions of LCM.
        floor: c of the linear attention.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"dims": [96, 192, 384, 768], "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24]},
        "small": {"dims": [96, 192, 384, 768], "depths": [2, 2, 18, 2], "heads": [3, 6, 12, 24]},
        "base": {"dims": [128, 256, 512, 1024], "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32]},
    }
    published: ClassVar[dict[str, int]] = {"tiny": 28_596_781, "small": 50_199_157, "base": 88_577_188}

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        *,
        window: int = 7,
        kernel: int = 7,
        floor: float = 100.0,
        mlp_ratio: float = 4,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks: list[nn.Module] = [
                GlobalBlock(dim, heads[i], mlp_ratio, kernel, floor)
                if j % 2
                else WindowBlock(dim, heads[i], mlp_ratio, window)
                for j in range(depth)
            ]
            stages.append(Stage(Halving(dims[i - 1], dim) if i else Stem(channels, dim), blocks))
        super().__init__(stages, dims[-1], classes=classes)
        initialise(self)

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        return self.head(self.norm(to_tokens(self.features(images)[-1])[0]).mean(1))


L2ViT.network = Network
