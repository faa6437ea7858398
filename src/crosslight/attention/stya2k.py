"""All-to-key attention: pixels read one key for each region of the style, and the pixels of one matched region.

Zhu et al., "All-to-key Attention for Arbitrary Style Transfer", 2022, arXiv 2212.04105.

Content x and style z are maps, cut into regions of p x p pixels; n(.) normalises each channel over the map.

    distributed    q, k, v = W_q n(x), W_k n(z), W_v z                                    a head; no 1/sqrt(d)
                   c_R = mean of k over region R;   u_j = sigmoid(alpha k_j . c_R + beta)
                   k_R = (c_R + sum_{j in R} u_j k_j) / (p^2 + 1),    v_R likewise
                   D_i = sum_R softmax_R(q_i . k_R) v_R                                    each pixel reads all regions
    progressive    q', k', v' of their own weights
                   R(S) = argmax_R sum_t q'_{S,t} . k'_{R,t}           each region S takes the region most like it
                   P_i = sum_{j in R(S)} softmax_j(q'_i . k'_j) v'_j   for i in S
    y = W_d D + W_p P                                          (batch, n, dim); the paper adds x

``grid`` is the shape of x; without one the regions are runs of p^2 tokens. `weights` shows both branches, first the
heads of D, whose pooling it holds, then those of P. Time is n * m / p^2 and n * p^2: n sqrt(n) with p^2 near sqrt(n).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Stream = Float[Tensor, "batch n dim"]
    Keep = Bool[Tensor, "batch m"]
    #: Tokens by region.
    Regions = Float[Tensor, "batch heads regions pixels head_dim"]

CARD = Card(
    id="stya2k",
    kind="token",
    group="sparse",
    title="All-to-key Attention for Arbitrary Style Transfer",
    year=2022,
    paper="2212.04105",
    code="LearningHx/StyA2K",
    summary="Each pixel reads one pooled key for each region, and the pixels of the one region that matches its own.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="Queries are normalised over the whole map and choose region by region.",
    cost="n sqrt n",
    mask="keys",
    small={"region": 4},
    checked="both branches written out pixel by pixel; dense attention with regions of one pixel",
    differs="The residual and the networks around the layer are the caller's. Maps that are no multiple of the regions "
    "get smaller ones at the border, and padding is left out of all means. The cost holds for regions that grow with "
    "the map; at fixed ones it is n^2 / region^2.",
    evidence=Evidence(
        claim="digits are read about as well as by softmax attention, with a quarter of the keys and one region",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"region": 2},
    ),
)


class Tiles:
    """The regions of a map: which tokens each holds, -1 at a border, and where each token lies."""

    def __init__(self, length: int, side: int, grid: Grid | None, device: torch.device) -> None:
        token = torch.arange(length, device=device)
        if grid is None:
            index = F.pad(token, (0, -length % side**2), value=-1).view(-1, side**2)
        else:
            height, width = grid
            index = F.pad(token.view(height, width), (0, -width % side, 0, -height % side), value=-1)
            index = index.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2).flatten(2).flatten(0, 1)
        self.index: Int[Tensor, "regions pixels"] = index
        flat = index.flatten()
        # The empty places write to one place too many.
        self.place = flat.new_zeros(length + 1).scatter(
            0, flat.masked_fill(flat < 0, length), torch.arange(flat.shape[0], device=device)
        )[:length]

    def cut(self, t: Float[Tensor, "batch heads n head_dim"]) -> Regions:
        return t[:, :, self.index.clamp(min=0)]

    def joined(self, t: Regions) -> Float[Tensor, "batch heads n head_dim"]:
        return t.flatten(2, 3)[:, :, self.place]

    def keep(self, keep: Keep | None) -> Bool[Tensor, "#batch 1 regions pixels"]:
        there = (self.index >= 0)[None, None]
        return there if keep is None else there & keep[:, None, self.index.clamp(min=0)]


def normalised(x: Stream, keep: Keep | None, eps: float = 1e-5) -> Stream:
    """Each channel with mean 0 and variance 1 over the tokens that are kept."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if keep is None:
        weight, count = torch.ones_like(wide[..., :1]), wide.new_full((), x.shape[1])
    else:
        weight = keep.unsqueeze(-1).to(wide.dtype)
        count = weight.sum(1, keepdim=True)
    mean = (wide * weight).sum(1, keepdim=True) / count.clamp(min=1)
    variance = ((wide - mean) ** 2 * weight).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return ((wide - mean) / (variance + eps).sqrt()).to(x.dtype)


@register(CARD)
class AllToKey(Mechanism):
    """x (batch, n, dim) reads context (batch, m, context_dim).

    Args:
        heads: of both branches.
        region: p, the side of a region in pixels.
        context_grid: the shape of the context; that of x if it has as many tokens, otherwise a line.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        context_dim: int | None = None,
        region: int = 8,
        context_grid: Grid | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "dim", dim, f"a multiple of heads = {heads}")
        expect(isinstance(region, int) and region >= 1, "region", region, "a number >= 1")
        self.heads, self.region, self.context_grid = heads, region, context_grid
        self.q, self.q2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k, self.v, self.k2, self.v2 = (nn.Linear(self.context_dim, dim) for _ in range(4))
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.out, self.out2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def _split(self, t: Stream) -> Float[Tensor, "batch heads n head_dim"]:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _tiles(self, x: Stream, context: Stream, how: How) -> tuple[Tiles, Tiles]:
        grid, m = how.grid, context.shape[1]
        expect(grid is None or len(grid) == 2, "grid", grid, "(height, width)")
        other = grid if m == x.shape[1] else None
        if how.cross and self.context_grid is not None:
            other = self.context_grid
            expect(math.prod(other) == m, "context_grid", other, f"sides whose product is the {m} tokens of context")
        here = Tiles(x.shape[1], self.region, grid, x.device)
        return here, here if not how.cross else Tiles(m, self.region, other, x.device)

    def _streams(self, x: Stream, context: Stream, how: How) -> tuple[Stream, Stream, Keep | None]:
        """Both streams normalised, and the keys that may be read."""
        keep = masks.split(how.mask)[1]
        z = normalised(context, keep)
        return (normalised(x, None) if how.cross else z), z, keep

    def _shares(self, k: Regions, keep: Bool[Tensor, "..."]) -> Float[Tensor, "batch heads regions pixels"]:
        """How much of each pixel is in the key of its region."""
        count = keep.sum(-1, keepdim=True).to(k.dtype)
        even = keep.to(k.dtype) / count.clamp(min=1)
        centre = (even.unsqueeze(-2) @ k).transpose(-1, -2)
        near = (self.alpha * (k @ centre).squeeze(-1) + self.beta).sigmoid()
        return (near.masked_fill(~keep, 0.0) + even) / (count + 1)

    @staticmethod
    def _held(keep: Keep | None, tiles: Tiles) -> masks.Mask | None:
        return None if keep is None else masks.keys(tiles.keep(keep).any(-1).squeeze(1))

    @torch.no_grad()
    def _match(self, q: Regions, k: Regions, own: Tensor, keep: Tensor) -> Int[Tensor, "batch heads regions"]:
        """The region of the context that each region of x takes."""
        q, k = q * own.unsqueeze(-1).to(q.dtype), k * keep.unsqueeze(-1).to(k.dtype)
        likeness = q.flatten(3) @ k.flatten(3).transpose(-1, -2)
        return likeness.masked_fill(~keep.any(-1).unsqueeze(2), -math.inf).argmax(-1)

    def _near(self, x: Stream, z: Stream, keep: Keep | None, here: Tiles, there: Tiles, how: How):
        """Of the second branch: queries and keys by region, which keys may be read, and the matched regions."""
        q, k = here.cut(self._split(self.q2(x))), there.cut(self._split(self.k2(z)))
        seen = there.keep(keep)
        match = self._match(q, k, here.keep(None if how.cross else keep), seen)
        seen = seen.expand(match.shape[0], self.heads, -1, -1)
        return q, _matched(k, match), _matched(seen.unsqueeze(-1), match).squeeze(-1), match

    def _forward(self, x, context, how):
        here, there = self._tiles(x, context, how)
        x, z, keep = self._streams(x, context, how)
        k, v = there.cut(self._split(self.k(z))), there.cut(self._split(self.v(context)))
        share = self._shares(k, there.keep(keep)).unsqueeze(-2)
        k, v, q = (share @ k).squeeze(-2), (share @ v).squeeze(-2), self._split(self.q(x))
        far = dense.attend(q, k, v, mask=self._held(keep, there), scale=1.0)
        q, k, seen, match = self._near(x, z, keep, here, there, how)
        v = _matched(there.cut(self._split(self.v2(context))), match)
        rule = masks.Pairs(seen.flatten(0, 1).unsqueeze(2).expand(-1, -1, q.shape[3], -1))
        near = dense.attend(*(t.flatten(0, 1) for t in (q, k, v)), mask=rule, scale=1.0)
        return self._merge(far, here.joined(near.unflatten(0, (-1, self.heads))))

    def _merge(self, far: Tensor, near: Tensor) -> Stream:
        return self.out(far.transpose(1, 2).flatten(2)) + self.out2(near.transpose(1, 2).flatten(2))

    def _weights(self, x, context, how):
        here, there = self._tiles(x, context, how)
        n, m = x.shape[1], context.shape[1]
        x, z, keep = self._streams(x, context, how)
        k = there.cut(self._split(self.k(z)))
        share = self._shares(k, there.keep(keep))
        pooled = (share.unsqueeze(-2) @ k).squeeze(-2)
        far = dense.weights(self._split(self.q(x)), pooled, mask=self._held(keep, there), scale=1.0)
        far = far[..., there.place // self.region**2] * share.flatten(2)[:, :, None, there.place]
        q, k, seen, match = self._near(x, z, keep, here, there, how)
        near = here.joined(dense.softmax(q @ k.transpose(-1, -2), seen.unsqueeze(3)))
        column = there.index[match].unsqueeze(3).expand(-1, -1, -1, q.shape[3], -1)
        column = here.joined(column)
        full = near.new_zeros(*near.shape[:2], n, m + 1).scatter(-1, column.masked_fill(column < 0, m), near)
        return torch.cat([far, full[..., :m]], 1)

    def _read(self, weights, x, context, how):
        far, near = weights.chunk(2, 1)
        return self._merge(far @ self._split(self.v(context)), near @ self._split(self.v2(context)))


def _matched(t: Tensor, match: Int[Tensor, "batch heads regions"]) -> Tensor:
    """The regions of t, (batch, heads, regions, pixels, ...), that were matched."""
    return t.gather(2, match[..., None, None].expand(-1, -1, -1, *t.shape[3:]))
