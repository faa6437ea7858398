"""Twins: attention inside windows, and of all tokens on one summary a window, in turn.

Chu, Tian, Wang, Zhang, Ren, Wei, Xia, Shen, "Twins: Revisiting the Design of Spatial Attention in Vision
Transformers", 2021, arXiv 2104.13840. Spatially separable self-attention is two layers, on a map of H x W tokens:

    LSA   y_i = softmax(q_i K_w^T / sqrt(d)) V_w           the keys of its own k x k window; no shift, no bias
    GSA   Z'  = LayerNorm(conv(Z)),  kernel = stride = r   (H W / r^2, dim)  one summary for each window of r x r
          y_i = softmax(q_i K'^T / sqrt(d)) V'             K', V' of Z'; all tokens read all summaries

LSA costs O(k^2 n d) and GSA O(n^2 d / r^2). `Twins` is GSA, and LSA where ``window`` is given (which has a causal
form, and takes any mask). In GSA ``weights`` shows the weight of a summary as spread over the tokens of its window, and
``read`` sums it up again. Masked tokens are zero in the convolution, and summaries of nothing else are not read.
Without ``grid=(H, W)`` tokens are one row; so is a context.

`Network` is the paper's pyramid with a conditional position (depthwise 3 x 3, added) after the first block of each
stage: Twins-SVT of LSA and GSA in turn, Twins-PCPVT of GSA alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention import grouped
from crosslight.attention.backbone import Block, Pyramid, initialise, to_map, to_tokens
from crosslight.attention.base import AttentionLayer, How, head_width
from crosslight.attention.grouped import Cut, GroupCore, GroupLayer
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]
    Stream = Float[Tensor, "batch n dim"]
    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="twins",
    kind="token",
    group="sparse",
    title="Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
    year=2021,
    paper="2104.13840",
    code="Meituan-AutoML/Twins",
    summary="All tokens read one summary of each window, in turn with attention inside the windows.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="A summary is made of all tokens of its window, later ones too; and windows are of one map.",
    cost="n^2",
    mask="keys",
    small={"reduction": 2},
    checked="timm's LocallyGroupedAttn, GlobalSubSampleAttn and Twins with the same weights, and its parameter counts",
    differs="The cost is that of a fixed r; the paper's r falls with the resolution of the stage. At the border of a "
    "map that is no multiple of the window, LSA reads fewer keys (the released code: zeros, unmasked), and GSA fills "
    "up with zeros (there: leaves the rest out). Cross-attention of GSA, masks and the causal form of LSA are ours.",
    evidence=Evidence(
        claim="summaries of 2 x 2 pixels on 8 x 8 digits are not worse than full attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"reduction": 2},
    ),
)


#: Of LSA, which has more patterns and any mask.
LOCAL = replace(
    CARD,
    patterns=("noncausal-self", "causal-self"),
    why_not="Windows are of one map.",
    cost="n",
    mask="any",
    decode="state",
    small={"window": 4},
)


class LSA(GroupCore):
    """Softmax attention inside the windows of a grid; q, k, v (batch, heads, n, d).

    Args:
        window: side of the windows.
    """

    card = LOCAL

    def __init__(self, heads: int, head_dim: int, *, window: int = 7) -> None:
        expect(isinstance(window, int) and window >= 1, "window", window, "a positive int")
        super().__init__(heads, head_dim, window)


class Summaries(nn.Module):
    """The tokens of each window of r x r as one: a convolution of stride r, then LayerNorm."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        self.conv = nn.Conv2d(dim, dim, reduction, stride=reduction)
        self.norm = nn.LayerNorm(dim)

    def forward(self, z: Stream, grid: tuple[int, int]) -> Stream:
        # A convolution whose stride is its kernel is a linear map of windows.
        weight = self.conv.weight.permute(0, 2, 3, 1).flatten(1)
        windows = Cut(grid, (self.reduction, self.reduction)).split(z).flatten(1).unflatten(0, (len(z), -1))
        return self.norm(F.linear(windows, weight, self.conv.bias))


@register(CARD)
class Twins(GroupLayer):
    """GSA, or LSA.

    Args:
        dim, heads, kv_heads, head_dim, context_dim, bias: as in `AttentionLayer`.
        reduction: r, side of the windows that are summarised; 1 for plain attention.
        window: side of the windows of LSA, in place of GSA.
    """

    network: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        reduction: int = 8,
        window: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        expect(isinstance(reduction, int) and reduction >= 1, "reduction", reduction, "a positive int")
        head_dim = head_width(dim, heads, head_dim)
        core = Softmax(heads, head_dim) if window is None else LSA(heads, head_dim, window=window)
        super().__init__(core, dim, kv_heads=kv_heads, context_dim=context_dim, bias=bias)
        if window is not None:
            self.card = LOCAL  # type: ignore[misc]
        self.window, self.reduction = window, reduction if window is None else 1
        self.summaries = Summaries(self.context_dim, reduction) if self.reduction > 1 else None

    def _forward(self, x, context, how):
        if self.window is not None:
            return super()._forward(x, context, how)
        return AttentionLayer._forward(self, x, *self._summarised(context, how))

    def _weights(self, x, context, how):
        summarised, short = self._summarised(context, how)
        weights = super()._weights(x, summarised, short)
        if self.summaries is None:
            return weights
        cut, keep = self._cut(how, context.shape[1]), masks.split(how.mask)[1]
        share = context.new_ones(1, context.shape[1]) if keep is None else keep.to(context.dtype)
        window = cut.places(context.device)[0]
        count = share.new_zeros(len(share), summarised.shape[1]).index_add(1, window, share)
        share = share / count.clamp(min=1)[:, window]
        return weights[..., window] * share[:, None, None]

    def _read(self, weights, x, context, how):
        summarised, short = self._summarised(context, how)
        if self.summaries is not None:
            window = self._cut(how, context.shape[1]).places(context.device)[0]
            weights = weights.new_zeros(*weights.shape[:3], summarised.shape[1]).index_add(3, window, weights)
        return super()._read(weights, x, summarised, short)

    def _cut(self, how: How, m: int) -> Cut:
        sides = grouped.plane(None if how.cross else how.grid, m)
        return Cut(sides, (self.reduction, self.reduction))

    def _summarised(self, context: Stream, how: How) -> tuple[Stream, How]:
        """The stream that is read, and how: masked summaries in place of masked tokens."""
        if self.summaries is None:
            return context, how
        cut, keep = self._cut(how, context.shape[1]), masks.split(how.mask)[1]
        if keep is None:
            return self.summaries(context, cut.grid), How(None, how.causal, how.cross)
        members = cut.members(context.device)
        held = (keep[:, members.clamp(min=0)] & (members >= 0)).any(2)
        context = context.masked_fill(~keep.unsqueeze(-1), 0)
        return self.summaries(context, cut.grid), How(masks.keys(held), how.causal, how.cross)


class PositionedBlock(Block):
    """The pre-norm block, after which a convolution of the map may be added."""

    def __init__(self, dim: int, attend: nn.Module, mlp_ratio: float, positioned: bool) -> None:
        super().__init__(dim, attend, mlp_ratio, eps=1e-6)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if positioned else None

    def forward(self, x, grid):
        x = super().forward(x, grid)
        return x if self.position is None else x + to_tokens(self.position(to_map(x, grid)))[0]


class Stage(nn.Module):
    """Patches, normalised, then blocks."""

    def __init__(self, channels: int, dim: int, patch: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(channels, dim, patch, stride=patch), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Map) -> Map:
        tokens, grid = to_tokens(self.patches(x))
        tokens = self.norm(tokens)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return to_map(tokens, grid)


_PCPVT: dict[str, Any] = {
    "dims": [64, 128, 320, 512],
    "heads": [1, 2, 5, 8],
    "mlp_ratios": [8, 8, 4, 4],
    "window": None,
}


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits.

    Args:
        window: side of the windows of LSA, in every other block from the first on; None for GSA in all (PCPVT).
        reductions: r of each stage.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "svt_small": {"dims": [64, 128, 256, 512], "heads": [2, 4, 8, 16], "depths": [2, 2, 10, 4]},
        "svt_base": {"dims": [96, 192, 384, 768], "heads": [3, 6, 12, 24], "depths": [2, 2, 18, 2]},
        "svt_large": {"dims": [128, 256, 512, 1024], "heads": [4, 8, 16, 32], "depths": [2, 2, 18, 2]},
        "pcpvt_small": {**_PCPVT, "depths": [3, 4, 6, 3]},
        "pcpvt_base": {**_PCPVT, "depths": [3, 4, 18, 3]},
        "pcpvt_large": {**_PCPVT, "depths": [3, 8, 27, 3]},
    }
    published: ClassVar[dict[str, int]] = {
        "svt_small": 24_060_776,
        "svt_base": 56_070_952,
        "svt_large": 99_271_400,
        "pcpvt_small": 24_106_216,
        "pcpvt_base": 43_828_456,
        "pcpvt_large": 60_989_672,
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 10, 4),
        heads: Sequence[int] = (2, 4, 8, 16),
        *,
        window: int | None = 7,
        reductions: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = []
            for j in range(depth):
                attend = Twins(dim, heads[i], reduction=reductions[i], window=window if j % 2 == 0 else None)
                blocks.append(PositionedBlock(dim, attend, mlp_ratios[i], positioned=j == 0))
            stages.append(Stage(dims[i - 1] if i else channels, dim, 2 if i else 4, blocks))
        super().__init__(stages, dims[-1], classes=classes, norm=nn.LayerNorm(dims[-1], eps=1e-6))
        initialise(self)

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        return self.head(self.norm(to_tokens(self.features(images)[-1])[0]).mean(1))


Twins.network = Network
