"""Collinear constrained attention: every key is a non-negative rescaling of the query that it meets.

Zhu et al., "Cure the headache of Transformers via Collinear Constrained Attention", 2023, arXiv 2309.08646.

Under rotary positions the pair (m, n) scores |q| |k| cos(angle(q, k) + (m - n) theta_j) in each rotary pair j. The
angle that q and k start with can turn the decay with distance around. Here it is zero. With t = W_t x in place of the
key:

    t_n = relu((t_n^1 + t_n^2) / 2), the same in both halves        one factor >= 0 for each rotary pair
    k_{m,n} = q_m * t_n                                             the key n as query m sees it
    a(m, n) = R_m q_m . R_n k_{m,n} / sqrt(d)
            = 1 / sqrt(d) sum_j t_n^j |q_m^j|^2 cos((m - n) theta_j)
    y_m = W_o softmax(a(m, .)) V                                    (batch, n, dim)

So for t_n = t_m no token scores higher than the one at the query's own place. The sum is a product of two rotated
vectors of width d: (|q^j|^2, 0) turned by m and (t^j, 0) turned by n. That is plain attention on other queries and
keys, which needs no tensor of n x m x d, and any `Rotation` (of another base, or interpolated) serves as the position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines.positions import Rotation
from crosslight.errors import expect
from crosslight.registry import register

CARD = Card(
    id="collinear-attention",
    kind="token",
    group="positions-masks",
    title="Cure the headache of Transformers via Collinear Constrained Attention",
    year=2023,
    paper="2309.08646",
    code="codefuse-ai/Collinear-Constrained-Attention",
    summary="Rotary attention in which the key is the query times a non-negative factor, so that nearness never counts "
    "against a token.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the keys k_{m,n} built one by one for each pair and rotated; the closed form in cosines",
    differs="The released code contracts q, R t and R q, which differs from the paper's closed form in the sine terms; "
    "the paper is followed. The paper is causal self-attention; the other patterns use the same score, a context with "
    "positions of its own.",
    evidence=Evidence(
        claim="as a byte language model at the length it was trained on, it keeps close to rotary attention",
        task="language",
        metric="bits_per_byte",
        margin=-0.1,
        baseline_options={"position": "rope"},
    ),
)


@register(CARD)
class CollinearAttention(AttentionLayer):
    """softmax attention whose queries and keys are the two factors of the collinear score.

    Args:
        dim, heads, kv_heads, head_dim, context_dim, bias: as in `AttentionLayer`; the head's width is even. The layer
            ``k`` is the paper's W_t.
        position: "rope" or a `Rotation` of pairs (c, c + d / 2).
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
        position: str | nn.Module = "rope",
    ) -> None:
        core = Softmax(heads, head_width(dim, heads, head_dim))
        expect(core.head_dim % 2 == 0, "head_dim", core.head_dim, "an even head width")
        super().__init__(core, dim, kv_heads=kv_heads, context_dim=context_dim, bias=bias, position=position)
        expect(isinstance(self.position, Rotation), "position", repr(position), "a rotation such as 'rope'")

    def _queries(self, x):
        first, second = super()._queries(x).chunk(2, -1)
        return _pairs(first.square() + second.square())

    def _keys(self, context):
        return _pairs(self.factors(context))

    def factors(self, context: Tensor) -> Tensor:
        """t of the context: (batch, kv_heads, m, head_dim / 2), one for each rotary pair."""
        first, second = super()._keys(context).chunk(2, -1)
        return ((first + second) / 2).relu()


def _pairs(radius: Tensor) -> Tensor:
    """The 2-vectors (radius, 0), before they turn."""
    return torch.cat([radius, torch.zeros_like(radius)], -1)
