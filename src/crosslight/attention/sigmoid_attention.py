"""Sigmoid attention: every weight is a sigmoid of its own score, whatever the other keys are.

Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024, arXiv 2409.04431.

    A_ij = sigmoid(q_i . k_j / sqrt(d) + b),   b = -log n          (batch, heads, n, m)
    y = W_o [A_1 V_1 ; ... ; A_h V_h]                              (batch, n, dim)

Rows do not sum to 1 and keys do not compete. The bias keeps a row's sum near 1 at the start of training, when the
scores are small: at score 0 a weight is 1 / (n + 1). With no row statistics, the sum over keys can be taken tile by
tile in any order, and the derivative of a weight is a (1 - a).

The paper's n is the sequence length. Here it is the number of keys that the row may read, so that a padded batch, a
causal pass and decoding give each token one and the same output; ``score_bias=-math.log(n)`` is the paper's constant,
under which a key that is added leaves the weights of all others as they are. The best practices around the core are
the model's: LayerScale of 1e-4 in vision, QK-norm, and a position ("alibi" or "rope") in language models.
"""

from __future__ import annotations

from functools import partial

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.registry import register

CARD = Card(
    id="sigmoid-attention",
    kind="token",
    group="scores",
    title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    year=2024,
    paper="2409.04431",
    code="apple/ml-sigmoid-attention",
    summary="A sigmoid of each score with bias -log n in place of the row softmax, so that keys do not compete.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the closed form of output and gradient, summed tile by tile in any order",
    differs="The paper's bias is one constant -log(sequence length). The default counts the keys that each row may "
    "read; score_bias fixes the constant.",
    evidence=Evidence(
        claim="A byte language model with sigmoid attention and b = -log n comes within a few percent of softmax",
        task="language",
        metric="bits_per_byte",
        margin=-0.1,
    ),
)


@register(CARD)
class SigmoidAttention(Core):
    """sigmoid(q k^T / sqrt(d) + b) v; q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        score_bias: b; -log of the number of keys that the row may read unless given.
    """

    grouped = True
    takes_bias = True

    def __init__(self, heads: int, head_dim: int, score_bias: float | None = None) -> None:
        super().__init__(heads, head_dim)
        self.normaliser = partial(dense.sigmoid, bias=score_bias)

    def forward(self, q, k, v, *, mask=None, causal=False, bias=None, offset=0):
        return dense.attend(q, k, v, mask=mask, causal=causal, bias=bias, offset=offset, normaliser=self.normaliser)

    def weights(self, q, k, *, mask=None, causal=False, bias=None, offset=0):
        return dense.weights(q, k, mask=mask, causal=causal, bias=bias, offset=offset, normaliser=self.normaliser)
