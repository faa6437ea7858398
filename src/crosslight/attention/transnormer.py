"""TransNormer: linear attention without denominator, normalised afterwards, and attention in blocks for early layers.

Qin, Han, Sun, Li, Kong, Barnes, Zhong, "The Devil in Linear Transformer", 2022, arXiv 2210.10340.

    NormAttention   O = RMSNorm([O_1 ; ... ; O_h]),  O_h = phi(Q_h) (phi(K_h)^T V_h)         Q_h, K_h, V_h (n, d)
    DiagAttention   O_h = g(Q_h K_h^T / sqrt(d)) V_h inside blocks of w tokens that do not overlap
    y = W_o O                                                                               (batch, n, dim)
    T1: phi = elu, g = ReLU (and RMSNorm over O);    T2: phi = 1 + elu, g = softmax

The denominator phi(Q) sum_j phi(k_j) of linear attention has unbounded gradients; the norm has not. Linear attention
also spreads its weights over far tokens, where early layers of a transformer look near: these are DiagAttention
(``local=True``), the later half NormAttention. Both cost O(n). Causal, NormAttention decodes from the sum
phi(K)^T V (d, d), DiagAttention from the keys and values of the block it is in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core, How
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, linear, masks
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.errors import UnsupportedPattern, expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads n dim"]

CARD = Card(
    id="transnormer",
    kind="token",
    group="linear",
    title="The Devil in Linear Transformer",
    year=2022,
    paper="2210.10340",
    code="OpenNLPLab/Transnormer",
    summary="Linear attention with a norm in place of the denominator; attention inside blocks in early layers.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the quadratic form followed by the norm; attention under a block-diagonal mask; full attention at block n",
    differs="DiagAttention is an option of the layer (`local`), as a model has both; it has no cross-attention, since "
    "blocks cut one stream. Positions are left to `position`, the gated linear unit to the block around it.",
    evidence=Evidence(
        claim="byte language model not worse than softmax attention, at linear cost",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
    ),
)


def rela(scores: Tensor, keep: Bool[Tensor, "#batch #heads n m"] | None) -> Tensor:
    """Rectified scores, which are sparse and not normalised."""
    weights = scores.relu()
    return weights if keep is None else weights.masked_fill(~keep, 0.0)


class TransNormerLayer(AttentionLayer):
    """The layer around `TransNormer`: the norm over all heads together."""

    def __init__(self, core: TransNormer, dim: int, **own: Any) -> None:
        super().__init__(core, dim, **own)
        # Softmax in blocks is normalised already. With a larger epsilon the norm would depend on the scale of the sum.
        plain = core.local and core.variant == "t2"
        self.norm = nn.Identity() if plain else nn.RMSNorm(self.heads * self.head_dim, eps=1e-12)

    def _extra(self, how: How) -> dict[str, Any]:
        if how.cross and self.core.local:
            raise UnsupportedPattern(f"pattern: transnormer has no {how.pattern} attention with local=True")
        return super()._extra(how)

    def _merge(self, y, x):
        return self.out(self.norm(y.transpose(1, 2).flatten(2)))


@register(CARD)
class TransNormer(Core):
    """q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        variant: "t1" (elu; ReLU in blocks) or "t2" (1 + elu; softmax in blocks).
        local: DiagAttention, for the earlier half of a model's layers, instead of NormAttention.
        block: tokens in a block of DiagAttention.
    """

    grouped = True
    layer = TransNormerLayer

    def __init__(self, heads: int, head_dim: int, *, variant: str = "t1", local: bool = False, block: int = 64) -> None:
        super().__init__(heads, head_dim)
        expect(variant in ("t1", "t2"), "variant", repr(variant), "'t1' or 't2'")
        expect(block >= 1, "block", block, "a number >= 1")
        self.variant, self.local, self.block = variant, local, block

    def forward(self, q, k, v, *, mask=None, causal=False):
        if self.local:
            return self._diagonal(q, k, v, mask, causal)
        return linear.attend(self._features(q), self._features(k), v, causal=causal, keep=masks.split(mask)[1])

    def weights(self, q, k, *, mask=None, causal=False):
        if self.local:
            rule = masks.join(masks.same_block(self.block), mask)
            return dense.weights(q, k, mask=rule, causal=causal, normaliser=self._normaliser)
        return linear.weights(self._features(q), self._features(k), causal=causal, keep=masks.split(mask)[1])

    def step(self, q, k, v, state, **extra):
        if not self.local:
            return linear.step(self._features(q), self._features(k), v, state)
        full = state is None or state.length == self.block
        state = KVCache.start(k, v) if full else state.append(k, v)
        return dense.attend(q, state.keys, state.values, normaliser=self._normaliser), state

    @property
    def _normaliser(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        return rela if self.variant == "t1" else dense.softmax

    def _features(self, x: Heads) -> Heads:
        # Not F.elu, whose compiled backward fails on transposed heads.
        elu = x.relu() + x.clamp(max=0).expm1()
        return elu if self.variant == "t1" else 1 + elu

    def _diagonal(self, q: Heads, k: Heads, v: Heads, mask: Mask | None, causal: bool) -> Heads:
        """The blocks as elements of the batch, the last one padded."""
        batch, _, n = q.shape[:3]
        size = min(self.block, n)
        short = -n % size
        keep = masks.split(mask)[1]
        if keep is None and short:
            keep = torch.ones(batch, n, dtype=torch.bool, device=q.device)

        def cut(t: Tensor) -> Tensor:
            return F.pad(t, (0, 0, 0, short)).unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)

        rule = None if keep is None else masks.keys(F.pad(keep, (0, short)).unflatten(1, (-1, size)).flatten(0, 1))
        y = dense.attend(cut(q), cut(k), cut(v), mask=rule, causal=causal, normaliser=self._normaliser)
        return y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]
