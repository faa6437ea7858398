"""RCMHA: queries, keys and values pass a short causal convolution, and scores know the distance between tokens.

"RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling", 2023, arXiv 2308.03429.

    q, k, v = conv(x W_q), conv(x W_k), conv(x W_v + b)                      (batch, heads, n, d)
    s_ij = ((q_i + u)^T k_j + q_i^T R_{j-i} + c_{j-i}) / sqrt(d)             (batch, heads, n, m)
    y_i = W_o [sum_j softmax_j(s_ij) v_j]_heads + b_o

conv runs along the sequence, for each of the d channels alone and the same in all heads: taps t-2, t-1, t (Primer's
depthwise convolution). The relative part is that of Transformer-XL with learned tables in place of sinusoids: u a
vector a head, R a vector and c a number for each distance and head, all 0 at first. The products q_i^T R_{j-i} are
taken for all distances at once and shifted into place, so that no tensor of n x m x d exists.

`Distances` (c) is a bias for any row as ``position=``; `CausalConvolution` is the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, How, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Bias
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Heads = Float[Tensor, "batch heads n head_dim"]
    Scores = Float[Tensor, "batch heads n m"]

CARD = Card(
    id="rcmha",
    kind="token",
    group="positions-masks",
    title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
    year=2023,
    paper="2308.03429",
    code="hermansh-id/rcmha",
    summary="Depthwise causal convolutions after the three projections, and learned relative vectors and numbers in "
    "the scores.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"reach": 32},
    checked="the scores written out pair by pair with the convolution tap by tap; causal scaled_dot_product_attention "
    "at tables of 0 and an identity tap",
    differs="The paper is causal self-attention. In the other patterns the convolution still looks back only, and a "
    "context has positions of its own from 0 on. Distances beyond the table take its last entry. Padding is 0 for the "
    "convolution. The squared-ReLU feed-forward of the paper's model is beside the layer.",
    evidence=Evidence(
        claim="as a byte language model it is ahead of multi-head attention with absolute positions",
        task="language",
        metric="bits_per_byte",
        margin=0.05,
        options={"reach": 64},
    ),
)


class Distances(Bias):
    """A learned number a head for each distance j - i in [-reach, reach), 0 at first; those beyond take the last."""

    def __init__(self, heads: int, reach: int = 4096) -> None:
        super().__init__()
        expect(isinstance(reach, int) and reach >= 1, "reach", reach, "a number >= 1")
        self.reach = reach
        self.table = nn.Parameter(torch.zeros(heads, 2 * reach))

    def place(self, distance: Int[Tensor, "*d"]) -> Int[Tensor, "*d"]:
        """Where the table holds a distance."""
        return (distance + self.reach).clamp(0, 2 * self.reach - 1)

    def bias(self, i, j):
        return self.table[:, self.place(j - i)]


class CausalConvolution(nn.Module):
    """y_t = b + sum_s w_s * x_{t - kernel + 1 + s}, each channel by itself, for all heads alike."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.kernel, self.conv = kernel, nn.Conv1d(dim, dim, kernel, groups=dim)

    def forward(self, x: Heads, before: Heads | None = None) -> Heads:
        """``before`` are the kernel - 1 tokens before x, zeros unless given."""
        x = F.pad(x, (0, 0, self.kernel - 1, 0)) if before is None else torch.cat([before, x], 2)
        return self.conv(x.flatten(0, 1).transpose(1, 2)).transpose(1, 2).unflatten(0, x.shape[:2])


@dataclass
class ConvolvedCache:
    """How many tokens were decoded, keys and values after the convolution, the last projections before it (of q, k
    and v; of q alone in cross-attention), and the padding of the context."""

    length: int
    state: KVCache
    before: tuple[Heads, ...]
    mask: Mask | None
    cross: bool


@register(CARD)
class RelativeConvolutionalAttention(AttentionLayer):
    """softmax attention of convolved heads with relative scores.

    Args:
        dim, heads, head_dim, context_dim: as in `AttentionLayer`.
        kernel: taps of the convolution.
        reach: P, the distances with entries of their own to each side.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        kernel: int = 3,
        reach: int = 4096,
    ) -> None:
        expect(isinstance(kernel, int) and kernel >= 1, "kernel", kernel, "a number >= 1")
        super().__init__(Softmax(heads, head_width(dim, heads, head_dim)), dim, context_dim=context_dim)
        width = heads * self.head_dim
        self.q, self.k = nn.Linear(dim, width, bias=False), nn.Linear(self.context_dim, width, bias=False)
        self.conv_q, self.conv_k, self.conv_v = (CausalConvolution(self.head_dim, kernel) for _ in range(3))
        self.query_bias = nn.Parameter(torch.zeros(heads, 1, self.head_dim))
        self.distances = Distances(heads, reach)
        self.keys_at = nn.Parameter(torch.zeros(heads, 2 * reach, self.head_dim))

    def _projected(self, x: Tensor, context: Tensor, how: How) -> tuple[Heads, Heads, Heads]:
        """q, k, v before the convolution; padding is 0, as no other token may learn of it."""
        q, k, v = super()._queries(x), super()._keys(context), super()._values(context)
        keep = masks.split(how.mask)[1]
        if keep is not None:
            hidden = ~keep[:, None, :, None]
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
            q = q if how.cross else q.masked_fill(hidden, 0)
        return q, k, v

    def _heads(self, x, context, how, offset=0):
        q, k, v = self._projected(x, context, how)
        return self.conv_q(q), self.conv_k(k), self.conv_v(v)

    def relative(self, q: Heads, m: int, offset: int = 0) -> Scores:
        """(q_i^T R_{j-i} + c_{j-i}) / sqrt(d) for queries from ``offset`` on and the first ``m`` keys."""
        n = q.shape[2]
        # All distances from that of the last query to the first key, to that of the first query to the last key.
        place = self.distances.place(torch.arange(1 - n - offset, m - offset, device=q.device))
        scale = self.head_dim**-0.5
        s = (q * scale) @ self.keys_at[:, place].transpose(-1, -2) + self.distances.table[:, place].unsqueeze(1) * scale
        # Row i is to start n - 1 - i later: in rows that are longer by one, each starts one earlier than the last.
        flat = F.pad(s, (0, 1)).flatten(2)[..., n - 1 : n - 1 + n * (n + m - 1)]
        return flat.unflatten(2, (n, n + m - 1))[..., :m]

    def _attend(self, q: Heads, k: Heads, v: Heads, mask: Mask | None, causal: bool, offset: int = 0) -> Heads:
        def part(start: int, stop: int) -> Tensor:
            m = min(k.shape[2], offset + stop) if causal else k.shape[2]
            rows, at = q[:, :, start:stop], offset + start
            bias, asking = self.relative(rows, m, at), rows + self.query_bias
            return dense.attend(asking, k[:, :, :m], v[:, :, :m], mask=mask, causal=causal, bias=bias, offset=at)

        return dense.by_rows(part, q.shape[2], q.shape[0] * self.heads * k.shape[2])

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        return self._merge(self._attend(q, k, v, how.mask, how.triangular), x)

    def _weights(self, x, context, how):
        q, k, _ = self._heads(x, context, how)
        bias = self.relative(q, k.shape[2])
        return dense.weights(q + self.query_bias, k, mask=how.mask, causal=how.triangular, bias=bias)

    def _read(self, weights, x, context, how):
        return self._merge(weights @ self._heads(x, context, how)[2], x)

    def _step(self, x: Tensor, cache: ConvolvedCache | None, context: Tensor | None, how: How):
        taps, mask, length = self.conv_q.kernel - 1, how.mask if how.cross else None, 0
        before: tuple[Tensor | None, ...] = (None, None, None)
        if cache is not None:
            before, mask, length = cache.before, cache.mask, cache.length
        raw: tuple[Tensor, ...]
        if not how.cross:
            raw = self._projected(x, x, how)
            q, k, v = (conv(t, last) for conv, t, last in zip(self._convolutions(), raw, before, strict=True))
            state = KVCache.start(k, v) if cache is None else cache.state.append(k, v)
        else:
            raw = (super()._queries(x),)
            q = self.conv_q(raw[0], before[0])
            if cache is None:
                _, k, v = self._heads(x, context, how)
                state = KVCache.start(k, v)
            else:
                state = cache.state
        y = self._attend(q, state.keys, state.values, mask, not how.cross, length)
        kept = tuple(_last(t, last, taps) for t, last in zip(raw, before, strict=False))
        return self._merge(y, x), ConvolvedCache(length + x.shape[1], state, kept, mask, how.cross)

    def _convolutions(self) -> tuple[CausalConvolution, ...]:
        return self.conv_q, self.conv_k, self.conv_v


def _last(t: Heads, before: Heads | None, taps: int) -> Heads:
    """The last ``taps`` tokens, zeros before the first."""
    joined = F.pad(t, (0, 0, taps, 0)) if before is None else torch.cat([before, t], 2)
    return joined[:, :, joined.shape[2] - taps :]
