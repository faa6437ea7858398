"""Dual triangle attention: one half of every head reads the past, the other half the future.

"Dual Triangle Attention: Effective Bidirectional Attention Without Positional Embeddings", 2026, arXiv 2604.18603.

    q = [q1 ; q2], k = [k1 ; k2], v = [v1 ; v2]                    two halves of each head's width d
    A1 = softmax over j <= i of q1_i . k1_j / sqrt(d/2)            down triangle
    A2 = softmax over j >= i of q2_i . k2_j / sqrt(d/2)            up triangle
    y = W_o [A1 v1 ; A2 v2] of all heads                           (batch, n, dim)

Each half is causal in its own direction, so the order of the tokens is implicit and no position is needed, and yet a
token sees both sides. The diagonal is in both triangles: no row is empty. No parameters are added. The up half is
computed as causal attention over the reversed sequence. A rotary position acts on the whole head before the split.

`weights` is (batch, 2 heads, n, n): first the down triangles of all heads, then the up triangles.
"""

from __future__ import annotations

import torch

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

CARD = Card(
    id="dual-triangle",
    kind="token",
    group="positions-masks",
    title="Dual Triangle Attention: Effective Bidirectional Attention Without Positional Embeddings",
    year=2026,
    paper="2604.18603",
    summary="Splits each head into a half that reads the past and a half that reads the future: order without "
    "positional embeddings.",
    patterns=("noncausal-self",),
    why_not="Half of every head reads the future, and two streams share no order by which to split their keys.",
    cost="n^2",
    checked="scaled_dot_product_attention on 2 heads of half width each with triangular masks",
    differs="In the released code the mask takes the first half of the kernel's heads as down triangles while its "
    "reshape interleaves the halves, so that whole heads point one way; the paper's halves are followed.",
    evidence=Evidence(
        claim="Finds the position of the largest token without positional embeddings, where plain bidirectional "
        "attention stays at chance",
        task="argmax-probe",
        metric="accuracy",
        margin=0.3,
    ),
)


@register(CARD)
class DualTriangle(Core):
    """[down(q1, k1, v1) ; up(q2, k2, v2)]; q (batch, heads, n, d), k and v (batch, kv_heads, n, d), d even."""

    grouped = True

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        expect(head_dim % 2 == 0, "head_dim", head_dim, "an even head width, of which each direction takes half")

    def forward(self, q, k, v, *, mask=None, causal=False):
        (q1, q2), (k1, k2), (v1, v2) = (t.chunk(2, -1) for t in (q, k, v))
        down = dense.attend(q1, k1, v1, mask=mask, causal=True)
        up = dense.attend(*(t.flip(2) for t in (q2, k2, v2)), mask=_reversed(mask, q), causal=True)
        return torch.cat([down, up.flip(2)], -1)

    def weights(self, q, k, *, mask=None, causal=False):
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        down = dense.weights(q1, k1, mask=mask, causal=True)
        up = dense.weights(q2.flip(2), k2.flip(2), mask=_reversed(mask, q), causal=True)
        return torch.cat([down, up.flip(2, 3)], 1)

    def read(self, weights, v):
        down, up = weights.chunk(2, 1)
        v1, v2 = dense.repeat_heads(v, down.shape[1]).chunk(2, -1)
        return torch.cat([down @ v1, up @ v2], -1)


def _reversed(mask, q):
    """The mask of the reversed sequence."""
    causal, keep, rest = masks.split(mask)
    if mask is None or (rest is None and not causal):
        return None if keep is None else masks.Keys(keep.flip(1))
    batch, heads, n, _ = q.shape
    return masks.Pairs(mask.dense(batch, heads, n, n, device=q.device).flip(2, 3))
