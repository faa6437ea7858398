"""Plain multi-head attention, the baseline of every table.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762; grouped heads: Ainslie et al., "GQA", 2023,
arXiv 2305.13245.

    A = softmax(Q K^T / sqrt(d))          (batch, heads, n, m)
    y = W_o [A_1 V_1 ; ... ; A_h V_h]     (batch, n, dim)

With ``kv_heads`` smaller than ``heads``, each key/value head serves a group of heads / kv_heads query heads. With a
structured symbolic mask (a window, sinks, segments) only the blocks that the mask lets through are computed.
"""

from __future__ import annotations

from crosslight.attention.base import Core
from crosslight.cards import Card
from crosslight.engines import dense, sparse
from crosslight.registry import register

CARD = Card(
    id="softmax",
    kind="token",
    group="baseline",
    title="Attention Is All You Need",
    year=2017,
    paper="1706.03762",
    code="pytorch/pytorch",
    summary="Plain multi-head attention (also grouped and multi-query): every query reads every key by softmax.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="torch.nn.MultiheadAttention and scaled_dot_product_attention with the same weights",
)


@register(CARD)
class Softmax(Core):
    """softmax(q k^T / sqrt(d)) v; q (batch, heads, n, d), k and v (batch, kv_heads, m, d)."""

    grouped = True
    takes_bias = True

    def forward(self, q, k, v, *, mask=None, causal=False, bias=None, offset=0):
        if bias is None and not offset and sparse.pays(mask, causal, q.shape[2], k.shape[2]):
            return sparse.attend(q, k, v, mask=mask, causal=causal)
        return dense.attend(q, k, v, mask=mask, causal=causal, bias=bias, offset=offset)

    def weights(self, q, k, *, mask=None, causal=False, bias=None, offset=0):
        return dense.weights(q, k, mask=mask, causal=causal, bias=bias, offset=offset)
