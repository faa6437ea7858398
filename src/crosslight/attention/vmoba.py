"""VMoBA: mixture of block attention for video, with blocks of space and time and a budget that queries share.

Wu, Hou, Yang, Tao et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", 2025, arXiv 2506.23858.

Tokens are the cells of a grid (time, height, width), cut into boxes c; partitions take turns from layer to layer:

    "1d"  slabs of a few frames        "2d"  tiles of height and width, all frames        "3d"  boxes

    g_ic  = <q_i, mean of the keys of box c>          gate, a head                   (batch, heads, n, boxes)
    u     = (g - min g) / (max g - min g)             over all pairs (i, c) of a head
    M     = pairs of queries with their own box, and then the other pairs of a head by falling u, as few as reach
            sum_M u >= tau sum u
    y_i   = softmax(q_i K^T / sqrt(d)) V              over the keys of the boxes c with (i, c) in M

All queries of a head share one budget: strong ones read many boxes, weak ones their own only, and heads differ in how
much they read. tau = 1 reads everything, tau = 0 the own box alone. ``scope`` names over which pairs u is scaled and
ranked: all of a head ("head", the paper's choice), of a query, of a box, or "overall".

Tokens are moved so that a box is contiguous, and the boxes that queries chose are read by the routed engine.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, routed
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

CARD = Card(
    id="vmoba",
    kind="token",
    group="sparse",
    title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
    year=2025,
    paper="2506.23858",
    code="KwaiVGI/VMoBA",
    summary="Queries read boxes of a video: the strongest pairs of query and box, until they hold a given mass.",
    patterns=("noncausal-self",),
    why_not="Boxes are cut from the video's own grid, and all queries compete for one budget, later ones too.",
    cost="n^2",
    mask="keys",
    small={"cube": (1, 2, 2)},
    checked="the released code's selection written out pair by pair, for each scope; softmax under the boolean matrix "
    "of the selection with ragged boxes; softmax at tau = 1 and attention in boxes at tau = 0",
    differs="The released code keeps one pair of a head also where the own boxes hold enough, and ranks the pairs of a "
    "whole batch together; here each video has its own budget. Masked tokens take no part in means and ranking. Sizes "
    "of boxes and tau go with the latents, so the defaults are to be set. Without a grid, boxes are runs of as many "
    "tokens as `cube` holds.",
    evidence=Evidence(
        claim="Digits are read as well when only the strongest pairs of pixel and box are kept, up to half of the mass",
        task="digits",
        metric="accuracy",
        margin=-0.02,
        options={"cube": (1, 2, 4), "tau": 0.5},
    ),
)

#: Partitions from layer to layer.
CYCLE = ("1d", "2d", "3d")
SCOPES = ("head", "query", "block", "overall")


def partition_of(layer: int) -> str:
    """The partition of a layer of a network, counted from 0."""
    return CYCLE[layer % len(CYCLE)]


@register(CARD)
class VMoBA(Core):
    """softmax over the own box and those selected; q (batch, heads, n, d), k and v (batch, kv_heads, n, d).

    Args:
        partition: "1d", "2d" or "3d"; `partition_of` a layer.
        slab: frames of a slab.
        tile: height and width of a tile.
        cube: frames, height and width of a box.
        tau: share of a pool's mass that is kept.
        scope: over which pairs the mass is shared out: "head", "query", "block" or "overall".
    """

    grouped = True
    takes_grid = True

    def __init__(
        self,
        heads: int,
        head_dim: int,
        partition: str = "3d",
        slab: int = 2,
        tile: tuple[int, int] = (4, 13),
        cube: tuple[int, int, int] = (4, 4, 13),
        tau: float = 0.25,
        scope: str = "head",
    ) -> None:
        super().__init__(heads, head_dim)
        expect(partition in CYCLE, "partition", repr(partition), f"one of {', '.join(CYCLE)}")
        expect(slab >= 1, "slab", slab, "a number >= 1")
        expect(len(tile) == 2 and min(tile) >= 1, "tile", tile, "two numbers >= 1")
        expect(len(cube) == 3 and min(cube) >= 1, "cube", cube, "three numbers >= 1")
        expect(0 <= tau <= 1, "tau", tau, "a share between 0 and 1")
        expect(scope in SCOPES, "scope", repr(scope), f"one of {', '.join(SCOPES)}")
        self.partition, self.slab, self.tile, self.cube = partition, slab, tuple(tile), tuple(cube)
        self.tau, self.scope = tau, scope

    def boxes(self, n: int, grid: Grid | None, device: torch.device) -> tuple[Int[Tensor, " n"], int, int]:
        """The place of each token when boxes are contiguous, how many boxes there are, and places in each."""
        if grid is None:
            sides: Grid = (1, 1, n)
            box: Grid = (1, 1, math.prod(self.cube))
        else:
            expect(len(grid) <= 3, "grid", grid, "(time, height, width), or less")
            sides = (*(1,) * (3 - len(grid)), *grid)
            of = {"1d": (self.slab, *sides[1:]), "2d": (sides[0], *self.tile), "3d": self.cube}
            box = of[self.partition]
        box = tuple(min(b, side) for b, side in zip(box, sides, strict=True))
        counts = [-(-side // b) for b, side in zip(box, sides, strict=True)]
        token = torch.arange(n, device=device)
        cells = (token // (sides[1] * sides[2]), token // sides[2] % sides[1], token % sides[2])
        number, inside = torch.zeros_like(token), torch.zeros_like(token)
        for cell, b, count in zip(cells, box, counts, strict=True):
            number, inside = number * count + cell // b, inside * b + cell % b
        size = math.prod(box)
        return number * size + inside, math.prod(counts), size

    @torch.no_grad()
    def select(
        self, q: Tensor, k: Tensor, place: Tensor, count: int, size: int, keep: Tensor | None
    ) -> Bool[Tensor, "batch heads n boxes"]:
        """The pairs of queries and boxes that are kept beside those of the own box."""
        own = torch.nn.functional.one_hot(place // size, count)
        wide = torch.promote_types(q.dtype, torch.float32)
        member = own.to(wide)[None].expand(k.shape[0], -1, -1)
        asks = torch.ones(1, 1, q.shape[2], 1, dtype=torch.bool, device=q.device)
        if keep is not None:
            member, asks = member * keep[..., None].to(wide), keep[:, None, :, None]
        keys = member.sum(1)
        sums = member.transpose(1, 2)[:, None] @ k.to(wide)
        means = dense.repeat_heads(sums / keys.clamp(min=1)[:, None, :, None], q.shape[1])
        gate = q.to(wide) @ means.transpose(-1, -2)
        valid = (asks & (keys > 0)[:, None, None]).expand_as(gate)
        shape = gate.shape
        own = (own > 0).expand_as(gate)
        gate, valid, own = (self._pooled(t) for t in (gate, valid, own))
        low = gate.masked_fill(~valid, math.inf).amin(-1, keepdim=True)
        span = gate.masked_fill(~valid, -math.inf).amax(-1, keepdim=True) - low
        mass = ((gate - low) / torch.where(span > 0, span, 1.0)).masked_fill(~valid, 0.0)
        ranked, order = mass.masked_fill(own | ~valid, -1.0).sort(descending=True)
        picked = ranked >= 0
        if self.tau < 1:
            before = ranked.clamp(min=0).cumsum(-1) - ranked.clamp(min=0)
            needed = self.tau * mass.sum(-1, keepdim=True) - (mass * own).sum(-1, keepdim=True)
            picked = picked & (before < needed)
        return self._unpooled(torch.zeros_like(picked).scatter(-1, order, picked), shape)

    def _pooled(self, t: Tensor) -> Tensor:
        """(batch, heads, n, boxes) -> (batch, pools, pairs)."""
        if self.scope == "block":
            return t.permute(0, 3, 1, 2).flatten(2)
        return {"head": t.flatten(2), "query": t.flatten(1, 2), "overall": t.flatten(1)[:, None]}[self.scope]

    def _unpooled(self, t: Tensor, shape: torch.Size) -> Tensor:
        if self.scope == "block":
            return t.view(shape[0], shape[3], shape[1], shape[2]).permute(0, 2, 3, 1)
        return t.view(shape)

    def forward(self, q, k, v, *, mask=None, causal=False, grid=None):
        n, keep = q.shape[2], masks.split(mask)[1]
        place, count, size = self.boxes(n, grid, q.device)
        picked = self.select(q, k, place, count, size, keep)
        chosen = torch.where(picked, torch.arange(count, device=q.device), -1)
        # Tokens are moved box by box; the places of a box that sticks out of the grid stay empty.
        at = torch.full((count * size,), -1, device=q.device).scatter(0, place, torch.arange(n, device=q.device))
        index, filled = at.clamp(min=0), at >= 0
        q, k, v = (t.index_select(2, index) for t in (q, k, v))
        chosen = chosen.index_select(2, index).masked_fill(~filled[:, None], -1)
        rule = None
        if keep is not None:
            rule = masks.Keys(keep.index_select(1, index) & filled)
        elif count * size > n:
            rule = masks.Keys(filled.expand(q.shape[0], -1))
        own = masks.join(masks.same_block(size), rule)
        return routed.attend(q, k, v, chosen, size, mask=rule, always=own)[0].index_select(2, place)

    def visible(self, q: Tensor, k: Tensor, keep: Tensor | None, grid: Grid | None) -> Bool[Tensor, "batch heads n n"]:
        """The boolean matrix of the selection, own boxes included."""
        place, count, size = self.boxes(q.shape[2], grid, q.device)
        picked, box = self.select(q, k, place, count, size, keep), place // size
        return picked[..., box] | (box[:, None] == box)

    def weights(self, q, k, *, mask=None, causal=False, grid=None):
        visible = masks.Pairs(self.visible(q, k, masks.split(mask)[1], grid))
        return dense.weights(q, k, mask=masks.join(visible, mask))

    def read(self, weights, v, *, grid=None):
        return super().read(weights, v)
