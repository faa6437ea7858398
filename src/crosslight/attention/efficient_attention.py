"""Efficient attention: normalise queries and keys apart, then multiply keys with values first.

Shen, Zhang, Zhao, Yi, Li, "Efficient Attention: Attention with Linear Complexities", 2018, arXiv 1812.01243.

    E(Q, K, V) = rho_q(Q) (rho_k(K)^T V)                            Q (n, d), K (m, d), V (m, d) of one head
    softmax:   rho_q over the d channels of each query, rho_k over the m positions of each key channel
    scaling:   rho_q = Q / sqrt(m),  rho_k = K / sqrt(m)             equal to (Q K^T / m) V

Each of the d key channels is one attention map over all positions, rho_k(K)^T V (d, d) what these maps read, and every
query mixes the d readings: time O(n d^2). Under softmax the matrix rho_q(Q) rho_k(K)^T has rows that sum to 1; it
approximates softmax attention and does not equal it.

The causal form is Crosslight's own. The softmax over positions runs over those up to i, channel by channel:

    out_i = sum_c rho_q(q_i)_c  sum_{j <= i} exp(k_jc) v_j / sum_{j <= i} exp(k_jc)

It is a linear attention whose state decays, in each channel, whenever that channel's running maximum rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, linear, masks
from crosslight.engines.linear import LinearState
from crosslight.engines.recurrent import scan
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads n dim"]

CARD = Card(
    id="efficient-attention",
    kind="token",
    group="linear",
    title="Efficient Attention: Attention with Linear Complexities",
    year=2018,
    paper="1812.01243",
    code="cmsflash/efficient-attention",
    summary="Softmax over the channels of queries and over the positions of keys, so that keys meet values first.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the explicit product rho_q(Q) rho_k(K)^T V; (Q K^T / n) V under scaling; the formula of the causal form",
    differs="The paper has no causal form; ours takes the softmax over positions up to i. Its module for feature maps "
    "adds its input to its output, which is left to the block around it. Under scaling n is the number of keys that "
    "may be read.",
    evidence=Evidence(
        claim="quality on par with softmax attention at linear cost",
        task="digits",
        metric="accuracy",
        margin=-0.03,
    ),
)


@dataclass
class EfficientState:
    """Running maximum and denominator of each key channel, and the decayed sum of keys and values."""

    peak: Float[Tensor, "batch heads 1 dim"]
    total: Float[Tensor, "batch heads 1 dim"]
    sums: LinearState


@register(CARD)
class EfficientAttention(Core):
    """q (batch, heads, n, d), k and v (batch, heads, m, d).

    Args:
        normalisation: "softmax" or "scaling".
    """

    def __init__(self, heads: int, head_dim: int, *, normalisation: str = "softmax") -> None:
        super().__init__(heads, head_dim)
        expect(normalisation in ("softmax", "scaling"), "normalisation", repr(normalisation), "'softmax' or 'scaling'")
        self.normalisation = normalisation

    def forward(self, q, k, v, *, mask=None, causal=False):
        q, k, log_decay = self._features(q, k, masks.split(mask)[1], causal)
        return linear.attend(q, k, v, causal=causal, log_decay=log_decay)

    def weights(self, q, k, *, mask=None, causal=False):
        q, k, log_decay = self._features(q, k, masks.split(mask)[1], causal)
        return linear.weights(q, k, causal=causal, log_decay=log_decay)

    def step(self, q, k, v, state, **extra):
        if self.normalisation == "scaling":
            length = 1 if state is None else state.length + 1
            return linear.step(q / length, k, v, state)
        dtype, q, k = q.dtype, q.softmax(-1), k.to(torch.promote_types(k.dtype, torch.float32))
        if state is None:
            peak, fade, total, sums = k, None, torch.ones_like(k), None
        else:
            peak = torch.maximum(state.peak, k)
            fade, sums = state.peak - peak, state.sums
            total = state.total * fade.exp() + (k - peak).exp()
        y, sums = linear.step(q / total, (k - peak).exp(), v, sums, log_decay=fade)
        return y.to(dtype), EfficientState(peak, total, sums)

    def _features(
        self, q: Heads, k: Heads, keep: Bool[Tensor, "batch m"] | None, causal: bool
    ) -> tuple[Heads, Heads, Heads | None]:
        """rho_q(Q), rho_k(K) and, where the softmax is causal, the log-decay of each key channel."""
        if self.normalisation == "scaling":
            seen = k.new_ones(1, k.shape[2]) if keep is None else keep.to(k.dtype)
            count = seen.cumsum(1)[:, None, :, None] if causal else seen.sum(1).view(-1, 1, 1, 1)
            k = k if keep is None else k.masked_fill(~keep[:, None, :, None], 0)
            return q / count.clamp(min=1), k, None
        q = q.softmax(-1)
        if not causal:
            if keep is None:  # the softmax over positions
                return q, k.softmax(-2), None
            return q, dense.softmax(k.transpose(-1, -2), keep[:, None, None]).transpose(-1, -2), None
        dtype, k = k.dtype, k.to(torch.promote_types(k.dtype, torch.float32))
        lost = None if keep is None else ~keep[:, None, :, None]
        # The maximum is a matter of scale, not of value: it cancels, and no gradient passes it. A masked key, which
        # must not raise it, counts as the least of the visible ones.
        peak = k.detach()
        if lost is not None:
            least = peak.masked_fill(lost, torch.inf).amin(2, keepdim=True)
            peak = torch.where(lost, torch.where(least.isinf(), 0, least), peak)
        peak = peak.cummax(2).values
        fade = torch.cat([torch.zeros_like(peak[:, :, :1]), peak[:, :, :-1] - peak[:, :, 1:]], 2)
        if lost is not None:
            k = torch.where(lost, -torch.inf, k)
        k = (k - peak).exp()
        total = scan(fade.exp(), k, dim=2)
        return q / torch.where(total == 0, 1, total).to(dtype), k.to(dtype), fade
