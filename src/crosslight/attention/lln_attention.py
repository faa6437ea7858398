"""Log-normal linear attention: exponential features whose spread is matched to that of softmax attention.

Nahshan, Kampeas, Haleva, "Linear Log-Normal Attention with Unbiased Concentration", 2023, arXiv 2311.13541.

    P_ij = phi_q(q_i) . phi_k(k_j) / sum_l phi_q(q_i) . phi_k(k_l)       phi_q(q) = exp(alpha q), phi_k(k) = exp(beta k)
    alpha = s / (sqrt(2) sigma_q),  beta = s / (sqrt(2) sigma_k),  s^2 = (sigma_q^2 sigma_k^2 - b) / a
    LLN+Diag = 1/2 (P + D) V                                             (batch, heads, n, d)
    D = softmax(Q K^T / sqrt(d)) inside blocks of d tokens               what P is too flat for: the near

For Gaussian queries and keys, the entries of softmax attention are log-normal with log-variance sigma_q^2 sigma_k^2,
and those of P nearly so with log-variance a s^2 + b; a and b were fitted once, on such noise. sigma_q and sigma_k are
the standard deviations of all entries of q and k. P costs O(n), and decodes from a state of (d, d) a head.

The features are scaled by exp(-maximum), which cancels. Causal, that is the maximum so far, as a decay of the state
whenever it rises: a later key cannot change, or push out, what came before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, linear, masks, sparse
from crosslight.engines.cache import KVCache
from crosslight.engines.linear import LinearState
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads n dim"]

CARD = Card(
    id="lln-attention",
    kind="token",
    group="linear",
    title="Linear Log-Normal Attention with Unbiased Concentration",
    year=2023,
    paper="2311.13541",
    summary="Linear attention with exponential features, as concentrated as softmax attention, and softmax in blocks.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the normalised matrix of exponentials and block-diagonal softmax, written out; the log-variance of "
    "softmax attention on Gaussian noise, within a factor of 1.4",
    differs="The paper takes the deviations over the batch at hand, from which a causal pass could read the future and "
    "an example its neighbours; here training moves running deviations towards those of each batch (the first batch "
    "sets them), and every pass uses the running ones. Cross-attention has no blocks: it is P alone.",
    evidence=Evidence(
        claim="closest to softmax attention among linear attentions: not worse in classifying digits",
        task="digits",
        metric="accuracy",
        margin=-0.03,
    ),
)

#: log-variance = A s^2 + B, the regression of the paper.
A, B = 0.14855178144710912, -0.35487039130661086
#: By how much a batch moves the running deviations, as in batch norm.
MOMENTUM = 0.1


@dataclass
class LLNState:
    """The largest key entry so far, the decayed sums, and the keys and values of the block that decoding is in."""

    peak: Float[Tensor, "batch heads 1"]
    sums: LinearState
    block: KVCache | None


def _deviation(x: Heads, keep: Bool[Tensor, "batch n"] | None) -> Float[Tensor, ""]:
    """The standard deviation of all entries of the tokens that are kept."""
    if keep is None:
        return x.std(correction=0)
    seen = keep[:, None, :, None].to(x.dtype).expand_as(x)
    count = seen.sum().clamp(min=1)
    mean = (x * seen).sum() / count
    return (((x - mean) * seen).square().sum() / count).sqrt()


@register(CARD)
class LLNAttention(Core):
    """q (batch, heads, n, d), k and v (batch, heads, m, d).

    Args:
        block: tokens in a block of softmax attention, head_dim unless given; 0 for P alone.
        mix: share of the blocks in the output.
    """

    sigma: Tensor
    batches: Tensor

    def __init__(self, heads: int, head_dim: int, *, block: int | None = None, mix: float = 0.5) -> None:
        super().__init__(heads, head_dim)
        self.block = head_dim if block is None else block
        expect(self.block >= 0, "block", block, "a number >= 0")
        expect(0 <= mix <= 1, "mix", mix, "a number from 0 to 1")
        self.mix = mix
        self.register_buffer("sigma", torch.ones(2))  # of queries and of keys
        self.register_buffer("batches", torch.zeros(()))

    def extra(self, how):
        # Blocks have a meaning, and padding of the queries is known, where these are of the stream that is read.
        return {"near": not how.cross, "asking": None if how.cross else masks.split(how.mask)[1]}

    def forward(self, q, k, v, *, mask=None, causal=False, near=True, asking=None):
        keep = masks.split(mask)[1]
        if self.training:
            self._observe(q, k, asking, keep)
        a, b, decay = self._features(q, k, keep, causal)
        y = linear.attend(a, b, v, causal=causal, keep=keep, log_decay=decay, normalise=True)
        if not (near and self.block):
            return y
        return torch.lerp(y, sparse.attend(q, k, v, mask=self._blocks(mask), causal=causal), self.mix)

    def weights(self, q, k, *, mask=None, causal=False, near=True, asking=None):
        keep = masks.split(mask)[1]
        a, b, decay = self._features(q, k, keep, causal)
        p = linear.weights(a, b, causal=causal, keep=keep, log_decay=decay, normalise=True)
        if not (near and self.block):
            return p
        return torch.lerp(p, dense.weights(q, k, mask=self._blocks(mask), causal=causal), self.mix)

    def step(self, q, k, v, state, near=True, **extra):
        alpha, beta = self._scales()
        wide = beta * k.to(beta.dtype)
        peak = wide.detach().amax(-1)
        if state is not None:
            peak = torch.maximum(peak, state.peak)
        decay = None if state is None else state.peak - peak
        a, b = self._query_features(q, alpha), (wide - peak.unsqueeze(-1)).exp().to(k.dtype)
        y, sums = linear.step(a, b, v, None if state is None else state.sums, log_decay=decay, normalise=True)
        if not self.block:
            return y, LLNState(peak, sums, None)
        fresh = state is None or state.block.length == self.block
        block = KVCache.start(k, v) if fresh else state.block.append(k, v)
        return torch.lerp(y, dense.attend(q, block.keys, block.values), self.mix), LLNState(peak, sums, block)

    def _blocks(self, mask: masks.Mask | None) -> masks.Mask | None:
        return masks.join(masks.same_block(self.block), mask)

    def _scales(self) -> tuple[Tensor, Tensor]:
        """alpha and beta."""
        sigma = self.sigma.to(torch.promote_types(self.sigma.dtype, torch.float32)).clamp(min=1e-6)
        s = ((sigma.prod().square() - B) / (2 * A)).sqrt()
        return s / sigma[0], s / sigma[1]

    @torch.no_grad()
    def _observe(
        self, q: Heads, k: Heads, asking: Bool[Tensor, "batch n"] | None, keep: Bool[Tensor, "batch m"] | None
    ) -> None:
        self.batches += 1
        share = (1 / self.batches).clamp(min=MOMENTUM)
        self.sigma += share * (torch.stack([_deviation(q, asking), _deviation(k, keep)]) - self.sigma)

    def _query_features(self, q: Heads, alpha: Tensor) -> Heads:
        wide = alpha * q.to(alpha.dtype)
        return (wide - wide.detach().amax(-1, keepdim=True)).exp().to(q.dtype)

    def _features(
        self, q: Heads, k: Heads, keep: Bool[Tensor, "batch m"] | None, causal: bool
    ) -> tuple[Heads, Heads, Float[Tensor, "batch heads m"] | None]:
        """phi_q, phi_k over their maximum and, where that is the one so far, the log-decay as it rises."""
        alpha, beta = self._scales()
        wide = beta * k.to(beta.dtype)
        peak, decay = wide.detach().amax(-1), None
        if keep is not None:
            # A masked key must not raise the maximum: it counts as the least of the visible ones.
            lost = ~keep[:, None]
            least = peak.masked_fill(lost, math.inf).amin(-1, keepdim=True)
            peak = torch.where(lost, torch.where(least.isinf(), 0, least), peak)
            wide = wide.masked_fill(lost.unsqueeze(-1), -math.inf)
        if causal:
            peak = peak.cummax(-1).values
            decay = torch.cat([torch.zeros_like(peak[..., :1]), peak[..., :-1] - peak[..., 1:]], -1)
        else:
            peak = peak.amax(-1, keepdim=True)
        return self._query_features(q, alpha), (wide - peak.unsqueeze(-1)).exp().to(k.dtype), decay
