"""Unidirectional block attention (UniBA): a block of the map reads itself and its neighbours above and to the left.

Yang, Jiang, Hong, Teng, Zheng, Dong, Ding, Tang, "Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient
Diffusion Transformer", 2024, arXiv 2405.04312.

A map of tokens is cut into blocks of b x b. With Q, K, V of block (r, c), per head:

    Q, K    = rope2d(LayerNorm(Q)), rope2d(LayerNorm(K))
    K'(r,c) = [K(r,c) + p_1, K(r-1,c-1) + p_2, K(r,c-1) + p_3, K(r-1,c) + p_4]         4 b^2 keys, p_i learned
    y       = softmax(Q K'^T / sqrt(d)) V',   V' the values of the same four blocks

At the border a missing neighbour is the edge block once more. Through depth information flows from all of the upper
left, and to compute a row of blocks a layer needs the keys and values of the row above alone: `UniBALayer.rows` works
through an image of any height in memory that grows with its width.

Shapes (batch, heads, n, d) with ``grid=(H, W)``; without it tokens are one row. Of the model around it (AdaLN blocks,
CLIP condition, cross-attention to the low-resolution blocks in the first layer) nothing is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosslight.attention import grouped
from crosslight.attention.base import AttentionLayer, Core
from crosslight.attention.grouped import Cut
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Heads = Float[Tensor, "batch heads n dim"]
    Stream = Float[Tensor, "batch n dim"]

CARD = Card(
    id="inf-dit",
    kind="token",
    group="sparse",
    title="Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient Diffusion Transformer",
    year=2024,
    paper="2405.04312",
    code="THUDM/Inf-DiT",
    summary="A block of the map reads itself and its left, top and left-top neighbours, so that rows of blocks can be "
    "computed one after another in memory that does not grow with the height.",
    patterns=("noncausal-self", "causal-self"),
    why_not="The neighbours of a block are blocks of the same map.",
    cost="n",
    decode="state",
    small={"block": 4},
    checked="the equations written out block by block; rows of blocks from cached keys against all at once; gradients "
    "to blocks below and to the right; full attention when there is one block",
    differs="Queries and keys have LayerNorms of their own; in the released code keys use that of the queries. "
    "Rotations start at 0, without the random offset of training. The default block is 128 pixels in patches of 4. "
    "Maps that are no multiple of the block, any mask, and the causal form (nothing later in reading order) are ours; "
    "`step` takes tokens as one row. The cross-attention to low-resolution blocks is left out.",
    evidence=Evidence(
        claim="4 x 4 blocks that read to the upper left are not worse than full attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"block": 4},
    ),
)


@dataclass
class Rows:
    """What `UniBALayer.rows` carries: how many rows of tokens are done, and the last row of blocks."""

    done: int
    k: Float[Tensor, "batch heads blocks cells dim"]
    v: Float[Tensor, "batch heads blocks cells dim"]


@dataclass
class Tail:
    """What decoding of one row of tokens carries: keys and values from the start of the block before the current."""

    length: int
    k: Heads
    v: Heads


class UniBALayer(AttentionLayer):
    """The layer around `UniBA`, which can also work through a map from the top."""

    core: UniBA

    def rows(self, x: Stream, cache: Rows | None = None, *, width: int) -> tuple[Stream, Rows]:
        """The next rows of a map, whole rows of blocks (only the last ones may be shorter).

        Args:
            x: (batch, height * width, dim), the rows below those that ``cache`` stands for.
            cache: None at the top, then what the previous call returned.
        """
        self._check_stream("x", x, self.dim)
        expect(self.position is None, "position", type(self.position).__name__, "None, as `rows` has no other rotation")
        expect(x.shape[1] % width == 0, "width", width, f"a divisor of the {x.shape[1]} tokens of x")
        q, k, v = (dense.repeat_heads(t, self.heads) for t in (self._queries(x), self._keys(x), self._values(x)))
        y, cache = self.core.rows(q, k, v, cache, (x.shape[1] // width, width))
        return self._merge(y, x), cache


@register(CARD)
class UniBA(Core):
    """q, k, v (batch, heads, n, d), d a multiple of 4 if ``rotary``.

    Args:
        block: b, cells of a block on an axis.
        rotary: turn queries and keys by their row and column.
        base: of the rotation.
    """

    takes_grid = True
    layer = UniBALayer

    def __init__(
        self, heads: int, head_dim: int, *, block: int = 32, rotary: bool = True, base: float = 10_000.0
    ) -> None:
        super().__init__(heads, head_dim)
        expect(isinstance(block, int) and block >= 1, "block", block, "a positive int")
        expect(not rotary or head_dim % 4 == 0, "head_dim", head_dim, "a multiple of 4 (or rotary=False)")
        self.block, self.rotary, self.base = block, rotary, base
        self.norm_q, self.norm_k = nn.LayerNorm(head_dim, eps=1e-6), nn.LayerNorm(head_dim, eps=1e-6)
        #: Added to the keys of the own block and its left-top, left and top neighbour.
        self.relation = nn.Parameter(torch.zeros(heads, 4, head_dim))

    def forward(self, q, k, v, *, mask=None, causal=False, grid=None):
        if forced() == "reference":
            return self.weights(q, k, mask=mask, causal=causal, grid=grid) @ v
        cut = self._cut(grouped.plane(grid, q.shape[2]))
        q, k = self._placed(q, k, cut.grid)
        members = cut.members(q.device)
        blocks = grouped.take(k, members), grouped.take(v, members)
        mask = masks.join(masks.causal() if causal else None, mask)
        return self._attend(q, *blocks, cut, members, members, mask)

    def weights(self, q, k, *, mask=None, causal=False, grid=None):
        cut = self._cut(grouped.plane(grid, q.shape[2]))
        q, k = self._placed(q, k, cut.grid)
        number = cut.places(q.device)[0]
        keep = _neighbours(cut.count, False, q.device)[number].T[:, :, None] == number  # (4, n, m)
        seen = dense.visible(q, k, mask, causal)
        keep = keep if seen is None else keep & seen.unsqueeze(2)
        scores = dense.scores(q, k).unsqueeze(2) + self._to_relations(q)
        # One softmax over the keys of all four neighbours, of which a border has several copies.
        row = dense.softmax(scores.transpose(2, 3).flatten(3), keep.expand(scores.shape).transpose(2, 3).flatten(3))
        return row.unflatten(3, (4, -1)).sum(3)

    def read(self, weights, v, *, grid=None):
        return super().read(weights, v)

    def rows(self, q: Heads, k: Heads, v: Heads, state: Rows | None, sides: tuple[int, int]) -> tuple[Heads, Rows]:
        """The next rows of blocks, see `UniBALayer.rows`."""
        done = 0 if state is None else state.done
        expect(done % self.block == 0, "x", f"rows after {done}", f"rows after a multiple of block = {self.block}")
        cut = Cut(sides, (self.block, self.block))
        q, k = self._placed(q, k, sides, done * sides[1])
        members = cut.members(q.device)
        k, v = grouped.take(k, members), grouped.take(v, members)
        after = Rows(done + sides[0], k[:, :, -cut.count[1] :].clone(), v[:, :, -cut.count[1] :].clone())
        listed = members
        if state is not None:
            expect(state.k.shape[2] == cut.count[1], "width", sides[1], "that of the rows before")
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            above = Cut((self.block, sides[1]), cut.size).members(q.device)  # says which places are empty
            listed = torch.cat([above, members])
        return self._attend(q, k, v, cut, members, listed), after

    def step(self, q, k, v, state=None, **extra):
        length = 0 if state is None else state.length
        q, k = self._placed(q, k, (1, length + 1), length)
        if state is not None:
            start = self.block if length % self.block == 0 and length > self.block else 0  # two blocks are complete
            k, v = torch.cat([state.k[:, :, start:], k], 2), torch.cat([state.v[:, :, start:], v], 2)
        own = length % self.block + 1
        left = slice(0, self.block) if length >= self.block else slice(0, own)
        parts = [slice(k.shape[2] - own, None), left, left, slice(k.shape[2] - own, None)]
        keys = torch.cat([k[:, :, part] + self.relation[:, i, None] for i, part in enumerate(parts)], 2)
        y = dense.attend(q, keys, torch.cat([v[:, :, part] for part in parts], 2))
        return y, Tail(length + 1, k, v)

    def _cut(self, sides: tuple[int, int]) -> Cut:
        return Cut(sides, (min(self.block, sides[0]), min(self.block, sides[1])))

    def _placed(self, q: Heads, k: Heads, sides: tuple[int, int], offset: int = 0) -> tuple[Heads, Heads]:
        """Normalised and turned; ``offset`` is the number of the first token in reading order."""
        q, k = self.norm_q(q), self.norm_k(k)
        if not self.rotary:
            return q, k
        dtype = torch.promote_types(q.dtype, torch.float32)
        quarter = self.head_dim // 4
        rate = self.base ** (-torch.arange(quarter, device=q.device, dtype=dtype) / quarter)
        cell = torch.arange(offset, offset + q.shape[2], device=q.device)
        row, column = (cell // sides[1]).to(dtype)[:, None], (cell % sides[1]).to(dtype)[:, None]
        angle = torch.cat([row * rate, column * rate], 1)
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        return _turn(q, cos, sin), _turn(k, cos, sin)

    def _to_relations(self, q: Heads) -> Float[Tensor, "batch heads 4 n 1"]:
        return (q @ self.relation.mT * self.head_dim**-0.5).mT.unsqueeze(-1)

    def _attend(
        self,
        q: Heads,
        k: Float[Tensor, "batch heads blocks cells dim"],
        v: Float[Tensor, "batch heads blocks cells dim"],
        cut: Cut,
        members: Int[Tensor, "own cells"],
        listed: Int[Tensor, "blocks cells"],
        mask: Mask | None = None,
    ) -> Heads:
        """``k`` and ``v`` are blocks with the tokens ``listed``, a row more than ``members`` if one is above."""
        near = _neighbours(cut.count, len(listed) > len(members), q.device)
        keys, values = (t.index_select(2, near.flatten()).unflatten(2, near.shape) for t in (k, v))
        keys = keys + self.relation[None, :, None, :, None]
        cells = listed[near].flatten(1)
        return grouped.attend(q, keys.flatten(3, 4), values.flatten(3, 4), members, cells, mask=mask, whole=cut.whole)


def _neighbours(count: tuple[int, int], above: bool, device: torch.device) -> Int[Tensor, "blocks 4"]:
    """Of each block the numbers of itself and its left-top, left and top neighbour; a missing one is the edge block.
    With ``above`` there is a row of blocks over the first one, which is not asked for."""
    row = torch.arange(int(above), count[0] + int(above), device=device)[:, None]
    column = torch.arange(count[1], device=device)
    up, left = (row - 1).clamp(min=0), (column - 1).clamp(min=0)
    pairs = ((row, column), (up, left), (row, left), (up, column))
    return torch.stack([r * count[1] + c for r, c in pairs], -1).flatten(0, 1)


def _turn(x: Heads, cos: Tensor, sin: Tensor) -> Heads:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
