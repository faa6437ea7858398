"""CrossFormer: attention among neighbours and among far cells at equal distances, in turn, layer by layer.

Wang, Yao, Chen, Lin, Cai, He, Liu, "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
2021, arXiv 2108.00154.

A map of H x W tokens is cut into groups of G x G. With I = H / G groups an axis, the token at row r is in group

    short distance (SDA):  r // G, at place r % G                            windows of neighbours
    long distance (LDA):   r % I,  at place r // I                           cells I apart, over the whole map

(columns alike), and attends to the tokens of its group, without shifts:

    y_i = softmax(q_i K^T / sqrt(d) + B_i) V        over the G^2 keys of the group,    O(H W G^2 d)
    B_ij = MLP(dy, dx)                              dynamic position bias, of the offset of places in the group
    MLP: Linear(2, p), then three times LayerNorm, ReLU, Linear(p, p), the last one to the heads

The MLP is asked for the (2G-1)^2 offsets, so that any G works. One SDA and one LDA layer join any two tokens if
G^2 >= H. Shapes (batch, heads, n, d) with ``grid=(H, W)``; without it tokens are one row. Groups at the border of a map
that is no multiple of G are filled up with nothing.

`Network` is the paper's pyramid; before each stage a cross-scale embedding joins convolutions of several kernels, the
large ones with fewer channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.attention.backbone import Block, Pyramid, initialise, to_map, to_tokens
from crosslight.attention.grouped import GroupCore
from crosslight.cards import Card, Evidence
from crosslight.errors import UnsupportedPattern, expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="crossformer",
    kind="token",
    group="sparse",
    title="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
    year=2021,
    paper="2108.00154",
    code="cheerss/CrossFormer",
    summary="Each token reads its window, or with long=True the cells at equal distances over the whole map.",
    patterns=("noncausal-self", "causal-self"),
    why_not="A group is made of tokens of one map.",
    cost="n",
    decode="state",
    small={"group": 4},
    checked="the equations written out group by group; windows and intervals by gradients; dense attention when the "
    "group is the map; the published parameter counts of the four sizes",
    differs="p is dim / 16 as in the released code and its parameter counts; the paper says dim / 4. The paper's "
    "interval I is a setting of each stage; here it follows from the side of the map and G, as in the code. Maps that "
    "are no multiple of G, any mask and the causal form are ours; decoding takes tokens as one row of windows, and "
    "with long=True, where the interval would depend on tokens to come, is refused.",
    evidence=Evidence(
        claim="windows of 4 x 4 on 8 x 8 digits are not worse than full attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"group": 4},
    ),
)


class PositionBias(nn.Module):
    """(dy, dx) -> a bias a head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2, width)]
        for out in (width, width, heads):
            layers += [nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)]
        self.layers = nn.Sequential(*layers)

    def forward(self, size: tuple[int, int]) -> Float[Tensor, "heads offsets offsets"]:
        """The table of the offsets 1 - size to size - 1 on both axes."""
        weight = self.layers[0].weight
        assert isinstance(weight, Tensor)
        dy, dx = (torch.arange(1 - side, side, device=weight.device, dtype=weight.dtype) for side in size)
        offsets = torch.stack(torch.meshgrid(dy, dx, indexing="ij"), -1)
        return self.layers(offsets).permute(2, 0, 1)


@register(CARD)
class CrossFormer(GroupCore):
    """q, k, v (batch, heads, n, d).

    Args:
        group: G, cells of a group on an axis; at most the side of the map.
        long: groups of cells at equal distances (LDA) in place of windows (SDA).
        width: p, hidden width of the position bias; heads * head_dim / 16, at least 4, unless given.
    """

    network: ClassVar[type[nn.Module]]

    def __init__(
        self, heads: int, head_dim: int, *, group: int = 7, long: bool = False, width: int | None = None
    ) -> None:
        expect(isinstance(group, int) and group >= 1, "group", group, "a positive int")
        super().__init__(heads, head_dim, group, bool(long))
        self.long = bool(long)
        self.bias = PositionBias(max(4, heads * head_dim // 16) if width is None else width, heads)

    def biases(self, size):
        return self.bias(size)

    def step(self, q, k, v, state=None, **extra):
        if self.long:
            raise UnsupportedPattern(
                "step: crossformer with long=True cannot decode token by token, its interval depends on the length"
            )
        return super().step(q, k, v, state, **extra)


class Embedding(nn.Module):
    """Cross-scale embedding: convolutions of several kernels at one stride, joined; each kernel but the last has half
    of the channels that were left."""

    def __init__(self, channels: int, dim: int, kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        last = len(kernels) - 1
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, dim >> min(i + 1, last), kernel, stride, (kernel - stride) // 2)
            for i, kernel in enumerate(kernels)
        )

    def forward(self, x: Map) -> Map:
        return torch.cat([conv(x) for conv in self.convs], 1)


class Stage(nn.Module):
    """An embedding, then blocks of SDA and LDA in turn. The first stage normalises after its embedding, the others
    before."""

    def __init__(
        self, channels: int, dim: int, depth: int, heads: int, *, group: int, kernels: Sequence[int], first: bool
    ) -> None:
        super().__init__()
        self.first = first
        self.embed = Embedding(channels, dim, kernels, kernels[0])
        self.norm = nn.LayerNorm(dim if first else channels)
        self.blocks = nn.ModuleList(
            Block(dim, CrossFormer.build(dim, heads, group=group, long=i % 2 == 1)) for i in range(depth)
        )

    def forward(self, x: Map) -> Map:
        if not self.first:
            x = to_map(self.norm(to_tokens(x)[0]), (x.shape[2], x.shape[3]))
        tokens, grid = to_tokens(self.embed(x))
        if self.first:
            tokens = self.norm(tokens)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return to_map(tokens, grid)


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits.

    Args:
        dim: width of the first stage; it doubles from stage to stage.
        group: G of every stage.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"dim": 64, "depths": [1, 1, 8, 6], "heads": [2, 4, 8, 16]},
        "small": {"dim": 96, "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24]},
        "base": {"dim": 96, "depths": [2, 2, 18, 2], "heads": [3, 6, 12, 24]},
        "large": {"dim": 128, "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32]},
    }
    #: Of the released models.
    published: ClassVar[dict[str, int]] = {
        "tiny": 27_776_794,
        "small": 30_657_394,
        "base": 51_971_554,
        "large": 91_971_184,
    }

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (1, 1, 8, 6),
        heads: Sequence[int] = (2, 4, 8, 16),
        *,
        group: int = 7,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stages = []
        for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            before, kernels = (channels, (4, 8, 16, 32)) if i == 0 else (dim << (i - 1), (2, 4))
            stages.append(Stage(before, dim << i, depth, count, group=group, kernels=kernels, first=i == 0))
        super().__init__(stages, dim << (len(depths) - 1), classes=classes, norm=nn.Identity())
        # The normalisation comes before the mean over the tokens.
        self.last = nn.LayerNorm(dim << (len(depths) - 1))
        initialise(self)

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        return self.head(self.last(to_tokens(self.features(images)[-1])[0]).mean(1))


CrossFormer.network = Network
