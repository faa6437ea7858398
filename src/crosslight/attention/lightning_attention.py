"""Lightning attention: causal linear attention with a fixed decay a head, in blocks, as the TransNormerLLM uses it.

Qin, Sun, Li, Shen, Sun, Zhong, "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning
Attention", 2024, arXiv 2405.17381.

    Q = SiLU(X W_q),  K = SiLU(X W_k),  V = X W_v,  U = X W_u           (n, d) of each head h
    o_t = sum_{s <= t} lambda_h^(t-s) (q_t . k_s) v_s                    no softmax, no denominator
    Y   = W_o [SRMSNorm([o_1 ; ... ; o_H]) * U],   SRMSNorm(x) = sqrt(width) x / ||x||
    lambda_h = exp(-(8 h / H) (1 - l / L))                               head h of H, layer l of L, both from 0

In blocks of B tokens with a state S (d, d), M_ij = lambda^(i-j) below the diagonal and Lam = diag(lambda^1 ..
lambda^B):

    O_t = [(Q_t K_t^T) * M] V_t + Lam Q_t S,    S <- lambda^B S + (lambda^B Lam^-1 K_t)^T V_t

which costs O(n B d + n d^2) and decodes from S alone. The noncausal forms are Crosslight's own: with the decay over
|t - s| when a stream reads itself, and without decay when it reads a context, which has no common clock with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core
from crosslight.cards import Card, Evidence
from crosslight.engines import linear, masks
from crosslight.errors import expect
from crosslight.registry import register

CARD = Card(
    id="lightning-attention",
    kind="token",
    group="linear",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    year=2024,
    paper="2405.17381",
    code="OpenNLPLab/TransnormerLLM",
    summary="Causal linear attention with a fixed decay a head, in blocks, normalised and gated afterwards.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the masked quadratic form and the token recurrence in float64, with gradients",
    differs="The released model spaces its decays as ALiBi does, lambda_h = exp(-2^(-8 h / H)); give them as `decay`. "
    "Rotary-like positions (LRPE), which it has in its first layer only, are left to `position`. The paper is causal "
    "only; the noncausal and cross forms are ours.",
    evidence=Evidence(
        claim="language modelling on par with softmax attention of equal size",
        task="language",
        metric="bits_per_byte",
        margin=-0.15,
    ),
)


class LightningLayer(AttentionLayer):
    """The layer around `LightningAttention`: SiLU on queries and keys, norm and gate on what they read."""

    def __init__(self, core: Core, dim: int, *, bias: bool = False, **own: Any) -> None:
        super().__init__(core, dim, bias=bias, **own)
        self.gate = nn.Linear(dim, self.heads * self.head_dim, bias)

    def _queries(self, x):
        return F.silu(super()._queries(x))

    def _keys(self, context):
        return F.silu(super()._keys(context))

    def _merge(self, y, x):
        y = y.transpose(1, 2).flatten(2)
        return self.out(F.rms_norm(y, y.shape[-1:], eps=1e-12) * self.gate(x))


@register(CARD, bias=False)
class LightningAttention(Core):
    """q (batch, heads, n, d), k and v (batch, kv_heads, m, d), after the feature map.

    Args:
        layer, layers: where in the model the layer stands, for its decay: the first layer forgets fastest.
        decay: lambda in [0, 1], one for all heads or one a head, in place of the paper's.
    """

    grouped = True
    layer = LightningLayer

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        layer: int = 0,
        layers: int = 1,
        decay: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__(heads, head_dim)
        expect(0 <= layer < layers, "layer", layer, f"a number from 0 to layers - 1 = {layers - 1}")
        if decay is None:
            self.log_decay = [-8 * h / heads * (1 - layer / layers) for h in range(heads)]
        else:
            given = [float(decay)] * heads if isinstance(decay, int | float) else [float(x) for x in decay]
            expect(
                len(given) == heads and all(0 <= x <= 1 for x in given),
                "decay",
                decay,
                f"a number from 0 to 1, or {heads} of them",
            )
            self.log_decay = [math.log(max(x, 1e-300)) for x in given]

    def extra(self, how):
        return {"decaying": not how.cross}

    def forward(self, q, k, v, *, mask=None, causal=False, decaying=True):
        keep = masks.split(mask)[1]
        return linear.attend(q, k, v, causal=causal, keep=keep, log_decay=self._decay(q, decaying))

    def weights(self, q, k, *, mask=None, causal=False, decaying=True):
        keep = masks.split(mask)[1]
        return linear.weights(q, k, causal=causal, keep=keep, log_decay=self._decay(q, decaying))

    def step(self, q, k, v, state, *, decaying=True, **extra):
        return linear.step(q, k, v, state, log_decay=self._decay(q, decaying))

    def _decay(self, q: Tensor, decaying: bool) -> Tensor | None:
        """Not a buffer: half precision, to which a layer may be cast, would round it."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.tensor(self.log_decay, dtype=wide, device=q.device) if decaying else None
