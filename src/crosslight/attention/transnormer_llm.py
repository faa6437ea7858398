"""TransNormerLLM: gated linear attention with a decay a head and layer, and rotating products in the first layer.

Qin, Li, Sun, Sun, Shen, Han, Wei, Lv, Yuan, Luo, Qiao, Zhong, "Scaling TransNormer to 175 Billion Parameters", 2023,
arXiv 2307.14995.

    Q = SiLU(X W_q),  K = SiLU(X W_k),  V = X W_v,  U = X W_u                      (n, d) of each head h
    o_t = sum_{s <= t} lambda_h^(t-s) a_ts v_s                                      no softmax, no denominator
    a_ts = q_t . k_s                                in all layers but the first
    a_ts = sum_c q_tc k_sc cos(theta_hc (t - s))    in the first: LRPE, theta learned
    Y = W_o [SRMSNorm([o_1 ; ... ; o_H]) * U]
    lambda_h = exp(-(8 h / H) (1 - l / L)), and 1 in the last layer                 head h of H, layer l of L, from 0

The operator is that of lightning attention, from which this layer takes blocks, state and gate. LRPE doubles the width
of queries and keys, [q cos(theta t) ; q sin(theta t)], so the state of the first layer is (2 d, d) a head, of every
other one (d, d). The state is kept decayed and nothing is ever divided by lambda^t, which would overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from crosslight.attention.lightning_attention import LightningAttention, LightningLayer
from crosslight.cards import Card, Evidence
from crosslight.engines.dense import repeat_heads
from crosslight.engines.positions import Rotation
from crosslight.registry import register

CARD = Card(
    id="transnormer-llm",
    kind="token",
    group="linear",
    title="Scaling TransNormer to 175 Billion Parameters",
    year=2023,
    paper="2307.14995",
    code="OpenNLPLab/TransnormerLLM",
    summary="Gated linear attention with a fixed decay a head and layer, and learned rotating products in layer one.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the masked quadratic form with cosines, and the token recurrence, in float64; lightning-attention with "
    "the same weights in later layers",
    differs="The released model spaces its decays as ALiBi does, with (1 - l / (L - 1)) in place of (1 - l / L): give "
    "them as `decay`. A model of one layer keeps its decays, though its layer is the last. The gated linear unit is "
    "left to the block around. The paper is causal only; the noncausal and cross forms are ours, as in "
    "lightning-attention.",
    evidence=Evidence(
        claim="language modelling better than softmax attention of equal size",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
    ),
)


class LRPE(Rotation):
    """Products of channels turn with the distance: sum_c q_c k_c cos(theta_c (t - s)), by features of twice the width.

    theta starts at 10000^(-2 c / width) over the channels of all heads, and is learned.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        theta = 10_000.0 ** (-2 * torch.arange(width) / width)
        self.theta = nn.Parameter(theta.view(heads, 1, head_dim))

    def rotate(self, x, *, offset=0, grid=None):
        # In at least float32: angles of far positions do not survive half precision.
        wide = torch.promote_types(x.dtype, torch.float32)
        at = torch.arange(offset, offset + x.shape[2], device=x.device, dtype=wide)[:, None]
        angles = at * self.theta.to(wide)
        x = repeat_heads(x, self.theta.shape[0])
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], -1)


class TransNormerLLMLayer(LightningLayer):
    """The layer around `TransNormerLLM`: LRPE in the first one of a model, unless another position is given."""

    def __init__(self, core: TransNormerLLM, dim: int, *, position: str | nn.Module | None = None, **own: Any) -> None:
        if position is None and core.first:
            position = LRPE(core.heads, core.head_dim)
        super().__init__(core, dim, position=position, **own)


@register(CARD, bias=False)
class TransNormerLLM(LightningAttention):
    """`LightningAttention` with the decays and positions of this paper.

    Args:
        layer, layers: where in the model the layer stands: the first rotates, the last does not decay.
        decay: lambda in [0, 1], one for all heads or one a head, in place of the paper's.
    """

    grouped = False  # LRPE tells apart the heads of a group, keys among them
    layer = TransNormerLLMLayer  # type: ignore[assignment]

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        layer: int = 0,
        layers: int = 1,
        decay: float | Sequence[float] | None = None,
    ) -> None:
        if decay is None and 1 < layers == layer + 1:
            decay = 1.0
        super().__init__(heads, head_dim, layer=layer, layers=layers, decay=decay)
        self.first = layer == 0
