"""Adaptive filter attention: earlier tokens are carried forward by linear dynamics and weighed by how they agree.

Racioppo, "Attention as an Adaptive Filter", 2025, arXiv 2509.04154; the isotropic form, at the cost of attention.

Tokens are noisy observations of dx = A x dt + sigma dw, diagonal in a learned complex basis: lambda = -alpha + i omega,
one alpha and one set of noises a head. The halves of a head are real and imaginary parts, d each. With dt = |i - j|:

    k_ij = exp(lambda (t_i - t_j)) k_j                                              the key carried to the query
    V_ij = eta^2 e^{-2 alpha dt} + sigma^2 (1 - e^{-2 alpha dt}) / (2 alpha) + gamma^2      its variance (Lyapunov)
    |r_ij|^2 = |q_i - k_ij|^2 = |q_i|^2 + e^{-2 alpha dt} |k_j|^2 - 2 e^{-alpha dt} q~_i . k~_j
    w_ij = V_ij^-1 / (1 + |r_ij|^2 / (nu d V_ij))                                   robust precision (Student t)
    A_ij = w_ij^{tau^2} / sum_j w_ij^{tau^2}                                        (batch, heads, n, n)
    y_i = W_o [sum_j A_ij exp(lambda (t_i - t_j)) v_j]                              (batch, n, dim)

eta^2 is the noise of the key, gamma^2 of the query, sigma^2 of the process. q~, k~, v~ are turned back by omega t, as
by RoPE, and the sum is turned forth again. ``robust=False`` takes w = V^-1 exp(-|r|^2 / (nu d V)). For alpha and sigma
of zero, queries and keys of length one and a large nu, this is softmax attention with rotary positions on scores
2 tau^2 q . k / (nu d V).

`weights` shows A_ij e^{-alpha dt}, which multiplies v~. The residuals need one product of queries and keys; all else
depends on dt alone. Rows are taken in chunks, so that no n x n map is kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.engines.backend import forced
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]

CARD = Card(
    id="afa",
    kind="token",
    group="scores",
    title="Attention as an Adaptive Filter",
    year=2025,
    paper="2509.04154",
    code="PCR-git/Adaptive-Filter-Attention",
    summary="Weighs earlier tokens, carried forward by learned linear dynamics, by propagated precision and residual.",
    patterns=("noncausal-self", "causal-self"),
    why_not="Weights depend on the time between two tokens of one stream; another stream has no place on its clock.",
    cost="n^2",
    decode="kv",
    checked="complex residuals pair by pair; the Lyapunov equation integrated step by step; softmax attention with "
    "RoPE in the limit",
    differs="The paper filters, causally; noncausal attention smooths with the reversed process, which for these "
    "dynamics decays alike and turns back. Constants (the factor nu d, the power tau^2, softplus for what is "
    "positive) follow the authors' code; start values are ours. The anisotropic form, norms of queries and keys, the "
    "prediction of the next step and the code's inner residual are left out. Tokens are one unit of time apart.",
    evidence=Evidence(
        claim="A byte language model that filters is better than one with rotary positions",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
        baseline_options={"position": "rope"},
    ),
)


def turned(x: Heads, angles: Float[Tensor, "heads n half"]) -> Heads:
    """exp(i angle) x, where the halves of x are real and imaginary parts."""
    real, imaginary = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


def variance(dt: Tensor, alpha: Tensor, sigma2: Tensor, eta2: Tensor, gamma2: Tensor) -> Tensor:
    """V after the time ``dt``; its limit sigma2 dt + eta2 + gamma2 where alpha is 0."""
    still = alpha == 0
    safe = torch.where(still, torch.ones_like(alpha), alpha)
    diffusion = torch.where(still, dt, -torch.expm1(-2 * safe * dt) / (2 * safe))
    return eta2 * (-2 * alpha * dt).exp() + sigma2 * diffusion + gamma2


def _raw(value: float) -> float:
    """The number whose softplus is ``value``."""
    return math.log(math.expm1(value))


class FilterLayer(AttentionLayer):
    """The layer around `AdaptiveFilter`, whose first query may stand at a later time."""

    def _offset(self, extra: dict[str, Any], length: int) -> dict[str, Any]:
        return extra | {"offset": length}


@register(CARD)
class AdaptiveFilter(Core):
    """Robust, precision-weighted mean of values carried forward; q, k, v (batch, heads, n, d).

    Args:
        robust: Student-t weights; Gaussian ones if not.
    """

    layer = FilterLayer

    def __init__(self, heads: int, head_dim: int, *, robust: bool = True) -> None:
        super().__init__(heads, head_dim)
        expect(head_dim % 2 == 0, "head_dim", head_dim, "an even width: real and imaginary parts")
        self.robust = robust
        half = head_dim // 2
        #: Frequencies start as those of RoPE, decays as the slopes of ALiBi.
        rates = 10_000.0 ** (-torch.arange(half) / half)
        self.omega = nn.Parameter(rates.repeat(heads, 1))
        self.raw_alpha = nn.Parameter(torch.tensor([_raw(2.0 ** (-8 * (h + 1) / heads)) for h in range(heads)]))
        self.raw_sigma, self.raw_eta, self.raw_gamma, self.raw_nu = (
            nn.Parameter(torch.full((heads,), _raw(value))) for value in (0.1, 1.0, 1.0, 1.0)
        )
        self.tau = nn.Parameter(torch.ones(heads))

    def dynamics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma^2, eta^2 and gamma^2, (heads,) each."""
        alpha, sigma2, eta2, gamma2 = (
            F.softplus(raw) for raw in (self.raw_alpha, self.raw_sigma, self.raw_eta, self.raw_gamma)
        )
        return alpha, sigma2, eta2 + 1e-5, gamma2 + 1e-5

    def _angles(self, start: int, n: int) -> Float[Tensor, "heads n half"]:
        # In at least float32: angles of far positions do not survive half precision.
        dtype = torch.promote_types(self.omega.dtype, torch.float32)
        t = torch.arange(start, start + n, device=self.omega.device, dtype=dtype)
        return t[:, None] * self.omega.to(dtype).unsqueeze(1)

    def _back(self, x: Heads, start: int = 0) -> Heads:
        """x~, with the first token at the time ``start``."""
        return turned(x, -self._angles(start, x.shape[2]))

    def _forth(self, y: Heads, start: int = 0) -> Heads:
        return turned(y, self._angles(start, y.shape[2]))

    def residuals(self, q: Heads, k: Heads, decay: Float[Tensor, "heads n m"]) -> Float[Tensor, "batch heads n m"]:
        """|r|^2 of turned queries and keys, with ``decay`` = e^{-alpha dt}."""
        length_q, length_k = q.square().sum(-1).unsqueeze(-1), k.square().sum(-1).unsqueeze(-2)
        return torch.addcmul(length_q, decay, torch.addcmul((-2 * q) @ k.transpose(-1, -2), decay, length_k))

    def _rows(
        self, q: Heads, k: Heads, mask: Mask | None, causal: bool, offset: int
    ) -> Float[Tensor, "batch heads n m"]:
        """A e^{-alpha dt} of turned queries, the first at the time ``offset``, and turned keys from time 0 on."""
        dtype = torch.promote_types(q.dtype, torch.float32)  # residuals are small differences of large numbers
        n, m = q.shape[2], k.shape[2]
        # All times between two tokens, from the last query and first key to the first query and last key.
        times = torch.arange(offset + n - 1, offset - m, -1, device=q.device, dtype=dtype).abs()

        def pairs(t: Float[Tensor, "heads times"]) -> Float[Tensor, "heads n m"]:
            return t.unfold(1, m, 1).flip(1)

        alpha, sigma2, eta2, gamma2 = (t.to(dtype).unsqueeze(1) for t in self.dynamics())
        v = variance(times, alpha, sigma2, eta2, gamma2)
        scale = F.softplus(self.raw_nu).to(dtype).unsqueeze(1) * self.head_dim / 2 * v
        decay = pairs((-alpha * times).exp())
        misfit = self.residuals(q.to(dtype), k.to(dtype), decay) * pairs(1 / scale)
        # Rounding may take a residual of zero below it.
        misfit = misfit.clamp(min=0).log1p() if self.robust else misfit
        power = -self.tau.to(dtype).square().unsqueeze(1)
        scores = torch.addcmul(pairs(power * v.log()), misfit, power.unsqueeze(1))
        return (dense.softmax(scores, dense.visible(q, k, mask, causal, offset)) * decay).to(q.dtype)

    def _attend(self, q: Heads, k: Heads, v: Heads, mask: Mask | None, causal: bool, offset: int) -> Heads:
        """The sum over turned values, turned forth."""
        n, m = q.shape[2], k.shape[2]

        def part(start: int, stop: int) -> Tensor:
            last = min(m, offset + stop) if causal else m
            return self._rows(q[:, :, start:stop], k[:, :, :last], mask, causal, offset + start) @ v[:, :, :last]

        whole = forced() == "reference"
        y = part(0, n) if whole else dense.by_rows(part, n, q.shape[0] * self.heads * m)
        return self._forth(y, offset)

    def forward(self, q, k, v, *, mask=None, causal=False):
        return self._attend(self._back(q), self._back(k), self._back(v), mask, causal, 0)

    def weights(self, q, k, *, mask=None, causal=False):
        return self._rows(self._back(q), self._back(k), mask, causal, 0)

    def read(self, weights, v):
        return self._forth(weights @ self._back(v))

    def step(self, q, k, v, state=None, *, offset=0, **extra):
        q, k, v = (self._back(t, offset) for t in (q, k, v))
        state = KVCache.start(k, v) if state is None else state.append(k, v)
        return self._attend(q, state.keys, state.values, None, True, offset), state
