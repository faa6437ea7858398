"""FLatten: linear attention with features that are focused by a power, and a convolution that restores the rank.

Han, Pan, Han, Song, Huang, "FLatten Transformer: Vision Transformer using Focused Linear Attention", 2023,
arXiv 2308.00442.

    phi(x) = f_p(ReLU(x)),   f_p(x) = ||x|| / ||x^p|| x^p                     power p channel by channel, 3 in the paper
    O_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) sum_j phi(k_j)^T) + DWC(V)_i          (batch, heads, n, d)

The power keeps a vector's length and pulls it towards its largest channel: products of vectors alike grow, those of
others shrink, which is the focus that softmax has. The matrix has rank at most d; the depthwise convolution of the
values (5 x 5, one for all heads) adds what is near, of full rank. Time O(n d^2).

With ``grid=(H, W)`` the convolution is that of the image; without it tokens are one row. The causal form is
Crosslight's own: prefix sums, and the middle row of the kernel over the token itself and those before it.
Cross-attention has no convolution, as the values stand at other places than the queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core, How, LayerCache
from crosslight.cards import Card, Evidence
from crosslight.engines import linear, masks
from crosslight.engines.dense import repeat_heads
from crosslight.engines.linear import LinearState
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]

CARD = Card(
    id="flatten-transformer",
    kind="token",
    group="linear",
    title="FLatten Transformer: Vision Transformer using Focused Linear Attention",
    year=2023,
    paper="2308.00442",
    code="LeapLabTHU/FLatten-Transformer",
    summary="Linear attention with features sharpened by a power, plus a depthwise convolution of the values.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the explicit n x n matrix, and the convolution written out cell by cell; length and rank of the features",
    differs="The released code focuses before it splits the heads, divides queries and keys by a learned scale, adds "
    "a learned position to keys; the paper has none of these, nor has this. As in that code 1e-6 is added after "
    "the ReLU. The paper is noncausal self-attention only; the causal and cross forms are ours.",
    evidence=Evidence(
        claim="better than softmax attention on images at linear cost",
        task="digits",
        metric="accuracy",
        margin=0.0,
    ),
)

#: Added after the ReLU, so that no feature vector is zero.
EPS = 1e-6


@dataclass
class FLattenState:
    """What decoding carries: the sums, and the values that the next convolutions read."""

    sums: LinearState
    recent: Float[Tensor, "batch kv_heads taps dim"]


class FLattenLayer(AttentionLayer):
    """The layer around `FLatten`, which adds the convolution of the values."""

    def __init__(self, core: FLatten, dim: int, **own: Any) -> None:
        super().__init__(core, dim, **own)
        d, kernel = self.head_dim, core.kernel
        self.kernel = kernel
        self.conv = nn.Conv2d(d, d, kernel, padding=kernel // 2, groups=d) if kernel else None

    def _local(self, v: Heads, how: How) -> Heads | float:
        if self.conv is None or how.cross:
            return 0.0
        keep = masks.split(how.mask)[1]
        v = v if keep is None else v.masked_fill(~keep[:, None, :, None], 0)
        if how.causal:
            return self._trailing(F.pad(v, (0, 0, self.kernel - 1, 0)))
        image = v.transpose(-1, -2).flatten(0, 1).unflatten(-1, how.grid or (1, -1))
        y = self.conv(image).flatten(2).unflatten(0, v.shape[:2]).transpose(-1, -2)
        return repeat_heads(y, self.heads)

    def _trailing(self, v: Heads) -> Heads:
        """The middle row of the kernel, ending at each token, of values that begin kernel - 1 tokens earlier."""
        assert self.conv is not None
        row = self.conv.weight[:, :, self.kernel // 2]
        y = F.conv1d(v.transpose(-1, -2).flatten(0, 1), row, self.conv.bias, groups=self.head_dim)
        return repeat_heads(y.unflatten(0, v.shape[:2]).transpose(-1, -2), self.heads)

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        y = self.core(q, k, v, mask=how.mask, causal=how.triangular)
        return self._merge(y + self._local(v, how), x)

    def _read(self, weights, x, context, how):
        v = self._values(context)
        return self._merge(self.core.read(weights, v) + self._local(v, how), x)

    def _step(self, x, cache, context, how):
        if how.cross or self.conv is None:
            return super()._step(x, cache, context, how)
        length, state = (0, None) if cache is None else (cache.length, cache.state)
        q, k, v = self._heads(x, x, how, offset=length)
        y, sums = self.core.step(q, k, v, None if state is None else state.sums)
        before = torch.zeros_like(v).expand(-1, -1, self.kernel - 1, -1) if state is None else state.recent
        seen = torch.cat([before, v], 2)
        y = y + self._trailing(seen)
        return self._merge(y, x), LayerCache(length + 1, FLattenState(sums, seen[:, :, 1:]))


@register(CARD)
class FLatten(Core):
    """q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        power: p, at least 1; 1 is linear attention with ReLU.
        kernel: side of the layer's convolution, an odd number; 0 for none.
    """

    grouped = True
    layer = FLattenLayer

    def __init__(self, heads: int, head_dim: int, *, power: float = 3, kernel: int = 5) -> None:
        super().__init__(heads, head_dim)
        expect(power >= 1, "power", power, "a number >= 1")
        expect(kernel == 0 or (kernel > 0 and kernel % 2 == 1), "kernel", kernel, "an odd number, or 0")
        self.power, self.kernel = power, kernel

    def forward(self, q, k, v, *, mask=None, causal=False):
        keep = masks.split(mask)[1]
        return linear.attend(self.focus(q), self.focus(k), v, causal=causal, keep=keep, normalise=True)

    def weights(self, q, k, *, mask=None, causal=False):
        keep = masks.split(mask)[1]
        return linear.weights(self.focus(q), self.focus(k), causal=causal, keep=keep, normalise=True)

    def step(self, q, k, v, state, **extra):
        return linear.step(self.focus(q), self.focus(k), v, state, normalise=True)

    def focus(self, x: Heads) -> Heads:
        """phi: the power is taken of a vector of length one, whose small channels may vanish but not overflow."""
        x = x.relu() + EPS
        length = x.norm(dim=-1, keepdim=True)
        return F.normalize((x / length) ** self.power, dim=-1) * length
