"""Enhanced multi-head attention: every query head meets every key head, and convolutions bring the maps to agree.

Zheng, Li, Bao, Xiao and Zhu, "EIT: Enhanced Interactive Transformer", 2022, arXiv 2212.10197.

    S_ij = Q_i K_j^T / sqrt(d)    for all heads i, j: M^2 maps as the channels of an image   (batch, M^2, n, m)
    inner-subspace interaction    S'_i  = conv(relu(conv(S_i1 .. S_iM)))      M^2 -> H_isi -> M, one group a query head
    cross-subspace interaction    S''   = conv(relu(conv(S'_1 .. S'_M)))      M -> H_csi -> M, over all heads
    A_i = softmax(S''_i)          over the keys that may be read                             (batch, M, n, m)
    y = W_o [A_1 V_1 ; ... ; A_M V_M]                                                        (batch, n, dim)

    efficient (E-EIT): S'' = conv(relu(conv(S)))    M^2 -> H -> M, the first in groups, the second over all heads

Kernels are 1 wide: each pair of query and key is mixed by itself, so that causal use and decoding hold. The first
convolution is linear in S, and sum_j W_cj Q_i K_j^T is Q_i (sum_j W_cj K_j)^T: it mixes the keys, and the M^2 maps are
never made. The maps after it are made for a chunk of queries at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

CARD = Card(
    id="eit-emha",
    kind="token",
    group="heads",
    title="EIT: Enhanced Interactive Transformer",
    year=2022,
    paper="2212.10197",
    code="zhengkid/EIT-Enhanced-Interactive-Transformer",
    summary="Scores of all pairs of query heads and key heads, mixed to one map a head by 1-wide convolutions.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the M^2 maps and the four convolutions written out; multi-head attention where the mixing selects j = i",
    differs="A reconstruction: the authors' repository holds no code, and the text that could be read names neither "
    "kernel sizes nor widths. Kernels are 1 wide. Widths (H_isi = 8 M, H_csi = 4 M, efficient 2 M) are those of an "
    "unofficial implementation, which besides leaves the softmax out, scales by sqrt(dim) and keeps the cross-subspace "
    "convolutions in groups, so that heads never meet; here they do. That the efficient form has a ReLU, and "
    "groups in its first convolution only, is inferred. The last convolution has no bias: softmax cancels it.",
    evidence=Evidence(
        claim="a byte language model in which heads interact is better than one of multi-head attention",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
        budget={"steps": 200},
    ),
)


@register(CARD)
class EnhancedMultiHead(Core):
    """q (batch, M, n, d), k and v (batch, M, m, d).

    Args:
        inner: hidden maps a query head in the inner-subspace interaction, H_isi / M; 8, efficient 2, unless given.
        cross: hidden maps a head in the cross-subspace interaction, H_csi / M.
        efficient: E-EIT, two convolutions in place of four.
    """

    def __init__(
        self, heads: int, head_dim: int, inner: int | None = None, cross: int = 4, efficient: bool = False
    ) -> None:
        super().__init__(heads, head_dim)
        inner = (2 if efficient else 8) if inner is None else inner
        expect(inner >= 1, "inner", inner, "a number >= 1")
        expect(cross >= 1, "cross", cross, "a number >= 1")
        hidden = heads * inner
        # The weight of the first convolution, (query head, hidden map, key head), and its bias.
        self.mix = nn.Parameter(torch.empty(heads, inner, heads).uniform_(-1, 1) / math.sqrt(heads))
        self.shift = nn.Parameter(torch.empty(hidden).uniform_(-1, 1) / math.sqrt(heads))
        if efficient:
            rest: list[nn.Module] = [nn.Conv2d(hidden, heads, 1, bias=False)]
        else:
            rest = [
                nn.Conv2d(hidden, heads, 1, groups=heads),
                nn.Conv2d(heads, heads * cross, 1),
                nn.ReLU(),
                nn.Conv2d(heads * cross, heads, 1, bias=False),
            ]
        self.rest = nn.Sequential(nn.ReLU(), *rest)

    def _keys(self, k: Tensor) -> Float[Tensor, "batch heads maps_m dim"]:
        """The keys as the first convolution mixes them, those of a query head's hidden maps one after the other."""
        return torch.einsum("icj,bjmd->bicmd", self.mix / math.sqrt(self.head_dim), k).flatten(2, 3)

    def _maps(self, q: Tensor, keys: Tensor, m: int) -> Float[Tensor, "batch heads n m"]:
        """S'' of these queries."""
        maps = (q @ keys.transpose(-1, -2)).unflatten(3, (-1, m)).transpose(2, 3).flatten(1, 2)
        return self.rest(maps + self.shift.view(-1, 1, 1))

    def forward(self, q, k, v, *, mask=None, causal=False):
        keys, m = self._keys(k), k.shape[2]

        def part(start: int, stop: int) -> Tensor:
            some = q[:, :, start:stop]
            return dense.softmax(self._maps(some, keys, m), dense.visible(some, k, mask, causal, start)) @ v

        return dense.by_rows(part, q.shape[2], q.shape[0] * keys.shape[1] * keys.shape[2])

    def weights(self, q, k, *, mask=None, causal=False):
        maps = self._maps(q, self._keys(k), k.shape[2])
        return dense.softmax(maps, dense.visible(q, k, mask, causal))
