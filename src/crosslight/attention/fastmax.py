"""Fastmax: the exponential of softmax replaced by its Taylor polynomial, which factors.

Gerami, Hoover, Dulepet, Duraiswami, "FAST: Factorizable Attention for Speeding up Transformers", 2024,
arXiv 2402.07901.

    q^ = (q - mean(q)) / ||q - mean(q)||,   k^ likewise        mean over the d channels of a token
    s_ij = q^_i . k^_j / c,   f(s) = 1 + s + ... + s^p / p!     p = 1 or 2, temperature c
    A_ij = f(s_ij) / sum_j f(s_ij),   out = A V                 (batch, heads, n, d)

Plain attention has exp(q . k / sqrt(d)) for f. A polynomial of a product of vectors is itself a product of vectors,
f(s_ij) = phi(q^_i / c) . phi(k^_j) with

    phi(x) = (1, x_a, x_a^2 / sqrt(2), x_a x_b for a < b)       1 + d for p = 1, 1 + d + d (d + 1) / 2 for p = 2

so that A is never formed: time O(n d^(p+1)), a state of d (d + 1) / 2 + d + 1 rows. For p = 2, f(s) > 1/2: every row is
a distribution over all the keys. For p = 1 that holds while |s| < 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import linear, masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

CARD = Card(
    id="fastmax",
    kind="token",
    group="linear",
    title="FAST: Factorizable Attention for Speeding up Transformers",
    year=2024,
    paper="2402.07901",
    summary="Softmax with the Taylor polynomial of exp: exact attention over all keys, factored to linear cost.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the n x n matrix of the polynomial, row by row, in float64; softmax for small scores, with error O(s^3)",
    differs="Dropout on the quadratic features is left out. Equal products x_a x_b = x_b x_a are kept once: half of "
    "the features. Queries and keys can be divided by their deviation instead of their norm (`normalise`).",
    evidence=Evidence(
        claim="quality close to softmax attention at linear cost, p = 2",
        task="language",
        metric="bits_per_byte",
        margin=-0.1,
    ),
)


@register(CARD)
class Fastmax(Core):
    """q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        p: degree of the polynomial, 1 or 2.
        temperature: c, by which scores are divided.
        normalise: what centred queries and keys are divided by: their "norm", or their deviation, "std".
    """

    grouped = True

    def __init__(
        self, heads: int, head_dim: int, *, p: int = 2, temperature: float = 1.0, normalise: str = "norm"
    ) -> None:
        super().__init__(heads, head_dim)
        expect(p in (1, 2), "p", p, "1 or 2")
        expect(temperature > 0, "temperature", temperature, "a number > 0")
        expect(normalise in ("norm", "std"), "normalise", repr(normalise), "'norm' or 'std'")
        self.p, self.temperature, self.normalise = p, float(temperature), normalise

    def forward(self, q, k, v, *, mask=None, causal=False):
        q, k = self._features(q, self.temperature), self._features(k)
        return linear.attend(q, k, v, causal=causal, keep=masks.split(mask)[1], normalise=True)

    def weights(self, q, k, *, mask=None, causal=False):
        q, k = self._features(q, self.temperature), self._features(k)
        return linear.weights(q, k, causal=causal, keep=masks.split(mask)[1], normalise=True)

    def step(self, q, k, v, state, **extra):
        return linear.step(self._features(q, self.temperature), self._features(k), v, state, normalise=True)

    def _features(self, x: Tensor, temperature: float = 1.0) -> Float[Tensor, "batch heads n features"]:
        """phi of the standardised vectors over the temperature."""
        d = x.shape[-1]
        length = 1.0 if self.normalise == "norm" else math.sqrt(d)
        x = F.normalize(x - x.mean(-1, keepdim=True), dim=-1, eps=1e-6) * (length / temperature)
        parts = [torch.ones_like(x[..., :1]), x]
        if self.p == 2:
            a, b = torch.triu_indices(d, d, 1, device=x.device)
            parts += [x.square() / math.sqrt(2), x[..., a] * x[..., b]]
        return torch.cat(parts, -1)
