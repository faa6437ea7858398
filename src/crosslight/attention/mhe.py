"""Multi-head attention with head embeddings: one projection for all heads, told apart by a vector each.

Xue and Aletras, "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head
Attention", 2023, arXiv 2310.07911.

    Q_i = X W_Q + e_i^Q            variant "add"
    Q_i = (X W_Q) * (e_i^Q + 1)    variant "mul"          (batch, n, d) for head i; K_i and V_i likewise
    A_i = softmax(Q_i K_i^T / sqrt(d))                    (batch, heads, n, m)
    y = W_o [A_1 V_1 ; ... ; A_h V_h]                     (batch, n, dim)

W_Q, W_K, W_V are (dim, d) with d = dim / heads, shared by all heads: 3 h d^2 + 3 h d weights where multi-head attention
has 3 h^2 d^2. With all embeddings zero every head is the same; they start as random as position embeddings do.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from crosslight.attention.base import AttentionLayer, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.registry import register

Variant = Literal["mul", "add"]

CARD = Card(
    id="mhe",
    kind="token",
    group="heads",
    title="Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention",
    year=2023,
    paper="2310.07911",
    summary="One query, key and value projection for all heads, which differ by a learned vector each.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="torch.nn.MultiheadAttention with one head and zero embeddings; the paper's parameter counts",
    evidence=Evidence(
        claim="a byte language model with head embeddings keeps close to multi-head attention",
        task="language",
        metric="bits_per_byte",
        margin=-0.1,
    ),
)


@register(CARD)
class HeadEmbeddingAttention(AttentionLayer):
    """softmax attention between heads that share their projections.

    Args:
        dim, heads, context_dim, bias, position: as in `AttentionLayer`; heads divides dim unless head_dim is given.
        variant: "mul", the better one in the paper, or "add".
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
        variant: Variant = "mul",
    ) -> None:
        expect(variant in get_args(Variant), "variant", repr(variant), f"one of {', '.join(get_args(Variant))}")
        d = head_width(dim, heads, head_dim)
        super().__init__(Softmax(heads, d), dim, context_dim=context_dim, bias=bias, position=position)
        self.variant = variant
        self.q = nn.Linear(dim, d, bias)
        self.k, self.v = (nn.Linear(self.context_dim, d, bias) for _ in range(2))
        self.embeddings = nn.Parameter(torch.randn(3, heads, 1, d))

    def _told_apart(self, projected: torch.Tensor, which: int) -> torch.Tensor:
        one, e = projected.unsqueeze(1), self.embeddings[which]
        return one + e if self.variant == "add" else one * (e + 1)

    def _queries(self, x):
        return self._told_apart(self.q(x), 0)

    def _keys(self, context):
        return self._told_apart(self.k(context), 1)

    def _values(self, context):
        return self._told_apart(self.v(context), 2)
