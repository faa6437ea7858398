"""DARE: one embedding decides where to look, another what is read there.

Feng, Pan et al., "Long-Sequence Recommendation Models Need Decoupled Embeddings", 2024,
arXiv 2410.02604.

    x = [a ; r], z = [a' ; r']    attention and representation embeddings of n targets and m behaviours
    s_ij = sum over parts p of <a_i, a'_j>_p / sqrt(d_p)           (batch, heads, n, m); parts: semantic, time
    A_i = softmax of s_i over its K largest                        (batch, heads, n, m)
    h_i = sum_j A_ij r'_j                                          (batch, n, width of r')
    y_i = W_o [h_i ; r_i * h_i]                                    (batch, n, dim)

The loss reaches r only as something that is read and a only through the scores: the two roles, whose gradients conflict
in one table, have a table each. There are no query, key or value projections. Attention embeddings may be narrower,
which makes the search for the K largest cheaper. ``tied`` is the baseline: one embedding x in both roles.

Both embeddings travel as the channels of one token, attention first. The product r * h, which makes the history aware
of the target, is part of the output; the prediction from r, h and r * h is the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

CARD = Card(
    id="dare-rec",
    kind="token",
    group="scores",
    title="Long-Sequence Recommendation Models Need Decoupled Embeddings",
    year=2024,
    paper="2410.02604",
    code="thuml/DARE",
    summary="Scores from one embedding and values from another, without projections, over the K best keys of a query.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    small={"top": 5},
    checked="the equations written out target by target; where the gradients of the two embeddings flow",
    differs="The paper's embedding tables are the model's: both embeddings come as channels of one token. A context of "
    "another width has r mapped to it before the product. Heads > 1 are not the paper's.",
    evidence=Evidence(
        claim="channels for relevance alone read a history no worse than channels in both roles",
        task="forecast",
        metric="mae",
        margin=0.0,
        baseline="dare-rec",
        baseline_options={"tied": True},
    ),
)


def softmax_of_top(
    scores: Float[Tensor, "batch heads n m"], keep: Bool[Tensor, "#batch #heads n m"] | None, top: int
) -> Float[Tensor, "batch heads n m"]:
    """Row softmax over the ``top`` largest visible scores."""
    if top >= scores.shape[-1]:
        return dense.softmax(scores, keep)
    ranked = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked.topk(top, -1).indices, True)
    return dense.softmax(scores, chosen if keep is None else chosen & keep)


class Searched(Core):
    """softmax over the ``top`` largest scores of each query, or over all of them."""

    def __init__(self, heads: int, head_dim: int, top: int | None) -> None:
        super().__init__(heads, head_dim)
        self.normaliser = dense.softmax if top is None else partial(softmax_of_top, top=top)

    def forward(self, q, k, v, *, mask=None, causal=False):
        return dense.attend(q, k, v, mask=mask, causal=causal, scale=1.0, normaliser=self.normaliser)

    def weights(self, q, k, *, mask=None, causal=False):
        return dense.weights(q, k, mask=mask, causal=causal, scale=1.0, normaliser=self.normaliser)


@register(CARD)
class DecoupledAttention(AttentionLayer):
    """softmax(a a'^T) r' over the best keys of each query, joined with the query's own r.

    Args:
        dim: width of x = [a ; r] and of the output.
        heads: slices of both embeddings that are scored by themselves; 1 in the paper.
        context_dim: width of z = [a' ; r'], dim unless given; a' is as wide as a.
        attention_dim: width of a; half of dim, or of context_dim if that is narrower, unless given.
        parts: widths of the parts of a head's attention embedding that are scaled by themselves; one unless given.
        top: K; all keys unless given.
        tied: x and z, which are then of equal width, are both embeddings at once.
        bias: whether the output projection has one.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        attention_dim: int | None = None,
        parts: Sequence[int] | None = None,
        top: int | None = None,
        tied: bool = False,
        bias: bool = True,
    ) -> None:
        width = dim if context_dim is None else context_dim
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(width % heads == 0, "heads", heads, f"a divisor of context_dim = {width}")
        expect(top is None or top > 0, "top", top, "a positive int")
        if tied:
            expect(width == dim, "context_dim", width, f"dim = {dim}, as tied embeddings are compared whole")
            scored, start = dim, 0
        else:
            scored = min(dim, width) // heads // 2 * heads if attention_dim is None else attention_dim
            expect(
                0 < scored < min(dim, width) and scored % heads == 0,
                "attention_dim",
                scored,
                f"a multiple of heads = {heads} below {min(dim, width)}",
            )
            start = scored
        d = scored // heads
        parts = (d,) if parts is None else tuple(parts)
        expect(sum(parts) == d and min(parts) > 0, "parts", parts, f"widths that sum to {d}")
        super().__init__(Searched(heads, d, top), dim, context_dim=context_dim, bias=bias)
        del self.q, self.k, self.v
        self.scored, self.start, self.parts = scored, start, parts
        own, read = dim - start, self.context_dim - start
        self.own = nn.Identity() if own == read else nn.Linear(own, read, bias=False)
        self.out = nn.Linear(2 * read, dim, bias)

    def _queries(self, x):
        scale = torch.cat([x.new_full((part,), part**-0.5) for part in self.parts])
        return self._split(x[..., : self.scored], self.heads) * scale

    def _keys(self, context):
        return self._split(context[..., : self.scored], self.heads)

    def _values(self, context):
        return context[..., self.start :].unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _merge(self, y, x):
        h = y.transpose(1, 2).flatten(2)
        return self.out(torch.cat([h, self.own(x[..., self.start :]) * h], -1))
