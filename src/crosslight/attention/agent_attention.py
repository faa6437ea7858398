"""Agent attention: two softmax attentions in a row, through a few agents pooled from the queries.

Han, Ye, Han, Xia, Pan, Wan, Song, Huang, "Agent Attention: On the Integration of Softmax and Linear Attention", 2023,
arXiv 2312.08874.

    A   = pool(Q)                                      (a, d)   a agents, average pooling of Q over the tokens
    V_A = softmax(A K^T / sqrt(d) + B1) V              (a, d)   agents gather from the keys
    O   = softmax(Q A^T / sqrt(d) + B2) V_A + DWC(V)   (n, d)   queries read the agents; 3 x 3 depthwise convolution
    B1  = bilinear(T1) + R1 + C1                       (a, H W) tables (a, 7, 7), (a, H, 1), (a, 1, W) a head; B2 alike

O is a linear attention with features softmax(Q A^T) and softmax(A K^T)^T: its matrix has rank at most a, rows that
sum to 1, and costs O(n a d). With ``grid=(H, W)`` the pooling (to sqrt(a) x sqrt(a)) and the convolution are those of
the image; without it tokens are one row. In cross-attention the agents are pooled from x, and there is no convolution,
as the values stand at other places than the queries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core, How
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads n dim"]

CARD = Card(
    id="agent-attention",
    kind="token",
    group="linear",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    year=2023,
    paper="2312.08874",
    code="LeapLabTHU/Agent-Attention",
    summary="A few agents, pooled from the queries, gather from all keys by softmax; every query reads the agents.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="Agents are pooled from all queries, so every output depends on later ones.",
    cost="n",
    mask="keys",
    small={"agents": 4},
    checked="the equations written out with loops over windows and dense matrices; rank and row sums of the matrix",
    differs="The class token of the released DeiT variant, with a bias of its own and outside pooling and convolution, "
    "is left out. Masked tokens do not enter the pooling.",
    evidence=Evidence(
        claim="accuracy of softmax attention at linear cost",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"agents": 16, "window": [8, 8]},
    ),
)


class AgentLayer(AttentionLayer):
    """The layer around `AgentAttention`, which adds the convolution of the values."""

    def __init__(self, core: AgentAttention, dim: int, **own: Any) -> None:
        super().__init__(core, dim, **own)
        width = self.heads * self.head_dim
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width) if core.conv else None

    def _extra(self, how: How) -> dict[str, Any]:
        # Of x itself, padding is known; that of a context says nothing of the queries.
        return super()._extra(how) | ({} if how.cross else {"pooled": masks.split(how.mask)[1]})

    def _local(self, v: Heads, how: How) -> Heads | float:
        if self.conv is None or how.cross:
            return 0.0
        keep = masks.split(how.mask)[1]
        v = v if keep is None else v.masked_fill(~keep[:, None, :, None], 0)
        image = v.transpose(-1, -2).flatten(1, 2).unflatten(-1, how.grid or (1, -1))
        return self.conv(image).flatten(2).unflatten(1, (self.heads, -1)).transpose(-1, -2)

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        return self._merge(self.core(q, k, v, mask=how.mask, **self._extra(how)) + self._local(v, how), x)

    def _read(self, weights, x, context, how):
        v = dense.repeat_heads(self._values(context), self.heads)
        return self._merge(self.core.read(weights, v) + self._local(v, how), x)


@register(CARD)
class AgentAttention(Core):
    """q (batch, heads, n, d), k and v (batch, heads, m, d).

    Args:
        agents: number of agents, a square number where a grid is given.
        window: (H, W) of a fixed grid, for position biases; without it there are none.
        conv: whether the layer adds the convolution of the values in self-attention.
    """

    takes_grid = True
    layer = AgentLayer

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        agents: int = 49,
        window: tuple[int, int] | None = None,
        conv: bool = True,
    ) -> None:
        super().__init__(heads, head_dim)
        self.conv = conv
        expect(isinstance(agents, int) and agents > 0, "agents", agents, "a positive int")
        self.agents = agents
        self.window = None if window is None else (int(window[0]), int(window[1]))
        if self.window is not None:
            height, width = self.window
            side = self._side()
            expect(side <= min(self.window), "agents", agents, f"at most {min(self.window)}^2 in window {self.window}")
            # One of each for the gathering (B1) and for the reading (B2).
            self.table = nn.Parameter(torch.empty(2, heads, agents, 7, 7))
            self.rows = nn.Parameter(torch.empty(2, heads, agents, height, 1))
            self.columns = nn.Parameter(torch.empty(2, heads, agents, 1, width))
            for table in (self.table, self.rows, self.columns):
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, q, k, v, *, mask=None, causal=False, grid=None, pooled=None):
        reads, gathers = self._stages(q, k, mask, grid, pooled)
        return reads @ (gathers @ v)

    def weights(self, q, k, *, mask=None, causal=False, grid=None, pooled=None):
        reads, gathers = self._stages(q, k, mask, grid, pooled)
        return reads @ gathers

    def _stages(
        self, q: Heads, k: Heads, mask: Any, grid: Any, pooled: Bool[Tensor, "batch n"] | None
    ) -> tuple[Float[Tensor, "batch heads n agents"], Float[Tensor, "batch heads agents m"]]:
        """softmax(Q A^T + B2) and softmax(A K^T + B1); ``pooled`` says which queries enter the agents."""
        a = self._pool(q, grid, pooled)
        gathering = reading = None
        if self.window is not None:
            n = self.window[0] * self.window[1]
            expect(
                q.shape[2] == k.shape[2] == n and grid in (None, self.window),
                "grid",
                f"{grid}, {q.shape[2]} queries and {k.shape[2]} keys",
                f"{self.window}, the window of the position biases, in both",
            )
            gathering, reading = self._biases()
            reading = reading.transpose(-1, -2)
        return dense.weights(q, a, bias=reading), dense.weights(a, k, mask=mask, bias=gathering)

    def _biases(self) -> tuple[Tensor, Tensor]:
        """B1 and B2, each (heads, agents, H * W)."""
        tables = F.interpolate(self.table.flatten(0, 1), size=self.window, mode="bilinear")
        first, second = (tables.unflatten(0, (2, -1)) + self.rows + self.columns).flatten(-2).unbind(0)
        return first, second

    def _side(self) -> int:
        side = math.isqrt(self.agents)
        expect(side * side == self.agents, "agents", self.agents, "a square number, as there is a grid")
        return side

    def _pool(self, q: Heads, grid: Any, pooled: Tensor | None) -> Float[Tensor, "batch heads agents dim"]:
        grid = grid or self.window
        if grid is None:
            shape, target = (1, q.shape[2]), (1, min(self.agents, q.shape[2]))
        else:
            expect(len(grid) == 2, "grid", grid, "(height, width)")
            shape, target = grid, (min(self._side(), grid[0]), min(self._side(), grid[1]))

        def pool(t: Tensor) -> Tensor:
            image = t.transpose(-1, -2).unflatten(-1, shape).flatten(1, 2)
            return F.adaptive_avg_pool2d(image, target).flatten(2).unflatten(1, (-1, t.shape[3])).transpose(-1, -2)

        if pooled is None:
            return pool(q)
        share = pooled[:, None, :, None].to(q.dtype)
        total = pool(share)
        return pool(q * share) / torch.where(total == 0, 1, total)
