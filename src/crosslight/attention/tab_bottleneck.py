"""TAB: one attention head through which all that a decoder sees must pass, and which can close.

Rahmanzadehgervi, Nguyen, Liu, Mai and Nguyen, "TAB: Transformer Attention Bottlenecks enable User Intervention and
Debugging in Vision-Language Models", 2024, arXiv 2412.18675.

    A = softmax(Q K^T / sqrt(d))          over z = [CLS ; patches]        (batch, heads, n, m), one head in the paper
    A'_ij = A_ij (1 - A_i0)               the gate: what the query leaves to the patches, in [0, 1]
    y = W_o A' V                          no residual around it           (batch, n, dim)

Token 0 of what is read is its class token, and a sink: a query that puts all its attention there gets zero, and y =
b_o, the same for every image. In the paper x is the class token of one image of a pair, z the tokens of the other, and
the two outputs are all that the caption decoder reads:

    seen = torch.cat([attn(before[:, :1], after), attn(after[:, :1], before)], 1)

A user edits the matrix, ``attn.read(edited, x, z)``. `localisation_loss` holds it to a map of what changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

#: Channels added for the class token's weight: kernels want widths that are a multiple of 8.
EXTRA = 8

CARD = Card(
    id="tab-bottleneck",
    kind="token",
    group="scores",
    title="TAB: Transformer Attention Bottlenecks enable User Intervention and Debugging in Vision-Language Models",
    year=2024,
    paper="2412.18675",
    code="anguyen8/TAB",
    summary="One head, gated by what it leaves to the patches: attention on the class token closes the layer.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="torch.nn.MultiheadAttention, gated afterwards as in the authors' code; zero maps by gradient",
    differs="As in the authors' code the class token's own entry is gated like the others, not discarded. The code "
    "gates the class token's row only, the one that the decoder reads; here every query has its gate. The paper is "
    "noncausal; x = z = all tokens in causal self-attention leaves nothing to token 0, which reads itself only. In "
    "the evidence's task the first byte of the source stands where the class token does.",
    evidence=Evidence(
        claim="A decoder that sees its source through bottlenecks of one head spells about as well as with all heads",
        task="spelling",
        metric="bits_per_char",
        margin=-0.1,
        options={"heads": 1},
    ),
)


@register(CARD, heads=1)
class AttentionBottleneck(Core):
    """(1 - A_0) A v with A = softmax(q k^T / sqrt(d)); q (batch, heads, n, d), k and v (batch, kv_heads, m, d)."""

    grouped = True
    takes_bias = True

    def forward(self, q, k, v, *, mask=None, causal=False, bias=None, offset=0):
        # One more value channel, 1 for token 0 only, reads A_0 in the same pass; q and k grow along with zeros.
        first = v.new_zeros(*v.shape[:3], EXTRA)
        first[:, :, 0] = 1
        y = dense.attend(
            F.pad(q, (0, EXTRA)),
            F.pad(k, (0, EXTRA)),
            torch.cat([v, first], -1),
            mask=mask,
            causal=causal,
            bias=bias,
            offset=offset,
            scale=self.head_dim**-0.5,
        )
        return y[..., :-EXTRA] * (1 - y[..., -1:])

    def weights(self, q, k, *, mask=None, causal=False, bias=None, offset=0):
        a = dense.weights(q, k, mask=mask, causal=causal, bias=bias, offset=offset)
        return a * (1 - a[..., :1])


def localisation_loss(weights: Float[Tensor, "batch heads n m"], target: Float[Tensor, "batch n m"]) -> Tensor:
    """1 - cosine(A, target), mean over rows and heads. The target marks the patches that changed, or the class token
    (entry 0) where nothing did. The gate of a row does not matter to it: a closed row, all zero once 1 - A_0 is below
    the precision, is one on the class token."""
    closed = (weights.sum(-1, keepdim=True) == 0).to(weights.dtype)
    weights = weights + F.pad(closed, (0, weights.shape[-1] - 1))
    return 1 - F.cosine_similarity(weights, target.unsqueeze(1).to(weights.dtype), dim=-1).mean()
