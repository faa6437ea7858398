"""Mega: gated attention whose queries and keys come from a moving average of the stream.

Ma, Zhou, Kong, He, Gui, Neubig, May, Zettlemoyer, "Mega: Moving Average Equipped Gated Attention", 2022,
arXiv 2209.10655.

    X' = EMA(X)                                          a damped average of each channel over h states
    Z  = SiLU(X' W_z + b_z)                              (n, z)
    Q  = kappa_q * Z + mu_q,   K = kappa_k * Z + mu_k,   V = SiLU(X W_v + b_v)        (n, z), (n, z), (n, v)
    O  = f(Q K^T / tau + b_rel) V                        f softmax, tau = sqrt(z); or laplace, tau = keys to read
    G  = SiLU(X' W_g + b_g),   P = sigmoid(X' W_p + b_p)                              reset (n, v), update (n, dim)
    Y  = P * SiLU(X' W_h + (G * O) U_h + b_h) + (1 - P) * X

    laplace(x) = (1 + erf((x - mu) / (sigma sqrt(2)))) / 2,   mu = sqrt(1/2),   sigma = sqrt(1/(4 pi))

Mega-chunk (``chunk_size=c``) attends inside chunks of c tokens only; the average carries what is before them, and the
cost is linear. Causal calls average over the past; others over both sides, with coefficients for each. In
cross-attention the keys are made of the context's average over both sides, as the queries are of that of x, and all of
the context is read, chunks or not. The output holds its own gated residual. One head, as in the paper, unless ``heads``
splits z and v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, positions, recurrent
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Bias, Rotation
from crosslight.engines.recurrent import DampedEMA
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Weights = Float[Tensor, "batch heads n m"]
    Keep = Bool[Tensor, "#batch #heads n m"]

CARD = Card(
    id="mega",
    kind="token",
    group="recurrent",
    title="Mega: Moving Average Equipped Gated Attention",
    year=2022,
    paper="2209.10655",
    code="facebookresearch/mega",
    summary="Queries and keys from a learned moving average, reset and update gates around one head; full or chunked.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"z_dim": 8, "v_dim": 24, "ema_dim": 4},
    checked="the recurrence and the gates written out token by token; one chunk equal to the full form",
    differs="The released EMA ends in SiLU(EMA(X) + omega * X), which the paper does not have: `ema_skip`. The "
    "released decoder reads its encoder through plain gated attention without EMA; here both streams have one. Of two "
    "directions the present token counts once, as in the last release; earlier ones, and transformers, counted it in "
    "both.",
    evidence=Evidence(
        claim="a better language model than softmax attention",
        task="language",
        metric="bits_per_byte",
        margin=0.05,
        options={"heads": 1},
    ),
)


def laplace(scores: Weights, keep: Keep | None) -> Weights:
    """The element-wise function that approximates squared relu, as a normaliser of the dense engine."""
    weight = (1 + torch.erf((scores - math.sqrt(0.5)) * math.sqrt(2 * math.pi))) / 2
    return weight if keep is None else weight.masked_fill(~keep, 0)


class MovingAverage(nn.Module):
    """EMA of each channel, over the past or over both sides.

    Args:
        dim: channels.
        modes: states a channel.
        skip: SiLU(EMA(X) + omega * X) instead of EMA(X).
    """

    def __init__(self, dim: int, modes: int, skip: bool = False) -> None:
        super().__init__()
        # First the coefficients of the past, then those of the future.
        self.alpha = nn.Parameter(0.2 * torch.randn(2, dim, modes))
        self.delta = nn.Parameter(0.2 * torch.randn(2, dim, modes))
        sign = (-1.0) ** torch.arange(modes)  # states that start as differences of each other
        self.beta = nn.Parameter(sign + 0.02 * torch.randn(2, dim, modes))
        self.eta = nn.Parameter(torch.randn(2, dim, modes) / math.sqrt(modes))
        self.omega = nn.Parameter(torch.randn(dim)) if skip else None

    def side(self, i: int) -> DampedEMA:
        return DampedEMA(self.alpha[i].sigmoid(), self.delta[i].sigmoid(), self.beta[i], self.eta[i])

    def forward(self, x: Stream, keep: Bool[Tensor, "batch n"] | None, past_only: bool) -> Stream:
        source = x if keep is None else x.masked_fill(~keep.unsqueeze(-1), 0)
        return self._end(x, recurrent.ema(source, self.side(0), None if past_only else self.side(1)))

    def step(self, x: Stream, state: Tensor | None) -> tuple[Stream, Tensor]:
        y, state = self.side(0).step(x.squeeze(1), state)
        return self._end(x, y.unsqueeze(1)), state

    def _end(self, x: Stream, y: Stream) -> Stream:
        return y if self.omega is None else F.silu(y + self.omega * x)


@dataclass
class MegaCache:
    """State of the average, and keys and values of the chunk (or of all tokens, or of the context)."""

    length: int
    ema: Tensor
    kv: KVCache
    mask: Mask | None
    cross: bool


@register(CARD)
class Mega(Mechanism):
    """x (batch, n, dim), context (batch, m, context_dim).

    Args:
        heads: heads that z and v are split into.
        ema_dim: states of the average a channel.
        z_dim, v_dim: widths of queries and keys, and of values (2 * dim unless given).
        activation: "softmax" or "laplace".
        chunk_size: tokens a chunk of Mega-chunk; full attention if None.
        position: relative bias b_rel or a rotation, as for `AttentionLayer`.
        ema_skip: the average as released, SiLU(EMA(X) + omega * X).
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        ema_dim: int = 16,
        z_dim: int = 64,
        v_dim: int | None = None,
        activation: str = "softmax",
        chunk_size: int | None = None,
        position: str | nn.Module | None = "relative",
        ema_skip: bool = False,
    ) -> None:
        super().__init__(dim, context_dim)
        v_dim = 2 * dim if v_dim is None else v_dim
        expect(isinstance(heads, int) and heads > 0, "heads", heads, "a positive int")
        expect(z_dim % heads == 0, "z_dim", z_dim, f"a multiple of heads = {heads}")
        expect(v_dim % heads == 0, "v_dim", v_dim, f"a multiple of heads = {heads}")
        expect(activation in ("softmax", "laplace"), "activation", repr(activation), "'softmax' or 'laplace'")
        expect(chunk_size is None or chunk_size > 0, "chunk_size", chunk_size, "a positive int or None")
        self.heads, self.chunk_size, self.activation = heads, chunk_size, activation
        self.normaliser = dense.softmax if activation == "softmax" else laplace
        self.scale = math.sqrt(heads / z_dim) if activation == "softmax" else 1.0
        self.ema, self.z = MovingAverage(dim, ema_dim, ema_skip), nn.Linear(dim, z_dim)
        self.v = nn.Linear(self.context_dim, v_dim)
        # A context of another width needs its own way to keys; one of the same width shares that of x.
        own = self.context_dim != dim
        self.context_ema = MovingAverage(self.context_dim, ema_dim, ema_skip) if own else None
        self.context_z = nn.Linear(self.context_dim, z_dim) if own else None
        self.kappa = nn.Parameter(torch.ones(2, z_dim))
        self.mu = nn.Parameter(torch.zeros(2, z_dim))
        self.gate = nn.Linear(dim, v_dim)
        self.update = nn.Linear(dim, dim)
        self.candidate = nn.Linear(dim, dim)
        self.out = nn.Linear(v_dim, dim, bias=False)
        self.position = positions.make(position, heads=heads, head_dim=z_dim // heads)

    def _split(self, t: Tensor) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _queries(self, smooth: Stream, offset: int = 0) -> Heads:
        return self._turn(self._split(self.kappa[0] * F.silu(self.z(smooth)) + self.mu[0]), offset)

    def _keys(self, smooth: Stream, offset: int = 0, own: nn.Linear | None = None) -> Heads:
        z = F.silu((self.z if own is None else own)(smooth))
        return self._turn(self._split(self.kappa[1] * z + self.mu[1]), offset)

    def _values(self, context: Tensor) -> Heads:
        return self._split(F.silu(self.v(context)))

    def _turn(self, t: Heads, offset: int) -> Heads:
        return self.position.rotate(t, offset=offset) if isinstance(self.position, Rotation) else t

    def _smooth(self, x: Stream, context: Tensor, how: How) -> tuple[Stream, Heads]:
        """The average of x, and the keys."""
        keep = masks.split(how.mask)[1]
        if not how.cross:
            smooth = self.ema(x, keep, how.causal)
            return smooth, self._keys(smooth)
        average = self.context_ema or self.ema
        return self.ema(x, None, how.causal), self._keys(average(context, keep, False), own=self.context_z)

    def _plan(self, offset: int = 0) -> dict[str, Any]:
        bias = self.position if isinstance(self.position, Bias) else None
        return {"scale": self.scale, "bias": bias, "normaliser": self.normaliser, "offset": offset}

    def _scaled(self, q: Heads, m: int, mask: Mask | None, causal: bool) -> Heads:
        """Under laplace tau is the number of keys that a query may read."""
        if self.activation == "softmax":
            return q
        keep = masks.split(mask)[1]
        seen = q.new_ones(1, m) if keep is None else keep.to(q.dtype)
        count = seen.cumsum(1) if causal else seen.sum(1, keepdim=True)
        return q / count.clamp(min=1)[:, None, :, None]

    def _chunks(self, how: How) -> bool:
        return self.chunk_size is not None and not how.cross

    def _cut(self, t: Tensor) -> Tensor:
        """(batch, heads, n, ...) -> (batch * chunks, heads, chunk_size, ...), zeros behind the end."""
        size = self.chunk_size or 1
        t = F.pad(t, (0, 0, 0, -t.shape[2] % size)).unflatten(2, (-1, size))
        return t.transpose(1, 2).flatten(0, 1)

    def _chunk_mask(self, x: Stream, how: How) -> Mask:
        keep = masks.split(how.mask)[1]
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if keep is None else keep
        return masks.keys(self._cut(keep[:, None, :, None]).flatten(1))

    def _forward(self, x, context, how):
        smooth, k = self._smooth(x, context, how)
        q, v, mask = self._queries(smooth), self._values(context), how.mask
        if self._chunks(how):
            q, k, v, mask = self._cut(q), self._cut(k), self._cut(v), self._chunk_mask(x, how)
        q = self._scaled(q, k.shape[2], mask, how.triangular)
        y = dense.attend(q, k, v, mask=mask, causal=how.triangular, **self._plan())
        if self._chunks(how):
            y = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(2, 3)[:, :, : x.shape[1]]
        return self._gated(x, smooth, y)

    def _weights(self, x, context, how):
        smooth, k = self._smooth(x, context, how)
        q = self._queries(smooth)
        if not self._chunks(how):
            q = self._scaled(q, k.shape[2], how.mask, how.triangular)
            return dense.weights(q, k, mask=how.mask, causal=how.triangular, **self._plan())
        q, k, mask = self._cut(q), self._cut(k), self._chunk_mask(x, how)
        q = self._scaled(q, k.shape[2], mask, how.triangular)
        blocks = dense.weights(q, k, mask=mask, causal=how.triangular, **self._plan())
        blocks = blocks.unflatten(0, (x.shape[0], -1)).transpose(1, 2)  # (batch, heads, chunks, size, size)
        here = torch.eye(blocks.shape[2], dtype=blocks.dtype, device=x.device)[:, None, :, None]
        n = x.shape[1]
        return (blocks.unsqueeze(4) * here).flatten(4).flatten(2, 3)[:, :, :n, :n]

    def _read(self, weights, x, context, how):
        return self._gated(x, self._smooth(x, context, how)[0], weights @ self._values(context))

    def _gated(self, x: Stream, smooth: Stream, y: Heads) -> Stream:
        read = F.silu(self.gate(smooth)) * y.transpose(1, 2).flatten(2)
        candidate = F.silu(self.candidate(smooth) + self.out(read))
        return x + self.update(smooth).sigmoid() * (candidate - x)

    def _step(self, x, cache, context, how):
        length = 0 if cache is None else cache.length
        smooth, state = self.ema.step(x, None if cache is None else cache.ema)
        q = self._queries(smooth, length)
        if how.cross:
            if cache is None:
                kv, mask = KVCache.start(self._smooth(x, context, how)[1], self._values(context)), how.mask
            else:
                kv, mask = cache.kv, cache.mask
            place = length
        else:
            k, v, mask = self._keys(smooth, length), self._values(x), None
            # A full chunk is forgotten; the average remembers it.
            place = length if self.chunk_size is None else length % self.chunk_size
            kv = KVCache.start(k, v) if cache is None or place == 0 else cache.kv.append(k, v)
        q = self._scaled(q, kv.length, mask, False)
        y = dense.attend(q, kv.keys, kv.values, mask=mask, **self._plan(place))
        return self._gated(x, smooth, y), MegaCache(length + 1, state, kv, mask, how.cross)
