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

`Network` is one of the paper's hosts, DeiT, PVT, Swin or CSwin, with 9 to 81 agents in some or all of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import Core, How
from crosslight.attention.local import LocalLayer
from crosslight.attention.softmax import Softmax
from crosslight.attention.vision_hosts import Design, Host, Stripes, Windows
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.positions import Grid
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
    checked="the equations written out with loops over windows and dense matrices; rank and row sums of the matrix; "
    "the parameter counts of the authors' code and, rounded, of its table",
    differs="The class token of the released DeiT variant, with a bias of its own and outside pooling and convolution, "
    "is only in the network. Masked tokens do not enter the pooling. Stochastic depth is left to training.",
    evidence=Evidence(
        claim="accuracy of softmax attention at linear cost",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"agents": 16, "window": [8, 8]},
    ),
)


class AgentLayer(LocalLayer):
    """The layer around `AgentAttention`, which adds the convolution of the values."""

    def __init__(self, core: AgentAttention, dim: int, **own: Any) -> None:
        super().__init__(core, dim, kernel=3 if core.conv else 0, **own)


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
    network: ClassVar[type[nn.Module]]

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

    def extra(self, how):
        # Of x itself, padding is known; that of a context says nothing of the queries.
        return {} if how.cross else {"pooled": masks.split(how.mask)[1]}

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


class ClassLayer(AgentLayer):
    """The layer of `ClassAgents`, whose convolution leaves out the class token."""

    def _local(self, v, how):
        keep, window = masks.split(how.mask)[1], cast("ClassAgents", self.core).window
        near = How(None if keep is None else masks.keys(keep[:, 1:]), cross=how.cross, grid=window)
        y = super()._local(v[:, :, 1:], near)
        return F.pad(y, (0, 0, 1, 0)) if isinstance(y, Tensor) else y


class ClassAgents(AgentAttention):
    """The core of Agent-DeiT: a class token before those of the window. No agent is pooled from it, and it has biases
    of its own, one an agent and a head for each of B1 and B2."""

    layer = ClassLayer

    def __init__(self, heads: int, head_dim: int, *, window: tuple[int, int], agents: int = 49) -> None:
        super().__init__(heads, head_dim, agents=agents, window=window)
        self.own = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, heads, agents, 1), std=0.02))

    def _stages(self, q, k, mask, grid, pooled):
        a = self._pool(q[:, :, 1:], self.window, None if pooled is None else pooled[:, 1:])
        gathering, reading = (torch.cat(pair, 2) for pair in zip(self.own, self._biases(), strict=True))
        return dense.weights(q, a, bias=reading.mT), dense.weights(a, k, mask=mask, bias=gathering)


def _deit(dim: int, **own: Any) -> dict[str, Any]:
    sizes = {"dims": [dim], "depths": [12], "heads": [dim // 64], "mlp_ratios": [4], "agents": [49]}
    return {"design": "deit", "agent_blocks": [12], **sizes, **own}


def _pvt(*depths: int, **own: Any) -> dict[str, Any]:
    return {"depths": depths, "agent_blocks": depths, **own}


def _swin(dim: int, depths: Sequence[int], agent_blocks: Sequence[int], **own: Any) -> dict[str, Any]:
    sizes = {"dims": [dim << i for i in range(4)], "heads": [dim // 32 << i for i in range(4)], "mlp_ratios": [4] * 4}
    return {"design": "swin", "depths": depths, "agent_blocks": agent_blocks, **sizes, **own}


def _cswin(dim: int, depths: Sequence[int], heads: int, **own: Any) -> dict[str, Any]:
    swin = _swin(dim, depths, [*depths[:2], 0, 0], **own)
    return {**swin, "design": "cswin", "heads": [heads << i for i in range(4)]}


class Network(Host):
    """Images (batch, channels, image, image) -> logits: DeiT, PVT, Swin or CSwin with agents.

    Args:
        agent_blocks: of each stage, blocks from the first on with agent attention over the whole map. The others attend
            by softmax, those of Swin in windows that are shifted in every other block, those of CSwin in stripes.
        agents: of each stage, a square number each.
        window: side of these windows, width of these stripes.
        design, dims, depths, heads, mlp_ratios, image, patch, channels, classes: those of the host.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "deit_tiny": _deit(192),
        "deit_small": _deit(384),
        "deit_small_448": _deit(384, image=448),
        "deit_base": _deit(768, agents=[81], agent_blocks=[4]),
        "pvt_tiny": _pvt(2, 2, 2, 2),
        "pvt_small": _pvt(3, 4, 6, 3),
        "pvt_medium": _pvt(3, 4, 18, 3),
        "pvt_medium_256": _pvt(3, 4, 18, 3, image=256),
        "pvt_large": _pvt(3, 8, 27, 3),
        "swin_tiny": _swin(96, [2, 2, 6, 2], [2, 2, 6, 0]),
        "swin_small": _swin(96, [2, 2, 18, 2], [2, 2, 0, 0]),
        "swin_small_288": _swin(96, [2, 2, 18, 2], [2, 2, 0, 0], image=288, window=9),
        "swin_base": _swin(128, [2, 2, 18, 2], [2, 2, 2, 0]),
        "swin_base_384": _swin(128, [2, 2, 18, 2], [2, 2, 2, 0], image=384, window=12),
        "cswin_tiny": _cswin(64, [2, 4, 18, 1], 2),
        "cswin_small": _cswin(64, [3, 6, 29, 2], 2),
        "cswin_base": _cswin(96, [3, 6, 29, 2], 4),
        "cswin_base_384": _cswin(96, [3, 6, 29, 2], 4, image=384, window=12),
    }
    published: ClassVar[dict[str, int]] = {
        "deit_tiny": 6_015_640,
        "deit_small": 22_647_112,
        "deit_small_448": 23_070_472,
        "deit_base": 87_204_904,
        "pvt_tiny": 11_570_352,
        "pvt_small": 20_635_066,
        "pvt_medium": 35_921_746,
        "pvt_medium_256": 36_083_682,
        "pvt_large": 48_738_180,
        "swin_tiny": 28_902_964,
        "swin_small": 49_666_684,
        "swin_small_288": 49_707_964,
        "swin_base": 88_095_096,
        "swin_base_384": 88_305_016,
        "cswin_tiny": 20_458_672,  # 21 million in the authors' table
        "cswin_small": 32_814_100,
        "cswin_base": 73_249_696,
        "cswin_base_384": 73_328_416,
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        *,
        design: Design = "pvt",
        agent_blocks: Sequence[int] = (2, 2, 2, 2),
        agents: Sequence[int] = (9, 16, 49, 49),
        window: int = 7,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        for name, value in (("agent_blocks", agent_blocks), ("agents", agents)):
            expect(len(value) == len(dims), name, value, f"one number for each of {len(dims)} stages")

        def attend(stage: int, number: int, dim: int, heads: int, grid: Grid) -> nn.Module:
            if number < agent_blocks[stage]:
                core = ClassAgents if design == "deit" else AgentAttention
                return core.build(dim, heads, agents=agents[stage], window=grid)
            side = min(window, grid[0])
            if design == "cswin":
                return Stripes(dim, heads, grid, stripe=side)
            if design != "swin":
                return Softmax.build(dim, heads)
            return Windows(dim, heads, grid, window=side, shift=side // 2 if number % 2 and side < grid[0] else 0)

        super().__init__(
            design,
            attend,
            dims,
            depths,
            heads,
            mlp_ratios,
            image=image,
            patch=patch,
            channels=channels,
            classes=classes,
        )


AgentAttention.network = Network
