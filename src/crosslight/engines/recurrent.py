"""Recurrences and long convolutions: a first-order scan, selective state spaces, convolution by FFT over a sequence or
a map, and the damped moving average of Mega.

A linear recurrence with constant coefficients is a convolution, so the same operator has two fast forms: `fft_conv`
where the whole sequence is known, and a step with an explicit state where tokens arrive one by one. Coefficients that
depend on the token leave the scan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crosslight.engines.backend import forced
from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Float

    Modes = Float[Tensor, "channels modes"]


def scan(a: Tensor, b: Tensor, *, dim: int = 1, initial: Tensor | None = None) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along ``dim``, from h_{-1} = ``initial`` or zero.

    Every element is combined with its neighbour and the half as long sequence is scanned in turn: O(n) work in
    O(log n) operations, without a division, so that any ``a`` is safe: zero, negative or complex.

    Args:
        a: as many dimensions as ``b``, of its length along ``dim``; the other sizes may be 1.
        b: (..., n, ...), real or complex as ``a``.
        initial: as one element of ``b`` along ``dim``, without that dimension.
    """
    dim %= b.dim()
    expect(
        a.dim() == b.dim() and a.shape[dim] == b.shape[dim],
        "scan(a)",
        tuple(a.shape),
        f"{b.dim()} dimensions and length {b.shape[dim]} along dim {dim}",
    )
    dtype = b.dtype
    if dtype in (torch.float16, torch.bfloat16):  # sums over a long sequence do not survive half precision
        a, b = a.float(), b.float()
    if initial is not None:
        first = b.narrow(dim, 0, 1) + a.narrow(dim, 0, 1) * initial.to(b.dtype).unsqueeze(dim)
        b = torch.cat([first, b.narrow(dim, 1, b.shape[dim] - 1)], dim)
    h = _loop(a, b, dim) if forced() == "reference" else _Scan.apply(a, b, dim)
    return h.to(dtype)


def _loop(a: Tensor, b: Tensor, dim: int) -> Tensor:
    h = [b.select(dim, 0)]
    for t in range(1, b.shape[dim]):
        h.append(a.select(dim, t) * h[-1] + b.select(dim, t))
    return torch.stack(h, dim)


class _Scan(torch.autograd.Function):
    """The backward pass is a scan too, from the end: it keeps h and nothing of the tree."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dim: int) -> Tensor:
        h = _pairs(a, b, dim)
        ctx.dim = dim
        ctx.save_for_backward(a, h if ctx.needs_input_grad[0] else None)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        a, h = ctx.saved_tensors
        dim, n = ctx.dim, grad.shape[ctx.dim]
        later = torch.cat([a.narrow(dim, 1, n - 1), torch.zeros_like(a.narrow(dim, 0, 1))], dim).conj()
        g = _Scan.apply(later.flip(dim), grad.flip(dim), dim).flip(dim)
        if h is None:
            return None, g, None
        before = torch.cat([torch.zeros_like(h.narrow(dim, 0, 1)), h.narrow(dim, 0, n - 1)], dim).conj()
        return (g * before).sum_to_size(a.shape), g, None


def _pairs(a: Tensor, b: Tensor, dim: int) -> Tensor:
    n = b.shape[dim]
    if n == 1:
        return b.clone()
    at = (slice(None),) * dim
    even, odd = (*at, slice(0, None, 2)), (*at, slice(1, None, 2))
    left, after = (*at, slice(0, n // 2)), (*at, slice(1, None))
    a_odd, a_even, b_even = a[odd], a[even], b[even]
    h_odd = _pairs(a_odd * a_even[left], torch.addcmul(b[odd], a_odd, b_even[left]), dim)
    h = torch.empty_like(b)
    h[odd] = h_odd
    h[even][(*at, slice(0, 1))] = b_even[(*at, slice(0, 1))]
    rest = b_even[after]
    h[even][after] = torch.addcmul(rest, a_even[after], h_odd[(*at, slice(0, rest.shape[dim]))])
    return h


#: States that `selective_scan` holds at a time, over batch, tokens and channels: they should fit into a processor's
#: cache. Accelerators take 64 times as many.
STATES = 1 << 18


def selective_scan(
    x: Float[Tensor, "batch n channels"],
    delta: Float[Tensor, "batch n channels"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch n states"],
    C: Float[Tensor, "batch n states"],
    initial: Float[Tensor, "batch channels states"] | None = None,
) -> tuple[Float[Tensor, "batch n channels"], Float[Tensor, "batch channels states"]]:
    """The selective state space of Mamba, S6 (Gu, Dao 2023, arXiv 2312.00752), and its state after the last token:

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,    y_t = C_t^T h_t

    in each channel over ``states`` states, A negative, delta not negative. Chunk by chunk: only the state at the head
    of each chunk is kept for the backward pass, never the states of all tokens. A step of decoding is a call with one
    token. Sums are at least in float32. The backward pass has no derivative of its own but by the reference backend.
    """
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x, delta, A, B, C = (t.to(wide) for t in (x, delta, A, B, C))
    h = x.new_zeros(x.shape[0], *A.shape) if initial is None else initial.to(wide)
    if x.shape[1] == 1 or forced() == "reference":
        a, fresh = _selected(x, delta, A, B)
        states = scan(a, fresh, initial=h)
        y, h = _read_states(states, C), states[:, -1]
    else:
        y, h = _Selective.apply(x, delta, A, B, C, h)
    return y.to(dtype), h


def selective_weights(
    delta: Float[Tensor, "batch n channels"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch n states"],
    C: Float[Tensor, "batch n states"],
) -> Float[Tensor, "batch channels n n"]:
    """The matrix of each channel that `selective_scan` stands for: C_i^T exp(A (delta_{j+1} + ... + delta_i)) B_j
    delta_j for j <= i. One state at a time, so that no (n, n, states) tensor arises."""
    total = delta.transpose(1, 2).cumsum(2)
    later = torch.ones(total.shape[2], total.shape[2], dtype=torch.bool, device=total.device).triu(1)
    between = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(later, 0)
    weights = torch.zeros_like(between)
    for state in range(A.shape[1]):
        pairs = C[:, :, None, state] * B[:, None, :, state]
        weights = weights + pairs.unsqueeze(1) * (between * A[:, state, None, None]).exp()
    return (weights * delta.transpose(1, 2).unsqueeze(2)).masked_fill(later, 0)


def _selected(x: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decay and input of every state, (batch, n, channels, states)."""
    return (delta.unsqueeze(-1) * A).exp(), (delta * x).unsqueeze(-1) * B.unsqueeze(2)


def _read_states(states: Tensor, C: Tensor) -> Tensor:
    return (states @ C.unsqueeze(-1)).squeeze(-1)


class _Selective(torch.autograd.Function):
    """Block by block, forwards and then backwards in time, in buffers (steps, states, batch, channels) that are used
    again. In memory channels are innermost, or of many sequences of few channels the batch and then time. What is kept
    are the inputs and the state at the head of each block."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        work, heads = _Blocks(x, delta, A, B, C), []
        h, y = h.permute(2, 0, 1), torch.empty_like(work.x)
        decay, states = work.buffer(), work.buffer(1)
        for part in work.parts:
            heads.append(h)
            _, s = work.states(part, h, decay, states)
            h = s[-1].clone()
            _sum(s.mul_(work.C[part]), 1, y[part])
        ctx.save_for_backward(x, delta, A, B, C, *heads)
        return y.transpose(0, 1), h.permute(1, 2, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
        x, delta, A, B, C, *heads = ctx.saved_tensors
        work = _Blocks(x, delta, A, B, C)
        dy, dh, dA = work.major(dy), dh.permute(2, 0, 1), torch.zeros_like(work.A)
        dx, ddelta, dB, dC = (torch.empty_like(t) for t in (work.x, work.delta, work.B, work.C))
        decay, states, grads, room = (work.buffer(more) for more in (0, 1, 0, 0))
        for part, head in zip(reversed(work.parts), reversed(heads), strict=True):
            a, s = work.states(part, head, decay, states, room)
            u, d, out, size = work.input(part), work.delta[part].unsqueeze(1), dy[part].unsqueeze(1), len(a)
            # The gradient of a state is what its output asks for and what the next state passes back.
            g, free = _mul(out, work.C[part], grads[:size]), room[:size]
            g[-1] += dh
            work.scan_(a, g, free, back=True)
            by_decay = a.mul_(g)
            dh = a[0].clone()
            by_decay.mul_(states[:size])
            work.sum_channels(s, out, dC[part])
            # Of delta * x.
            by_input = _sum(_mul(g, work.B[part], free), 1, dx[part])
            work.sum_channels(g, u, dB[part])
            _sum(_mul(by_decay, work.A, free), 1, ddelta[part])
            ddelta[part].addcmul_(by_input, work.x[part])
            by_input.mul_(work.delta[part])
            dA += by_decay.mul_(d).sum((0, 2), keepdim=True)[0]
        dx, ddelta = dx.transpose(0, 1), ddelta.transpose(0, 1)
        dB, dC = (t.squeeze(3).permute(2, 0, 1) for t in (dB, dC))
        return dx, ddelta, dA[:, 0].T, dB, dC, dh.permute(1, 2, 0)


class _Blocks:
    """The inputs of a scan as blocks read them: (n, batch, channels), A (states, 1, channels), B and C
    (n, states, batch, 1)."""

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
        self.wide = x.shape[0] > x.shape[2]  # many sequences of few channels
        self.x, self.delta, self.A = self.major(x), self.major(delta), A.T.contiguous().unsqueeze(1)
        self.B, self.C = (self.major(t).transpose(1, 2).unsqueeze(3) for t in (B, C))
        room = STATES if x.device.type == "cpu" else 64 * STATES
        n, self.stepwise = x.shape[1], self.wide and x.device.type == "cpu"
        self.size = min(n, max(16, room // (x.shape[0] * A.numel()) - 1))
        self.views: dict[Any, Any] = {}  # what the scan of a buffer reads and writes, operator by operator
        self.parts = [slice(i, min(i + self.size, n)) for i in range(0, n, self.size)]

    def major(self, t: Tensor) -> Tensor:
        """(n, batch, channels)"""
        return t.permute(2, 1, 0).contiguous().permute(1, 2, 0) if self.wide else t.transpose(0, 1).contiguous()

    def buffer(self, more: int = 0) -> Tensor:
        (_, batch, channels), states = self.x.shape, self.A.shape[0]
        if self.wide:
            return self.x.new_empty(states, channels, self.size + more, batch).permute(2, 0, 3, 1)
        return self.x.new_empty(self.size + more, states, batch, channels)

    def input(self, part: slice) -> Tensor:
        return (self.delta[part] * self.x[part]).unsqueeze(1)

    def states(
        self, part: slice, head: Tensor, decay: Tensor, states: Tensor, room: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decays and states of a block; before them in ``states`` is the head. Without ``room`` decays are lost."""
        size = part.stop - part.start
        a = _mul(self.delta[part].unsqueeze(1), self.A, decay[:size]).exp_()
        states[0] = head
        s = _mul(self.input(part), self.B[part], states[1 : size + 1])
        s[0].addcmul_(a[0], head)
        self.scan_(a, s, a if room is None else room[:size])
        return a, s

    def sum_channels(self, states: Tensor, by: Tensor, out: Tensor) -> None:
        """The sum over channels of states * by; ``states`` are lost."""
        if not self.wide:
            _sum(states.mul_(by), 3, out)
            return
        _mul(states[..., :1], by[..., :1], out)
        for c in range(1, states.shape[3]):
            out.addcmul_(states[..., c : c + 1], by[..., c : c + 1])

    def scan_(self, a: Tensor, h: Tensor, room: Tensor, *, back: bool = False) -> None:
        """h_t += a_t h_{t-1}, or back in time h_t += a_{t+1} h_{t+1}, in place; products of ``a`` go to ``room``."""
        key = len(h), back
        if key not in self.views:
            self.views[key] = list(_steps(a, h, back) if self.stepwise else _tree(room, h, back))
        if not self.stepwise and back:
            room[:-1], room[-1] = a[1:], 0
        elif not self.stepwise and room is not a:
            room.copy_(a)
        for to, by, of, product in self.views[key]:
            to.addcmul_(by, of)
            if product is not None:
                by.mul_(product)


def _mul(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    # torch.compile takes contiguous tensors alone as `out`.
    return out.copy_(x * y) if torch.compiler.is_compiling() else torch.mul(x, y, out=out)


def _sum(x: Tensor, dim: int, out: Tensor) -> Tensor:
    keepdim = out.dim() == x.dim()
    if torch.compiler.is_compiling():
        return out.copy_(x.sum(dim, keepdim))
    return torch.sum(x, dim, keepdim, out=out)


def _steps(a: Tensor, h: Tensor, back: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, None]]:
    """h_t += a_t h_{t-1} along the first dimension, or h_t += a_{t+1} h_{t+1}, as addcmul(to, by, of)."""
    by, of = a.unbind(), h.unbind()
    for t in range(1, len(of)):
        yield (of[-t - 1], by[-t], of[-t], None) if back else (of[t], by[t], of[t - 1], None)


def _tree(a: Tensor, h: Tensor, back: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """h_t += a_t h_{t-1} along the first dimension, or h_t += a_t h_{t+1}, up and down the tree of Brent and Kung:
    O(n) work in O(log n) operators addcmul(to, by, of), each followed by mul(by, product)."""
    n, lags = len(h), [1 << i for i in range((len(h) - 1).bit_length())]
    for lag, down in [(lag, False) for lag in lags] + [(lag, True) for lag in reversed(lags)]:
        first = 3 * lag - 1 if down else 2 * lag - 1
        last = first + (n - 1 - first) // (2 * lag) * 2 * lag
        if first < n:
            low, high = (n - 1 - last, n - 1 - first) if back else (first, last)
            to, of = (slice(low + by, high + by + 1, 2 * lag) for by in (0, lag if back else -lag))
            yield h[to], a[to], h[of], None if down else a[of]


def fft_conv(
    x: Float[Tensor, "batch channels n"],
    kernel: Float[Tensor, "channels taps"],
    ahead: Float[Tensor, "channels taps_ahead"] | None = None,
) -> Float[Tensor, "batch channels n"]:
    """y_t = sum_{s <= t} kernel_{t-s} x_s, and with ``ahead`` also + sum_{s > t} ahead_{s-t-1} x_s.

    Long kernels, one a channel: by the FFT, in at least float32 and O(n log t) time for a kernel of t taps.
    """
    n, dtype = x.shape[-1], x.dtype
    kernel = kernel[..., :n]
    ahead = None if ahead is None or n == 1 else ahead[..., : n - 1]
    if forced() == "reference":
        return _toeplitz(kernel, ahead, n).to(dtype).matmul(x.unsqueeze(-1)).squeeze(-1)
    if dtype in (torch.float16, torch.bfloat16):
        x, kernel, ahead = x.float(), kernel.float(), None if ahead is None else ahead.float()
    past, future = kernel.shape[-1], 0 if ahead is None else ahead.shape[-1]
    block = 1 << (4 * (past + future) - 1).bit_length()
    whole = 1 << (n + max(past, future) - 1).bit_length()  # room enough that nothing wraps around
    length = min(block, whole)
    if ahead is not None:
        kernel = F.pad(kernel, (0, length - past - future))
        kernel = torch.cat([kernel, ahead.flip(-1)], -1)
    kernel = torch.fft.rfft(kernel, n=length)
    if length == whole:
        return torch.fft.irfft(torch.fft.rfft(x, n=length) * kernel, n=length)[..., :n].to(dtype)
    # A kernel much shorter than the sequence: blocks that overlap by its taps, of which the rest is kept.
    size = length - past - future
    blocks = F.pad(x, (past, future + -n % size)).unfold(-1, length, size)
    y = torch.fft.irfft(torch.fft.rfft(blocks) * kernel.unsqueeze(-2), n=length)
    return y[..., past : past + size].flatten(-2)[..., :n].to(dtype)


def fft_conv2d(
    x: Float[Tensor, "batch channels height width"],
    kernel: Float[Tensor, "channels taps_down taps_right"],
    centre: tuple[int, int] = (0, 0),
) -> Float[Tensor, "batch channels height width"]:
    """y_ij = sum_kl kernel_kl x_{i - k + centre_0, j - l + centre_1}: a kernel up to as large as the map is twice, one
    a channel. By the FFT on a padded map, so that nothing wraps around, in at least float32."""
    height, width, dtype = *x.shape[-2:], x.dtype
    if forced() == "reference":
        return (toeplitz2d(kernel, (height, width), centre) @ x.flatten(2).unsqueeze(-1)).view_as(x)
    if dtype in (torch.float16, torch.bfloat16):
        x, kernel = x.float(), kernel.float()
    # Room enough that nothing wraps around to what is kept.
    full = [
        max(taps, side + max(before, taps - 1 - before))
        for side, taps, before in zip((height, width), kernel.shape[-2:], centre, strict=True)
    ]
    size = [1 << (side - 1).bit_length() for side in full]
    how: dict[str, Any] = {"s": size, "dim": (-2, -1)} if size[0] > 1 else {"s": size[1:], "dim": (-1,)}
    y = torch.fft.irfftn(torch.fft.rfftn(x, **how) * torch.fft.rfftn(kernel, **how), **how)
    return y[..., centre[0] : centre[0] + height, centre[1] : centre[1] + width].to(dtype)


def toeplitz2d(
    kernel: Float[Tensor, "channels taps_down taps_right"], grid: tuple[int, int], centre: tuple[int, int] = (0, 0)
) -> Float[Tensor, "channels n n"]:
    """The matrix of `fft_conv2d` over the cells of a grid in reading order."""
    cell, (taps_down, taps_right) = torch.arange(grid[0] * grid[1], device=kernel.device), kernel.shape[-2:]
    row, column = cell // grid[1], cell % grid[1]
    down, right = row.unsqueeze(1) - row + centre[0], column.unsqueeze(1) - column + centre[1]
    outside = (down < 0) | (right < 0) | (down >= taps_down) | (right >= taps_right)
    taken = kernel[:, down.clamp(0, taps_down - 1), right.clamp(0, taps_right - 1)]
    return taken.masked_fill(outside, 0)


def _toeplitz(kernel: Tensor, ahead: Tensor | None, n: int) -> Float[Tensor, "channels n n"]:
    taps = F.pad(kernel, (n, n - kernel.shape[-1]))  # taps[n + lag]
    if ahead is not None:
        taps = taps + F.pad(ahead.flip(-1), (n - ahead.shape[-1], n))
    t = torch.arange(n, device=kernel.device)
    return taps[..., n + t[:, None] - t]


def exponentials(
    weight: Float[Tensor, "*c modes"], log_decay: Float[Tensor, "*c modes"], n: int
) -> Float[Tensor, "*c n"]:
    """The kernel K_t = sum_r weight_r exp(t log_decay_r) for t < n: the impulse response of a diagonal recurrence.

    With t = t1 B + t2 it is a product of two matrices of about sqrt(n) columns, so no (modes, n) tensor arises.
    """
    size = max(1, int(n**0.5))
    blocks = -(-n // size)
    t = torch.arange(max(size, blocks), device=weight.device, dtype=log_decay.real.dtype)
    outer = weight.unsqueeze(-2) * (log_decay.unsqueeze(-2) * (t[:blocks, None] * size)).exp()
    inner = (log_decay.unsqueeze(-1) * t[:size]).exp()
    return (outer @ inner).flatten(-2)[..., :n]


@dataclass(frozen=True)
class DampedEMA:
    """The multi-dimensional damped exponential moving average of Mega (Ma et al. 2022, arXiv 2209.10655), for each
    channel over ``modes`` states:

        s_t = alpha * beta x_t + (1 - alpha * delta) * s_{t-1},    y_t = eta^T s_t

    With delta = beta = eta = 1 and one mode it is the textbook average. All coefficients are (channels, modes), alpha
    and delta within (0, 1].
    """

    alpha: Modes
    delta: Modes
    beta: Modes
    eta: Modes

    @property
    def decay(self) -> Modes:
        return 1 - self.alpha * self.delta

    def kernel(self, n: int) -> Float[Tensor, "channels n"]:
        decay = self.decay.clamp(min=torch.finfo(self.alpha.dtype).tiny)
        return exponentials(self.alpha * self.beta * self.eta, decay.log(), n)

    def step(
        self, x: Float[Tensor, "batch channels"], state: Float[Tensor, "batch channels modes"] | None
    ) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels modes"]]:
        """The average at the next token; ``state`` is None at the first."""
        fresh = self.alpha * self.beta * x.unsqueeze(-1)
        state = fresh if state is None else fresh + self.decay * state
        return (state * self.eta).sum(-1), state

    def recur(self, x: Float[Tensor, "batch n channels"]) -> Float[Tensor, "batch n channels"]:
        """The averages of a whole sequence by `scan`, which keeps every state."""
        fresh = self.alpha * self.beta * x.unsqueeze(-1)
        return (scan(self.decay.expand(1, x.shape[1], -1, -1), fresh) * self.eta).sum(-1)


def ema(
    x: Float[Tensor, "batch n channels"], past: DampedEMA, future: DampedEMA | None = None
) -> Float[Tensor, "batch n channels"]:
    """The moving average of each channel; with ``future`` also that of the tokens after, the present one not counted
    twice."""
    if forced() == "reference":
        y = past.recur(x)
        if future is not None:
            y = y + future.recur(x.flip(1)).flip(1) - future.kernel(1).squeeze(-1) * x
        return y
    n = x.shape[1]
    ahead = None if future is None else future.kernel(n)[..., 1:]
    return fft_conv(x.transpose(1, 2), past.kernel(n), ahead).transpose(1, 2)
