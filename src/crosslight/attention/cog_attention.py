"""Cog attention: weights keep the sign of the score, so that a head can subtract what it reads.

Lv et al., "More Expressive Attention with Negative Weights", 2024, arXiv 2411.07176.

    P = Q K^T / sqrt(d)                                            (batch, heads, n, m)
    A_ij = sign(P_ij) softmax_j(|P_ij|)                            sum_j |A_ij| = 1
    y = W_o [A_1 V_1 ; ... ; A_h V_h]                              (batch, n, dim)

Where all scores are positive this is softmax attention. A row's sum lies anywhere in [-1, 1]: a head adds a token,
subtracts it or leaves it out by the query and key alone, which in softmax attention only the value and output
projections can do. Masked keys are taken out of the softmax of |P|. The gradient flows through |P|; the sign is
constant in pieces, so that a weight jumps where its score crosses zero.

Which layers use it is the model's choice: the authors keep softmax in the first and the last layer, for convergence.
"""

from __future__ import annotations

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.registry import register

CARD = Card(
    id="cog-attention",
    kind="token",
    group="scores",
    title="More Expressive Attention with Negative Weights",
    year=2024,
    paper="2411.07176",
    code="trestad/CogAttn",
    summary="Signed weights: the softmax of the scores' magnitudes times their signs, so that a head can subtract.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the paper's exponential form written out; softmax attention where all scores are positive",
    evidence=Evidence(
        claim="One head with signed weights reads the difference of two values, which one softmax head cannot",
        task="subtract",
        metric="r2",
        margin=0.3,
    ),
)


@register(CARD)
class CogAttention(Core):
    """sign(s) softmax(|s|) v of s = q k^T / sqrt(d); q (batch, heads, n, d), k and v (batch, kv_heads, m, d)."""

    grouped = True

    def forward(self, q, k, v, *, mask=None, causal=False):
        return dense.attend(q, k, v, mask=mask, causal=causal, normaliser=dense.signed)

    def weights(self, q, k, *, mask=None, causal=False):
        return dense.weights(q, k, mask=mask, causal=causal, normaliser=dense.signed)
