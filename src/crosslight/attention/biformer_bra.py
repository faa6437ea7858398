"""Bi-level routing attention: regions choose the regions that they read, then tokens attend inside these.

Zhu, Wang, Ke, Zhang, Lau, "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023, arXiv 2303.08810.

A map of H x W tokens is cut into S x S regions. With all heads joined, d_r the mean over the tokens of a region:

    A_r = mean(Q) mean(K)^T                     (S^2, S^2)    how alike regions are; no gradient
    I_r = the top_k regions by A_r              (S^2, top_k)  shared by the tokens of a region and by the heads
    y   = W_o [softmax(Q K[I_r]^T / sqrt(d)) V[I_r] + LCE(V)]

where K[I_r] are all tokens of the chosen regions, gathered, and LCE is a depthwise 5 x 5 convolution of the values.
Gate and attention cost S^4 + top_k (H W)^2 / S^2, which is O((H W)^(4/3)) at S^2 = (top_k (H W)^2 / 2)^(1/3):
``regions=None``. With top_k = S^2 it is full attention + LCE, as in the paper's last stage.

Shapes (batch, heads, n, d) with ``grid=(H, W)``; without it tokens are one row of S^2 regions. In cross-attention
regions of x choose regions of the context, which is one row, and there is no LCE, as the values stand elsewhere.

`Network` is the paper's pyramid; its block is x + conv3x3(x), x + BRA(norm x), x + MLP(norm x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.attention import grouped
from crosslight.attention.backbone import Block, Pyramid, initialise, to_map, to_tokens
from crosslight.attention.base import Core
from crosslight.attention.grouped import Cut
from crosslight.attention.local import LocalLayer
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.backend import forced
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Heads = Float[Tensor, "batch heads n dim"]
    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="biformer-bra",
    kind="token",
    group="sparse",
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    year=2023,
    paper="2303.08810",
    code="rayleizhu/BiFormer",
    summary="The tokens of a region read all tokens of the few regions whose mean key suits the region's mean query.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="A region chooses by the mean of its queries, so what a token reads depends on later ones.",
    cost="n sqrt n",
    mask="keys",
    small={"regions": None, "top_k": 2},
    checked="the equations written out region by region; full attention + LCE when all regions are chosen; the "
    "published parameter counts of the three sizes",
    differs="Scores are divided by the square root of a head's width; the released code takes that of all heads. Its "
    "last stage convolves the input instead of the values and has 8 heads and no biases there; here it is the paper's, "
    "all regions chosen. Masked tokens do not enter the means. Regions of maps that are no multiple of S, and "
    "cross-attention, are ours. The cost is that of regions=None; at a fixed S it is n^2.",
    evidence=Evidence(
        claim="4 of 16 regions of 8 x 8 digits are not worse than full attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"regions": 4, "top_k": 4},
    ),
)


class BRALayer(LocalLayer):
    """The layer around `BRA`, which adds the convolution of the values."""

    def __init__(self, core: BRA, dim: int, **own: Any) -> None:
        super().__init__(core, dim, kernel=core.lce, name="lce", **own)


@register(CARD)
class BRA(Core):
    """q (batch, heads, n, d), k and v (batch, heads, m, d).

    Args:
        regions: S, regions on an axis; None for the number at which the cost is least.
        top_k: regions that a region reads; None for all.
        lce: side of the layer's convolution, an odd number; 0 for none.
    """

    takes_grid = True
    layer = BRALayer
    network: ClassVar[type[nn.Module]]

    def __init__(
        self, heads: int, head_dim: int, *, regions: int | None = 7, top_k: int | None = 4, lce: int = 5
    ) -> None:
        super().__init__(heads, head_dim)
        expect(regions is None or regions >= 1, "regions", regions, "a positive int, or None")
        expect(top_k is None or top_k >= 1, "top_k", top_k, "a positive int, or None")
        expect(lce == 0 or (lce > 0 and lce % 2 == 1), "lce", lce, "an odd number, or 0")
        self.regions, self.top_k, self.lce = regions, top_k, lce

    def cut(self, n: int, grid: Any = None) -> Cut:
        """The regions of n tokens."""
        sides = grouped.plane(grid, n)
        count: float = self.regions or ((self.top_k or 1) * n * n / 2) ** (1 / 6)
        if grid is None:  # as many regions as a map would have
            return Cut(sides, (1, math.ceil(n / count**2)))
        return Cut(sides, (math.ceil(sides[0] / count), math.ceil(sides[1] / count)))

    def extra(self, how):
        # Of x itself, padding is known; that of a context says nothing of the queries.
        return {"asking": None if how.cross else masks.split(how.mask)[1], "cross": how.cross}

    def forward(self, q, k, v, *, mask=None, causal=False, grid=None, asking=None, cross=False):
        if forced() == "reference":
            return self.weights(q, k, mask=mask, grid=grid, asking=asking, cross=cross) @ v
        of_q, of_k = self._cuts(q, k, grid, cross)
        if self.top_k is None or self.top_k >= of_k.count[0] * of_k.count[1]:
            return dense.attend(q, k, v, mask=mask)
        keep, queries, keys = masks.split(mask)[1], of_q.members(q.device), of_k.members(q.device)
        region_k, chosen = grouped.take(k, keys), self._choose(q, k, queries, keys, keep, asking)

        def gather(x: Tensor) -> Tensor:  # (batch, heads, regions, cells, d) -> (batch * regions of q, ..., d)
            batch, heads, regions, cells, dim = x.shape
            table = x.transpose(1, 2).reshape(batch * regions, -1)
            row = chosen.clamp(min=0) + torch.arange(batch, device=x.device).view(-1, 1, 1) * regions
            y = table.index_select(0, row.flatten()).view(-1, chosen.shape[2], heads, cells, dim)
            return y.transpose(1, 2).flatten(2, 3)

        there = (keys >= 0)[None] if keep is None else (keys >= 0) & keep[:, keys.clamp(min=0)]
        there = there.expand(len(q), -1, -1)[torch.arange(len(q), device=q.device).view(-1, 1, 1), chosen.clamp(min=0)]
        there = (there & (chosen >= 0)[..., None]).flatten(2).flatten(0, 1)
        own = grouped.take(q, queries).transpose(1, 2).flatten(0, 1)
        y = dense.attend(own, gather(region_k), gather(grouped.take(v, keys)), mask=masks.keys(there))
        return grouped.put_back(y.unflatten(0, (len(q), -1)).transpose(1, 2), queries, q.shape[2])

    def weights(self, q, k, *, mask=None, causal=False, grid=None, asking=None, cross=False):
        of_q, of_k = self._cuts(q, k, grid, cross)
        regions = of_k.count[0] * of_k.count[1]
        if self.top_k is None or self.top_k >= regions:
            return dense.weights(q, k, mask=mask)
        queries, keys = of_q.members(q.device), of_k.members(q.device)
        chosen = self._choose(q, k, queries, keys, masks.split(mask)[1], asking)
        table = torch.zeros(len(q), len(queries), regions + 1, dtype=torch.bool, device=q.device)
        table = table.scatter(-1, chosen.masked_fill(chosen < 0, regions), True)
        seen = table[:, of_q.places(q.device)[0]][:, :, of_k.places(q.device)[0]]
        return dense.weights(q, k, mask=masks.join(masks.Pairs(seen[:, None]), mask))

    def read(self, weights, v, *, grid=None):
        return super().read(weights, v)

    def _cuts(self, q: Heads, k: Heads, grid: Any, cross: bool) -> tuple[Cut, Cut]:
        # A context is one row, be it by chance as long as the map.
        same = not cross and q.shape[2] == k.shape[2]
        return self.cut(q.shape[2], grid), self.cut(k.shape[2], grid if same else None)

    @torch.no_grad()
    def _choose(
        self, q: Heads, k: Heads, queries: Tensor, keys: Tensor, keep: Tensor | None, asking: Tensor | None
    ) -> Int[Tensor, "batch regions choices"]:
        """The regions that each region reads, -1 for none."""
        ask, _ = _means(q, queries, asking)
        answer, held = _means(k, keys, keep)
        scores = (ask @ answer.mT).masked_fill(~held[:, None], -math.inf)
        assert self.top_k is not None
        best = scores.topk(self.top_k, -1, sorted=False)
        return best.indices.masked_fill(best.values == -math.inf, -1)


def _means(
    x: Heads, members: Int[Tensor, "regions cells"], keep: Bool[Tensor, "batch n"] | None
) -> tuple[Float[Tensor, "batch regions width"], Bool[Tensor, "#batch regions"]]:
    """The mean of each region's tokens, heads joined, and which regions have a token."""
    there = (members >= 0)[None] if keep is None else (members >= 0) & keep[:, members.clamp(min=0)]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = (grouped.take(x, members) * there[:, None, :, :, None].to(x.dtype)).sum(3)
    count = there.sum(-1)
    return (sums / count.clamp(min=1)[:, None, :, None].to(x.dtype)).transpose(1, 2).flatten(2), count > 0


class RoutedBlock(Block):
    """x + conv3x3(x), which carries the positions, then the pre-norm block."""

    def __init__(self, dim: int, attend: nn.Module, mlp_ratio: float) -> None:
        super().__init__(dim, attend, mlp_ratio, eps=1e-6)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, grid):
        image = to_map(x, grid)
        return super().forward(to_tokens(image + self.position(image))[0], grid)


class Stage(nn.Module):
    """Convolutions that lower the resolution, then blocks."""

    def __init__(self, down: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.down, self.blocks = down, nn.ModuleList(blocks)

    def forward(self, x: Map) -> Map:
        tokens, grid = to_tokens(self.down(x))
        for block in self.blocks:
            tokens = block(tokens, grid)
        return to_map(tokens, grid)


def halve(channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim))


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits.

    Args:
        dim: width of the first stage; it doubles from stage to stage.
        top_k: of each stage; None for full attention.
        head_dim: width of the heads.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"dim": 64, "depths": [2, 2, 8, 2]},
        "small": {"dim": 64, "depths": [4, 4, 18, 4]},
        "base": {"dim": 96, "depths": [4, 4, 18, 4]},
    }

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 8, 2),
        *,
        top_k: Sequence[int | None] = (1, 4, 16, None),
        regions: int = 7,
        head_dim: int = 32,
        mlp_ratio: float = 3,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stages = []
        for i, (depth, k) in enumerate(zip(depths, top_k, strict=True)):
            wide = dim << i
            down = halve(wide // 2, wide)
            if i == 0:
                down = nn.Sequential(*halve(channels, dim // 2), nn.GELU(), *down)
            routing: dict[str, Any] = {"head_dim": head_dim, "regions": regions, "top_k": k}
            blocks = [RoutedBlock(wide, BRA.build(wide, wide // head_dim, **routing), mlp_ratio) for _ in range(depth)]
            stages.append(Stage(down, blocks))
        super().__init__(stages, wide, classes=classes, norm=nn.BatchNorm2d(wide))
        initialise(self)

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        return self.head(self.norm(self.features(images)[-1]).mean((2, 3)))


BRA.network = Network
