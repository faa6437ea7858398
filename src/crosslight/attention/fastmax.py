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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, linear, masks
from crosslight.engines.backend import forced
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


#: Tokens whose features are held at a time.
SEGMENT = 256


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
        keep = masks.split(mask)[1]
        if forced() == "reference":
            return self.weights(q, k, mask=mask, causal=causal) @ dense.repeat_heads(v, q.shape[1])
        # The sum of the weights is what they read from a value of one.
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        if keep is not None:
            v = v * keep[:, None, :, None].to(v.dtype)
        q, k = self._standard(q, self.temperature), dense.repeat_heads(self._standard(k), q.shape[1])
        v = dense.repeat_heads(v, q.shape[1])
        wide = torch.promote_types(q.dtype, torch.float32)
        state = torch.zeros(*q.shape[:2], self._width(), v.shape[3], dtype=wide, device=q.device)
        pieces = zip(k.split(SEGMENT, 2), v.split(SEGMENT, 2), strict=True)
        if causal:
            parts = []
            for here, (keys, values) in zip(q.split(SEGMENT, 2), pieces, strict=True):
                part, state = _again(self._segment, here, keys, values, state)
                parts.append(part)
        else:
            for keys, values in pieces:
                state = _again(self._gathered, keys, values, state)
            parts = [_again(self._spread, here, state) for here in q.split(SEGMENT, 2)]
        out = torch.cat(parts, 2)
        return out[..., :-1] / torch.where(out[..., -1:] == 0, 1, out[..., -1:])

    # The features are many times as wide as a head, so a segment's are made where they are used, and made again in the
    # backward pass.
    def _gathered(self, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        return state + (self._expanded(k).transpose(-1, -2) @ v).to(state.dtype)

    def _spread(self, q: Tensor, state: Tensor) -> Tensor:
        return self._expanded(q) @ state.to(q.dtype)

    def _segment(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Causal: inside the segment by scores, what came before it by the state."""
        s = q @ k.transpose(-1, -2)
        scores = 1 + s + s.square() / 2 if self.p == 2 else 1 + s
        return scores.tril() @ v + self._spread(q, state), self._gathered(k, v, state)

    def weights(self, q, k, *, mask=None, causal=False):
        q, k = self._features(q, self.temperature), self._features(k)
        return linear.weights(q, k, causal=causal, keep=masks.split(mask)[1], normalise=True)

    def step(self, q, k, v, state, **extra):
        return linear.step(self._features(q, self.temperature), self._features(k), v, state, normalise=True)

    def _width(self) -> int:
        d = self.head_dim
        return 1 + d + (d * (d + 1) // 2 if self.p == 2 else 0)

    def _standard(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """Centred over the channels and of length one (or deviation one), over the temperature."""
        length = 1.0 if self.normalise == "norm" else math.sqrt(x.shape[-1])
        return F.normalize(x - x.mean(-1, keepdim=True), dim=-1, eps=1e-6) * (length / temperature)

    def _expanded(self, x: Tensor) -> Float[Tensor, "batch heads n features"]:
        """phi."""
        parts = [torch.ones_like(x[..., :1]), x]
        if self.p == 2:
            a, b = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
            parts += [x.square() / math.sqrt(2), x[..., a] * x[..., b]]
        return torch.cat(parts, -1)

    def _features(self, x: Tensor, temperature: float = 1.0) -> Float[Tensor, "batch heads n features"]:
        return self._expanded(self._standard(x, temperature))


def _again(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """The call; what it keeps for the backward pass is its input alone."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
