"""Mixture of attention heads: a router picks a few heads for each token out of many; only those are computed.

Zhang, Shen, Huang, Zhou, Rong and Xiong, "Mixture of Attention Heads: Selecting Attention Heads Per Token", 2022,
arXiv 2210.05144.

    K = z W_k,  V = z W_v                                one key/value head for all experts     (batch, 1, m, d)
    p_t = softmax(x_t W_g)                               over N experts
    G_t = the k experts with the largest p_t,  w_i = p_i / detach(sum_{j in G_t} p_j)
    E_i = softmax(x_t W_q^i K^T / sqrt(d)) V W_o^i       W_q^i (dim, d), W_o^i (d, dim)
    y_t = sum_{i in G_t} w_i E_i                                                                (batch, n, dim)

``heads`` is k: row h of `weights` is that of each token's h-th best expert, so two tokens' rows of one head may be of
different experts. The pairs (token, expert) are sorted by expert and cut into tiles of one expert each, at most half as
many rows again as there are pairs; what a token costs does not depend on N, but for the router. `balance_loss` and
`router_z_loss` keep all experts in use, times 0.01 and 0.001 in the paper. "8K32E128D" is heads=8, experts=32,
head_dim=128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines.backend import forced
from crosslight.engines.positions import Bias, Rotation
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Renormalise = Literal["detached", "full", "none"]

CARD = Card(
    id="moa-heads",
    kind="token",
    group="heads",
    title="Mixture of Attention Heads: Selecting Attention Heads Per Token",
    year=2022,
    paper="2210.05144",
    code="yikangshen/MoA",
    summary="Each token is routed to a few of many query heads, which share one key/value head; the rest cost nothing.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    # The detached sum of the paper is no derivative that finite differences could find.
    small={"experts": 5, "renormalise": "full"},
    checked="multi-query attention with as many experts as heads and a uniform router; the experts written out",
    differs="The released code leaves the renormalisation out (`renormalise='none'`), as it does the detached sum, and "
    "offers noise on the router (`noisy`), which the paper does not use.",
    evidence=Evidence(
        claim="32 experts, 4 a token, are better than the 4 dense heads that cost as much",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
        options={"experts": 32},
    ),
)


@dataclass(frozen=True)
class Tiles:
    """Pairs in tiles of ``size`` rows: row of each pair, pair of each row (0 if empty), expert of each tile."""

    row: Int[Tensor, " pairs"]
    pair: Int[Tensor, " rows"]
    expert: Int[Tensor, " tiles"]
    size: int

    @classmethod
    def of(cls, expert: Int[Tensor, " pairs"], experts: int) -> Tiles:
        pairs, device = expert.numel(), expert.device
        # Their number must not depend on data; small tiles bound what is left empty in them.
        size = max(1, pairs // (2 * experts))
        count = min(pairs, pairs // size + experts)
        order = expert.argsort(stable=True)
        held = torch.zeros(experts, dtype=torch.long, device=device).scatter_add(0, expert, torch.ones_like(expert))
        tiles = (held + size - 1) // size
        end = tiles.cumsum(0)
        # A pair's place among those of its expert, counted from the expert's first tile.
        start = (end - tiles) * size - (held.cumsum(0) - held)
        place = start[expert[order]] + torch.arange(pairs, device=device)
        of_tile = torch.searchsorted(end, torch.arange(count, device=device), right=True).clamp(max=experts - 1)
        row = torch.empty_like(order).scatter(0, order, place)
        return cls(row, order.new_zeros(count * size).scatter(0, place, order), of_tile, size)


class Experts(nn.Module):
    """A matrix for each expert: x of a pair times the weight of the pair's expert. ``shared`` pairs have one row."""

    def __init__(self, experts: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width, out).uniform_(-1, 1) / math.sqrt(width))

    def forward(self, x: Float[Tensor, "rows width"], route: Route, shared: int = 1) -> Float[Tensor, "pairs out"]:
        if forced() == "reference":
            return torch.einsum("pi,pio->po", x.repeat_interleave(shared, 0), self.weight[route.expert.flatten()])
        tiles = route.tiles
        table = x.index_select(0, tiles.pair // shared)
        table = table.unflatten(0, (-1, tiles.size)) @ self.weight.index_select(0, tiles.expert)
        return table.flatten(0, 1).index_select(0, tiles.row)


@dataclass(frozen=True)
class Route:
    """Each token's experts, the best first, and their gates; the same as tiles."""

    expert: Int[Tensor, "batch n heads"]
    gate: Float[Tensor, "batch n heads"]
    tiles: Tiles


@register(CARD)
class MixtureOfAttentionHeads(AttentionLayer):
    """softmax attention of the experts that each token is routed to.

    Args:
        dim, head_dim, context_dim: as in `AttentionLayer`.
        heads: k, experts a token.
        experts: N, twice heads unless given (16K32E in the paper's larger model).
        bias: whether the key and value projections have biases.
        position: a rotation, such as "rope"; an expert is no fixed head that could have a bias.
        renormalise: what the k largest probabilities are divided by: their sum as a constant ("detached", the paper),
            their sum ("full"), or nothing ("none", the released code).
        noisy: in training, add noise of a learned size to the router's logits.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        experts: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        position: str | nn.Module | None = None,
        renormalise: Renormalise = "detached",
        noisy: bool = False,
    ) -> None:
        d = head_width(dim, heads, head_dim)
        super().__init__(Softmax(heads, d), dim, kv_heads=1, context_dim=context_dim, bias=bias, position=position)
        expect(not isinstance(self.position, Bias), "position", repr(position), "a rotation such as 'rope'")
        known = get_args(Renormalise)
        expect(renormalise in known, "renormalise", repr(renormalise), f"one of {', '.join(known)}")
        self.experts = 2 * heads if experts is None else experts
        expect(self.experts >= heads, "experts", self.experts, f"at least heads = {heads}")
        self.renormalise, self.noisy = renormalise, noisy
        self.q, self.out = Experts(self.experts, dim, d), Experts(self.experts, d, dim)  # type: ignore[assignment]
        self.router = nn.Linear(dim, self.experts, bias=False)
        if noisy:
            self.noise = nn.Linear(dim, self.experts, bias=False)

    def route(self, x: Tensor, noisy: bool = False) -> Route:
        """(batch, n, dim) -> the experts of each token."""
        logits = self.router(x)
        if noisy:
            logits = logits + torch.randn_like(logits) * (F.softplus(self.noise(x)) + 1e-2)
        gate, expert = logits.softmax(-1).topk(self.heads, -1)
        if self.renormalise != "none":
            total = gate.sum(-1, keepdim=True)
            gate = gate / (total.detach() if self.renormalise == "detached" else total)
        return Route(expert, gate, Tiles.of(expert.flatten(), self.experts))

    def balance_loss(self, x: Tensor) -> Tensor:
        """N sum_i f_i P_i over the tokens of x: share of assignments times mean probability; 1 in even use."""
        p = self.router(x).softmax(-1).flatten(0, -2)
        used = F.one_hot(p.topk(self.heads, -1).indices, self.experts).to(p.dtype)
        return self.experts * (used.mean((0, 1)) * p.mean(0)).sum()

    def router_z_loss(self, x: Tensor) -> Tensor:
        """mean(logsumexp(logits)^2)."""
        return self.router(x).logsumexp(-1).square().mean()

    def _queries(self, x, route=None):
        route = self.route(x) if route is None else route
        return self.q(x.flatten(0, 1), route, self.heads).unflatten(0, route.expert.shape).transpose(1, 2)

    def _merge(self, y, x, route=None):
        route = self.route(x) if route is None else route
        gated = y.transpose(1, 2) * route.gate.unsqueeze(-1)
        return self.out(gated.flatten(0, 2), route).unflatten(0, route.expert.shape).sum(2)

    def _forward(self, x, context, how):
        # One route for both sides of the experts: with noise a second one would be another.
        route = self.route(x, self.noisy and self.training)
        q, k, v = self._queries(x, route), self._keys(context), self._values(context)
        if isinstance(self.position, Rotation):
            q = self.position.rotate(q, grid=how.grid)
            k = self.position.rotate(k, grid=None if how.cross else how.grid)
        return self._merge(self.core(q, k, v, mask=how.mask, causal=how.triangular), x, route)
