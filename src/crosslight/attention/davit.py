"""DaViT: attention of tokens inside windows, and of channels inside groups over all tokens, in turn.

Ding, Xiao, Codella, Luo, Wang, Yuan, "DaViT: Dual Attention Vision Transformers", 2022, arXiv 2204.03645.

    spatial   y_i = softmax(q_i K_w^T / sqrt(d)) V_w        keys of the own 7 x 7 window, as `LSA` of Twins
    channel   A = softmax(Q^T K / sqrt(d)),   y_i = A v_i    (d, d) of each group of d = 32 channels

The row is the channel attention: heads are groups of channels, and a channel takes from the channels of its group by
how alike they are over the whole map. All of a token's exchange with others goes through A; the cost is O(n dim d), and
``weights`` are d * d diagonals a group, as those of `xcit`. Queries and keys are not normalised as they are there, so
that A grows sharper with more tokens. Masked tokens do not enter A, and their own output is zero.

`Network` is the paper's pyramid of both in turn; its block is x + conv3x3(x), x + attend(norm x), x + conv3x3(x),
x + MLP(norm x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import nn

from crosslight.attention.backbone import Block, Pyramid, initialise, to_map, to_tokens
from crosslight.attention.twins import LSA
from crosslight.attention.xcit import ChannelCore, running_sum
from crosslight.cards import Card, Evidence
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="davit",
    kind="token",
    group="linear",
    title="DaViT: Dual Attention Vision Transformers",
    year=2022,
    paper="2204.03645",
    code="dingmyu/davit",
    summary="Channels attend to the channels of their group, with all positions as their features.",
    patterns=("noncausal-self", "causal-self"),
    why_not="Keys and queries are multiplied token by token, so both come from one stream.",
    cost="n",
    mask="keys",
    decode="state",
    checked="timm's ChannelAttention and DaVit with the same weights, and its parameter counts",
    differs="The released code calls queries what are values here, keys what are queries, and values what are keys. At "
    "the border of a map that is no multiple of the window, the spatial attention reads fewer keys; there, zeros. The "
    "causal form, decoding and masks are ours.",
    evidence=Evidence(
        claim="channel attention reads 8 x 8 digits not worse than token attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
    ),
)


@register(CARD)
class ChannelGroups(ChannelCore):
    """q, k, v (batch, groups, n, d): heads are the groups of channels."""

    network: ClassVar[type[nn.Module]]

    def channels(self, q, k):
        scores = q.mT @ k * self.head_dim**-0.5
        # Sums over thousands of tokens lie far apart. Weights below 1e-30 count nothing, but they and their gradients
        # may be subnormal numbers, on which the products are many times slower.
        return (scores - scores.detach().amax(-1, keepdim=True)).clamp(min=-69).softmax(-1)

    def running(self, q, k, state):
        pairs = running_sum(q.unsqueeze(-1) * k.unsqueeze(-2), state[0] if state else None)
        return (pairs * self.head_dim**-0.5).softmax(-1).to(q.dtype), (pairs[:, :, -1],)


class DualBlock(Block):
    """The pre-norm block on a map, with a convolution before the attention and another before the MLP."""

    def __init__(self, dim: int, attend: nn.Module, mlp_ratio: float) -> None:
        super().__init__(dim, attend, mlp_ratio)
        self.position1, self.position2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))

    def forward(self, x: Map, grid: Any = None) -> Map:
        x, grid = to_tokens(x + self.position1(x))
        x = to_map(x + self.attend(self.norm1(x), grid=grid), grid)
        x = to_tokens(x + self.position2(x))[0]
        return to_map(x + self.mlp(self.norm2(x)), grid)


class Patches(nn.Module):
    """The first embedding: 7 x 7 of stride 4, then LayerNorm. A later one: LayerNorm, then 2 x 2 of stride 2."""

    def __init__(self, channels: int, dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.LayerNorm(dim if first else channels)
        self.conv = nn.Conv2d(channels, dim, 7, 4, 3) if first else nn.Conv2d(channels, dim, 2, 2)

    def forward(self, x: Map) -> Map:
        if not self.first:
            x = to_map(self.norm(to_tokens(x)[0]), (x.shape[2], x.shape[3]))
        stride = self.conv.stride[0]
        x = self.conv(F.pad(x, (0, -x.shape[3] % stride, 0, -x.shape[2] % stride)))
        return to_map(self.norm(to_tokens(x)[0]), (x.shape[2], x.shape[3])) if self.first else x


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits.

    Args:
        dim: width of the first stage; it doubles from stage to stage.
        depths: pairs of a spatial and a channel block in each stage.
        head_dim: width of the heads and of the groups of channels.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"dim": 96, "depths": [1, 1, 3, 1]},
        "small": {"dim": 96, "depths": [1, 1, 9, 1]},
        "base": {"dim": 128, "depths": [1, 1, 9, 1]},
        "large": {"dim": 192, "depths": [1, 1, 9, 1]},
        "huge": {"dim": 256, "depths": [1, 1, 9, 1]},
        "giant": {"dim": 384, "depths": [1, 1, 12, 3]},
    }
    published: ClassVar[dict[str, int]] = {
        "tiny": 28_360_168,
        "small": 49_745_896,
        "base": 87_954_408,
        "large": 196_811_752,
        "huge": 348_922_856,
        "giant": 1_406_470_120,
    }

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (1, 1, 3, 1),
        *,
        window: int = 7,
        head_dim: int = 32,
        mlp_ratio: float = 4,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stages = []
        for i, depth in enumerate(depths):
            wide = dim << i
            modules: list[nn.Module] = [Patches(wide // 2 if i else channels, wide, i == 0)]
            for _ in range(depth):
                spatial = LSA.build(wide, wide // head_dim, window=window)
                channel = ChannelGroups.build(wide, wide // head_dim)
                modules += [DualBlock(wide, attend, mlp_ratio) for attend in (spatial, channel)]
            stages.append(nn.Sequential(*modules))
        super().__init__(stages, wide, classes=classes)
        initialise(self)


ChannelGroups.network = Network
