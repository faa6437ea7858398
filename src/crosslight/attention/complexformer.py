"""Complex multi-head attention: queries and keys in polar form, with phases that each head rescales.

Shao et al., "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector
Attention", 2025, arXiv 2505.10222 (withdrawn by an author; version 1 is meant).

    q = r_q exp(i theta_q), k = r_k exp(i theta_k)      d/2 complex numbers a head: the two halves of its width
    S_mn = sum_c r_q r_k cos(delta_c (theta_q(m) - theta_k(n)) + b_c + (m - n) g_c)        (batch, heads, n, m)
    g_c = 10000^(-2c/d);  delta, b (heads, d/2) learned;  no 1/sqrt(d)
    y = W_o [softmax(S_1) V_1 ; ... ; softmax(S_h) V_h]                                     (batch, n, dim)

With delta = 1 and b = 0 this is RoPE without its scale. The released code builds the phase of every pair and channel,
(n, m, d/2), in chunks of queries. The phase is a difference of one term of the query and one of the key,

    (delta theta_q(m) + b + m g) - (delta theta_k(n) + n g),

so its cosine is a dot product in the plane: S is plain attention between r_q exp(i (delta theta_q + b)) and
r_k exp(i delta theta_k), turned by RoPE. Nothing is computed for pairs that plain attention does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from crosslight.attention.base import AttentionLayer, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Heads = Float[Tensor, "batch heads n dim"]

CARD = Card(
    id="complexformer",
    kind="token",
    group="scores",
    title="ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector "
    "Attention",
    year=2025,
    paper="2505.10222",
    code="shaojintian/complexFormer",
    summary="Each head rescales and shifts the phases of complex queries and keys before rotary positions.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the sum of cosines written out pair by pair; rotary attention at delta = 1 and b = 0",
    differs="The phases of pairs are not built: the score is a dot product of transformed queries and keys. The "
    "released code has frequencies rounded to bfloat16.",
    evidence=Evidence(
        claim="A byte language model with adaptive phases is no worse than one with plain rotary attention",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
        baseline_options={"position": "rope"},
    ),
)

#: Under the root of the magnitude, so that its gradient stays finite at 0.
EPSILON = 1e-9


@register(CARD)
class ComplexAttention(AttentionLayer):
    """softmax attention between complex numbers of adapted phase.

    Args:
        dim, heads, head_dim, context_dim, bias, position: as in `AttentionLayer`; the position is the paper's RoPE
            unless another is given. The head width is even.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        position: str | nn.Module | None = "rope",
    ) -> None:
        d = head_width(dim, heads, head_dim)
        expect(d % 2 == 0, "head_dim", d, "an even head width (dim / heads)")
        super().__init__(Softmax(heads, d), dim, context_dim=context_dim, bias=bias, position=position)
        self.delta = nn.Parameter(torch.randn(heads, 1, d // 2) / math.sqrt(d // 2))
        self.shift = nn.Parameter(torch.zeros(heads, 1, d // 2))

    def _adapted(self, t: Heads, shift: Float[Tensor, "heads 1 half"] | None) -> Heads:
        # In at least float32: half precision knows phases to two digits only.
        real, imaginary = t.to(torch.promote_types(t.dtype, torch.float32)).chunk(2, -1)
        r = (real.square() + imaginary.square() + EPSILON).sqrt()
        phase = self.delta * torch.atan2(imaginary, real)
        if shift is not None:
            phase = phase + shift
        return torch.cat([r * phase.cos(), r * phase.sin()], -1).to(t.dtype)

    def _queries(self, x):
        # The core divides by sqrt(d), which the paper does not.
        return self._adapted(super()._queries(x), self.shift) * math.sqrt(self.head_dim)

    def _keys(self, context):
        return self._adapted(super()._keys(context), None)
