"""Recurrences and long convolutions: a first-order scan, convolution by FFT, and the damped moving average of Mega.

A linear recurrence with constant coefficients is a convolution, so the same operator has two fast forms: `fft_conv`
where the whole sequence is known, and a step with an explicit state where tokens arrive one by one. Coefficients that
depend on the token leave the scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def fft_conv(
    x: Float[Tensor, "batch channels n"],
    kernel: Float[Tensor, "channels taps"],
    ahead: Float[Tensor, "channels taps_ahead"] | None = None,
) -> Float[Tensor, "batch channels n"]:
    """y_t = sum_{s <= t} kernel_{t-s} x_s, and with ``ahead`` also + sum_{s > t} ahead_{s-t-1} x_s.

    Long kernels, one a channel: O(n log n) time by the FFT, in at least float32.
    """
    n, dtype = x.shape[-1], x.dtype
    kernel = kernel[..., :n]
    ahead = None if ahead is None or n == 1 else ahead[..., : n - 1]
    if forced() == "reference":
        return _toeplitz(kernel, ahead, n).to(dtype).matmul(x.unsqueeze(-1)).squeeze(-1)
    if dtype in (torch.float16, torch.bfloat16):
        x, kernel, ahead = x.float(), kernel.float(), None if ahead is None else ahead.float()
    taps = n + max(kernel.shape[-1], 0 if ahead is None else ahead.shape[-1])
    length = 1 << (taps - 1).bit_length()  # room enough that nothing wraps around
    if ahead is not None:
        kernel = F.pad(kernel, (0, length - kernel.shape[-1] - ahead.shape[-1]))
        kernel = torch.cat([kernel, ahead.flip(-1)], -1)
    product = torch.fft.rfft(x, n=length) * torch.fft.rfft(kernel, n=length)
    return torch.fft.irfft(product, n=length)[..., :n].to(dtype)


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
