"""CHELA: linear attention whose queries and keys come from a short and a long convolution of the stream.

"Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long Sequences", 2024, arXiv 2406.08128.

    Z = SiLU(BN(X * k_long) + BN(X * k_short))            a kernel a channel; as one kernel after training   (n, dim)
    S = SiLU(Z W_s),   Q = a_q * S + b_q,   K = a_k * S + b_k,   V = SiLU(X W_v)        (n, z), (n, z), (n, v)
    O = norm((tril(Q K^T)) V)                             in tiles, no softmax; norm(o) = o / rms(o)
    U = SiLU(Z W_u),   P = sigmoid(Z W_p)                 gates, (n, v) and (n, dim)
    Y = P * SiLU(X W_x + (U * O) W_h) + (1 - P) * X

k_long has ``taps`` numbers at each of ``scales`` scales: the piece of scale i (0, 1, ...) covers max(1, 2^(i-1)) * taps
tokens by interpolation, times 2^-i, so that the kernel falls with the distance and reaches taps * 2^(scales-1) tokens.
In evaluation the two branches and their batch norms are one kernel and a bias, k = k_long s_l + k_short s_s, and one
FFT. Causal calls convolve the past, others both sides, with kernels for each. In cross-attention the keys come from the
context's convolution over both sides. The output holds its own gated residual. Cost O(n log n), of attention O(n);
decoding carries the state of the attention and as many tokens as the kernel is long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.attention.base import How, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import linear, masks, recurrent
from crosslight.engines.backend import forced
from crosslight.engines.linear import LinearState
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Kernel = Float[Tensor, "dim length"]

#: Calls a function whose intermediate tensors are made again in the backward pass.
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

CARD = Card(
    id="chela",
    kind="token",
    group="linear",
    title="Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long Sequences",
    year=2024,
    paper="2406.08128",
    summary="Linear attention in Mega's frame, whose queries and keys see short and long convolutions of the stream.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n log n",
    mask="keys",
    decode="state",
    small={"z_dim": 8, "v_dim": 24, "taps": 4, "scales": 3},
    checked="the kernel tap by tap, the convolutions and the masked product written out; one kernel against branches",
    differs="The long kernel's parameters, scale by scale, and the wiring of the gates, which is Mega's, are "
    "reconstructions: no code is public. The noncausal and cross forms are ours. In training, batch norms see the "
    "whole batch and all tokens of it; causality and independence of batches hold in evaluation.",
    evidence=Evidence(
        claim="pixels of digits are classified better than by linear attention without convolutions",
        task="digits",
        metric="accuracy",
        margin=0.02,
        baseline="efficient-attention",
        options={"heads": 1, "z_dim": 32, "v_dim": 32},
    ),
)


def _folded(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """A batch norm of evaluation as a factor and a bias."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


#: Tokens whose outputs are normed and gated at a time.
ROWS = 2048


def _times_normed(gate: Float[Tensor, "batch n v_dim"], o: Heads) -> Float[Tensor, "batch n v_dim"]:
    """SiLU(gate) * norm(o)."""
    return F.silu(gate) * F.rms_norm(o, (o.shape[-1],), eps=1e-6).transpose(1, 2).flatten(2)


class ShortLong(nn.Module):
    """SiLU(BN(x * k_long) + BN(x * k_short)), over the past or over both sides.

    Args:
        dim: channels.
        taps: numbers of the long kernel at each scale.
        scales: scales; the long kernel reaches taps * 2^(scales - 1) tokens.
        short: taps of the short kernel.
    """

    def __init__(self, dim: int, taps: int, scales: int, short: int) -> None:
        super().__init__()
        self.taps, self.scales, self.length = taps, scales, taps * 2 ** (scales - 1)
        # First the kernels of the past, the present token among it, then those of the future.
        self.long = nn.Parameter(torch.randn(2, scales, dim, taps) / taps**0.5)
        self.short = nn.Parameter(torch.randn(2, dim, short) / short**0.5)
        self.norm_long, self.norm_short = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)

    def kernel(self, side: int, n: int) -> Kernel:
        """The first n taps of k_long, or as many as it has."""
        pieces: list[Tensor] = []
        for i in range(self.scales):
            if sum(piece.shape[1] for piece in pieces) >= n:
                break
            piece = self.long[side, i] * 0.5**i
            if i > 1:
                wide = torch.promote_types(piece.dtype, torch.float32)
                scaled = F.interpolate(piece.to(wide).unsqueeze(0), scale_factor=2 ** (i - 1), mode="linear")
                piece = scaled.squeeze(0).to(piece.dtype)
            pieces.append(piece)
        return torch.cat(pieces, 1)[:, :n]

    def merged(self, n: int) -> tuple[Kernel, Kernel, Float[Tensor, " dim"]]:
        """The two branches of evaluation as one kernel of the past, one of the future, and a bias."""
        (scale, bias), (short_scale, short_bias) = _folded(self.norm_long), _folded(self.norm_short)
        sides = []
        for side in (0, 1):
            k, short = self.kernel(side, n), self.short[side, :, :n]
            k = scale.unsqueeze(1) * F.pad(k, (0, max(0, short.shape[1] - k.shape[1])))
            sides.append(k + F.pad(short_scale.unsqueeze(1) * short, (0, k.shape[1] - short.shape[1])))
        return sides[0], sides[1], bias + short_bias

    def forward(self, x: Stream, keep: Bool[Tensor, "batch n"] | None, past_only: bool) -> Stream:
        x = x if keep is None else x.masked_fill(~keep.unsqueeze(-1), 0)
        x, n = x.transpose(1, 2), x.shape[1]
        if not self.training:
            past, future, bias = self.merged(n)
            y = recurrent.fft_conv(x, past, None if past_only else future) + bias.unsqueeze(1)
        else:
            ahead = None if past_only else self.kernel(1, n)
            # The backward pass makes the transform of x again, unless it may run outside a forced reference.
            given = x, self.kernel(0, n), ahead
            y = recurrent.fft_conv(*given) if forced() == "reference" else again(recurrent.fft_conv, *given)
            y = self.norm_long(y)
            y = y + self.norm_short(self._near(x, past_only))
        return F.silu(y).transpose(1, 2)

    def _near(self, x: Float[Tensor, "batch dim n"], past_only: bool) -> Float[Tensor, "batch dim n"]:
        past, future = self.short.unbind(0)
        taps = past.flip(1) if past_only else torch.cat([past.flip(1), future], 1)
        ahead = 0 if past_only else future.shape[1]
        x = F.pad(x, (past.shape[1] - 1, ahead))
        return F.conv1d(x, taps.unsqueeze(1), groups=taps.shape[0])

    def step(
        self, x: Float[Tensor, "batch 1 dim"], recent: Float[Tensor, "batch length dim"] | None
    ) -> tuple[Stream, Float[Tensor, "batch length dim"]]:
        """Z at the next token, and the tokens that the one after will need."""
        seen = x if recent is None else torch.cat([recent, x], 1)
        k, _, bias = self.merged(seen.shape[1])
        seen = seen[:, seen.shape[1] - k.shape[1] :]
        y = F.silu((k.T.flip(0) * seen).sum(1, keepdim=True) + bias)
        return y, seen[:, max(0, seen.shape[1] - self.reach + 1) :]

    @property
    def reach(self) -> int:
        return max(self.length, self.short.shape[2])


@dataclass
class CHELACache:
    """Tokens that the convolution still reads, and the state of the attention, or that of the context."""

    recent: Stream
    state: LinearState | Tensor
    cross: bool


@register(CARD)
class CHELA(Mechanism):
    """x (batch, n, dim), context (batch, m, context_dim).

    Args:
        heads: heads that z and v are split into.
        z_dim, v_dim: widths of queries and keys, and of values (2 * dim unless given).
        taps, scales, short: kernels, as for `ShortLong`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        z_dim: int = 64,
        v_dim: int | None = None,
        taps: int = 16,
        scales: int = 8,
        short: int = 3,
    ) -> None:
        super().__init__(dim, context_dim)
        v_dim = 2 * dim if v_dim is None else v_dim
        expect(isinstance(heads, int) and heads > 0, "heads", heads, "a positive int")
        expect(z_dim % heads == 0, "z_dim", z_dim, f"a multiple of heads = {heads}")
        expect(v_dim % heads == 0, "v_dim", v_dim, f"a multiple of heads = {heads}")
        for name, value in {"taps": taps, "scales": scales, "short": short}.items():
            expect(value > 0, name, value, "a positive int")
        self.heads = heads
        self.conv, self.z = ShortLong(dim, taps, scales, short), nn.Linear(dim, z_dim)
        self.v = nn.Linear(self.context_dim, v_dim)
        # A context of another width needs its own way to keys; one of the same width shares that of x.
        own = self.context_dim != dim
        self.context_conv = ShortLong(self.context_dim, taps, scales, short) if own else None
        self.context_z = nn.Linear(self.context_dim, z_dim) if own else None
        self.a, self.b = nn.Parameter(torch.ones(2, z_dim)), nn.Parameter(torch.zeros(2, z_dim))
        self.gate, self.update = nn.Linear(dim, v_dim), nn.Linear(dim, dim)
        self.candidate, self.out = nn.Linear(dim, dim), nn.Linear(v_dim, dim, bias=False)

    def _split(self, t: Tensor) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _queries(self, z: Stream) -> Heads:
        return self._split(self.a[0] * F.silu(self.z(z)) + self.b[0])

    def _keys(self, z: Stream, own: nn.Linear | None = None) -> Heads:
        return self._split(self.a[1] * F.silu((self.z if own is None else own)(z)) + self.b[1])

    def _values(self, context: Tensor) -> Heads:
        return self._split(F.silu(self.v(context)))

    def _convolved(self, x: Stream, context: Tensor, how: How) -> tuple[Stream, Heads]:
        """Z of x, and the keys."""
        keep = masks.split(how.mask)[1]
        if not how.cross:
            z = self.conv(x, keep, how.causal)
            return z, self._keys(z)
        context_conv = self.conv if self.context_conv is None else self.context_conv
        return self.conv(x, None, how.causal), self._keys(context_conv(context, keep, False), self.context_z)

    def _forward(self, x, context, how):
        z, k = self._convolved(x, context, how)
        keep = masks.split(how.mask)[1]
        o = linear.attend(self._queries(z), k, self._values(context), causal=how.triangular, keep=keep)
        return self._gated(x, z, o)

    def _weights(self, x, context, how):
        z, k = self._convolved(x, context, how)
        return linear.weights(self._queries(z), k, causal=how.triangular, keep=masks.split(how.mask)[1])

    def _read(self, weights, x, context, how):
        return self._gated(x, self._convolved(x, context, how)[0], weights @ self._values(context))

    def _gated(self, x: Stream, z: Stream, o: Heads) -> Stream:
        # Some tokens at a time, made again in the backward pass: what this keeps and passes is wider than all else.
        parts = zip(self.gate(z).split(ROWS, 1), o.split(ROWS, 2), strict=True)
        gated = torch.cat([again(_times_normed, *part) for part in parts], 1)
        candidate = F.silu(self.candidate(x) + self.out(gated))
        return x + self.update(z).sigmoid() * (candidate - x)

    def _step(self, x, cache, context, how):
        z, recent = self.conv.step(x, None if cache is None else cache.recent)
        q = self._queries(z)
        state: Any
        if not how.cross:
            o, state = linear.step(q, self._keys(z), self._values(x), None if cache is None else cache.state)
            return self._gated(x, z, o), CHELACache(recent, state, False)
        if cache is not None:
            state = cache.state
        else:
            keep, k = masks.split(how.mask)[1], self._convolved(x, context, how)[1]
            k = k if keep is None else k.masked_fill(~keep[:, None, :, None], 0)
            state = k.transpose(-1, -2) @ self._values(context)
        return self._gated(x, z, q @ state), CHELACache(recent, state, True)
