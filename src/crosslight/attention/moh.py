"""Mixture-of-head attention: every token chooses which heads it uses, and how much.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, arXiv 2410.11842.

    y_t = sum_i g_i(x_t) H_i(x_t) W_o^i                            (batch, n, dim)

    shared heads     a_s = h_s softmax(W_s x_t)
    routed heads     a_r = K p / sum_top p on the K largest of p = softmax(W_r x_t), else 0
    balance          b = 2 softmax(W_h x_t)
    g = [b_1 a_s ; b_2 a_r]

h_s heads are always on, K of the h_r others are chosen a token. The factors h_s, K and 2 keep the mean gate near 1, so
that uniform routers with all heads active are plain multi-head attention. `balance_loss` keeps the routed heads in
use: L_b = h_r^2 mean_i(P_i F_i), with P_i the mean probability and F_i the share of tokens of head i, times 0.01 in the
paper. Gates are applied after all heads are computed, as in the released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.registry import register

CARD = Card(
    id="moh",
    kind="token",
    group="heads",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    year=2024,
    paper="2410.11842",
    code="SkyworkAI/MoH",
    summary="Gates on the heads, chosen by each token: some heads always on, the top few of the others.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    small={"heads": 4, "shared": 2, "active": 2},
    checked="plain multi-head attention with uniform routers and all heads active; the gates written out",
    differs="The router of the paper's continue-tuning (norms of queries, straight-through) is not part of this layer.",
    evidence=Evidence(
        claim="with three of four heads active a token, digits are read as well as with all of them",
        task="digits",
        metric="accuracy",
        margin=-0.02,
        options={"shared": 2, "active": 1},
    ),
)


@register(CARD)
class MixtureOfHeads(AttentionLayer):
    """softmax attention whose heads are weighted token by token.

    Args:
        dim, heads, kv_heads, head_dim, context_dim, bias, position: as in `AttentionLayer`.
        shared: h_s, heads that are always on; half of them unless given.
        active: K, routed heads that a token uses; half of the rest unless given.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
        shared: int | None = None,
        active: int | None = None,
    ) -> None:
        self_heads = Softmax(heads, head_width(dim, heads, head_dim))
        super().__init__(self_heads, dim, kv_heads=kv_heads, context_dim=context_dim, bias=bias, position=position)
        self.shared = heads // 2 if shared is None else shared
        expect(0 <= self.shared < heads, "shared", self.shared, f"fewer than heads = {heads}")
        self.routed = heads - self.shared
        self.active = max(1, self.routed // 2) if active is None else active
        expect(0 < self.active <= self.routed, "active", self.active, f"1 to the {self.routed} routed heads")
        self.to_routed = nn.Linear(dim, self.routed, bias=False)
        if self.shared:
            self.to_shared = nn.Linear(dim, self.shared, bias=False)
            self.to_balance = nn.Linear(dim, 2, bias=False)

    def gates(self, x: Tensor) -> Tensor:
        """(batch, n, dim) -> (batch, n, heads): shared heads first; 0 where a token leaves a head out."""
        p = self.to_routed(x).softmax(-1)
        top, index = p.topk(self.active, -1)
        routed = torch.zeros_like(p).scatter(-1, index, self.active * top / top.sum(-1, keepdim=True))
        if not self.shared:
            return routed
        balance = 2 * self.to_balance(x).softmax(-1)
        shared = self.shared * self.to_shared(x).softmax(-1)
        return torch.cat([balance[..., :1] * shared, balance[..., 1:] * routed], -1)

    def balance_loss(self, x: Tensor) -> Tensor:
        """L_b of the routed heads over the tokens of x, (batch, n, dim); K where they are in even use."""
        p = self.to_routed(x).softmax(-1).flatten(0, -2)
        used = F.one_hot(p.topk(self.active, -1).indices, self.routed).sum(-2).to(p.dtype)
        return self.routed**2 * (p.mean(0) * used.mean(0)).mean()

    def _merge(self, y, x):
        return super()._merge(y * self.gates(x).transpose(1, 2).unsqueeze(-1), x)
