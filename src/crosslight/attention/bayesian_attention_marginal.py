"""Attention as a marginal: the expected value under the posterior over the edges of a graph.

Singh and Buckley, "Attention: Marginal Probability is All You Need?", 2023, arXiv 2304.04556.

    p(x, phi) = 1/Z p(phi) prod_i psi(x_i, x_phi_i)        phi_i: the node that edge i comes from
    p(phi_i = j | x) = softmax_j(ln p(phi_i = j) + ln psi(q_i, k_j))        (batch, heads, n, m)
    out_i = E[v(x_phi_i)] = sum_j p(phi_i = j | x) v_j                      (batch, heads, n, d)

    bilinear potential    ln psi = q . k / sqrt(d)
    gaussian potential    ln psi = -|q - k|^2 / (2 sqrt(d))
    edge prior            mask: the edges that may be; `position`: ln p, up to a constant of each row (a distance, say)

A uniform prior and the bilinear potential are plain attention. More than one iteration infers the queries as well:
each round but the last replaces q_i by its expected key, sum_j p(phi_i = j | x) k_j. That is a Hopfield network under
the bilinear potential and the mean shift of a mixture of Gaussians under the other, in which queries settle on
clusters of keys. The Gaussian's |q|^2 is the same for all j, and -|k|^2 / 2 is one more channel of the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]

Potential = Literal["bilinear", "gaussian"]

CARD = Card(
    id="bayesian-attention-marginal",
    kind="token",
    group="scores",
    title="Attention: Marginal Probability is All You Need?",
    year=2023,
    paper="2304.04556",
    summary="The expectation of the values under a posterior over edges, by a potential, an edge prior and iterations.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the joint over all graphs of five nodes enumerated; plain attention; modern Hopfield updates",
    differs="The paper is a formulation; potentials and iterations are those of its examples with one edge a node. Its "
    "slot attention, in which edges are normalised over the queries, is the row slot-attention.",
    evidence=Evidence(
        claim="a prior over edges that knows distances helps a byte language model against a flat prior",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
        options={"position": "alibi"},
        baseline="bayesian-attention-marginal",
    ),
)


@register(CARD)
class MarginalAttention(Core):
    """E[v] under the posterior over edges; q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        potential: "bilinear" or "gaussian".
        iterations: rounds of inference; the last one reads the values.
    """

    grouped = True
    takes_bias = True

    def __init__(self, heads: int, head_dim: int, *, potential: Potential = "bilinear", iterations: int = 1) -> None:
        super().__init__(heads, head_dim)
        expect(potential in get_args(Potential), "potential", repr(potential), f"one of {get_args(Potential)}")
        expect(isinstance(iterations, int) and iterations > 0, "iterations", iterations, "a positive int")
        self.potential, self.iterations = potential, iterations

    def forward(self, q, k, v, *, mask=None, causal=False, bias=None, offset=0):
        how = {"mask": mask, "causal": causal, "bias": bias, "offset": offset}
        return self._expected(self._inferred(q, k, how), k, v, how)

    def weights(self, q, k, *, mask=None, causal=False, bias=None, offset=0):
        how = {"mask": mask, "causal": causal, "bias": bias, "offset": offset}
        q, k = self._paired(self._inferred(q, k, how), k)
        return dense.weights(q, k, scale=self.head_dim**-0.5, **how)

    def _inferred(self, q: Heads, k: Heads, how: dict[str, Any]) -> Heads:
        for _ in range(self.iterations - 1):
            q = self._expected(q, k, k, how)
        return q

    def _expected(self, q: Heads, k: Heads, v: Heads, how: dict[str, Any]) -> Heads:
        q, k = self._paired(q, k)
        return dense.attend(q, k, v, scale=self.head_dim**-0.5, **how)

    def _paired(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        """Queries and keys whose dot product is sqrt(d) ln psi, up to a constant of each query."""
        if self.potential == "bilinear":
            return q, k
        return torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, -k.square().sum(-1, True) / 2], -1)
