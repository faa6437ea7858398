"""Multi-query attention: all query heads share one key head and one value head.

Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019, arXiv 1911.02150.

    Q_h = x W_q,h            (batch, heads, n, d)
    K = z W_k,  V = z W_v    (batch, 1, m, d)
    A_h = softmax(Q_h K^T / sqrt(d))
    y = sum_h (A_h V) W_o,h  (batch, n, dim)

It equals multi-head attention whose key and value projections are one head repeated. A decoding step then reads
2 d cached numbers a token, however many heads ask, and a layer has 2 dim d (heads - 1) parameters fewer. The paper
spends those on a wider feed-forward part, which is the model's choice. ``kv_heads`` between 1 and heads is
grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245).
"""

from __future__ import annotations

from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.registry import register

CARD = Card(
    id="mqa",
    kind="token",
    group="heads",
    title="Fast Transformer Decoding: One Write-Head is All You Need",
    year=2019,
    paper="1911.02150",
    summary="Softmax attention with one key head and one value head for all query heads: a cache smaller by heads.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="multi-head attention with one key/value head repeated; scaled_dot_product_attention(enable_gqa=True)",
    evidence=Evidence(
        claim="A byte language model with one key/value head loses little against multi-head attention",
        task="language",
        metric="bits_per_byte",
        margin=-0.1,
    ),
)


@register(CARD, kv_heads=1)
class MultiQueryAttention(Softmax):
    """softmax(q k^T / sqrt(d)) v; q (batch, heads, n, d), k and v (batch, 1, m, d)."""
