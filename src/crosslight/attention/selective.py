"""What rows with selective state spaces share: the convolution and the S6 scan of Mamba over one stream.

Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752.

    v = SiLU(conv(x))                                          causal, depth-wise                (batch, n, channels)
    delta = softplus(W_d v_r + b),   [v_r ; B ; C] = W v       step, and input and output of the states
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t v_t,   y_t = C_t^T h_t + D v_t

Parameters have the names of Mamba's. A token that is masked has delta = 0 and v = 0: the state passes it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.engines import recurrent

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n channels"]
    Keep = Bool[Tensor, "batch n"]


#: Elements from which on elementwise steps are computed again rather than kept.
LARGE = 1 << 19
#: Tokens that are convolved at a time.
TOKENS = 1024


def project(layer: nn.Linear, x: Stream, widths: Sequence[int]) -> list[Stream]:
    """The layer, split. Of more streams than channels each is (widths, n, batch) in memory, as the scan reads it."""
    if x.shape[0] <= x.shape[2]:
        return list(layer(x).split(widths, -1))
    y = layer.weight @ x.permute(2, 1, 0).flatten(1)
    y = y if layer.bias is None else y + layer.bias.unsqueeze(1)
    return [part.unflatten(1, (x.shape[1], x.shape[0])).permute(2, 1, 0) for part in y.split(widths)]


def recomputed(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """function(*tensors), whose intermediate results are computed again in the backward pass where they are large."""
    if not torch.is_grad_enabled() or sum(t.numel() for t in tensors if t is not None) < LARGE:
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _convolved(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(conv) along the second dimension, with a row of weights for each tap."""
    size = rows.shape[1] - len(weight) + 1
    y = torch.addcmul(bias, weight[0], rows[:, :size])
    for k in range(1, len(weight)):
        y = torch.addcmul(y, weight[k], rows[:, k : k + size])
    return F.silu(y)


@dataclass
class ScanState:
    """The last inputs, which the next convolutions read, and the states."""

    recent: Float[Tensor, "batch taps channels"]
    h: Float[Tensor, "batch channels states"]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.recent, self.h))


class SelectiveScan(nn.Module):
    """(batch, n, channels) -> the same.

    Args:
        channels: channels, each with ``states`` states.
        rank: width of what delta is made of; Mamba has a sixteenth of the model's width.
        kernel: taps of the convolution.
        normed: RMS norms over what makes delta, over B and over C, as Jamba and the released Hymba have them.
    """

    def __init__(self, channels: int, rank: int, states: int = 16, kernel: int = 4, normed: bool = False) -> None:
        super().__init__()
        self.states, self.rank = states, rank
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels)
        self.x_proj = nn.Linear(channels, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        widths = (rank, states, states) if normed else ()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for width in widths)
        # Steps that start between 0.001 and 0.1.
        step = torch.exp(torch.rand(channels) * math.log(100) + math.log(0.001))
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def values(self, x: Stream, keep: Keep | None = None, recent: Tensor | None = None) -> Stream:
        """v, after ``recent`` inputs or none; some tokens at a time, which stay in a processor's cache."""
        x = x if keep is None else x.masked_fill(~keep.unsqueeze(-1), 0)
        recent = x.new_zeros(x.shape[0], self.conv1d.kernel_size[0] - 1, x.shape[2]) if recent is None else recent
        wide, vs = x.shape[0] > x.shape[2], []
        weight, bias = self.conv1d.weight.squeeze(1).T, cast("Tensor", self.conv1d.bias)
        if wide:
            x, recent = x.permute(2, 1, 0), recent.permute(2, 1, 0)
            weight, bias = weight[..., None, None], bias[:, None, None]
        for part in x.split(x.shape[1] if wide else TOKENS, 1):
            rows = torch.cat([recent, part], 1)
            recent = rows[:, part.shape[1] :]
            vs.append(recomputed(_convolved, rows, weight, bias))
        v = torch.cat(vs, 1)
        v = v.permute(2, 1, 0) if wide else v
        return v if keep is None else v.masked_fill(~keep.unsqueeze(-1), 0)

    def select(self, v: Stream, keep: Keep | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """delta, A, B, C."""
        made = project(self.x_proj, v, (self.rank, self.states, self.states))
        step, B, C = (norm(t) for norm, t in zip(self.norms, made, strict=True)) if self.norms else made
        # In at least float32: exponentials of sums over a long sequence do not survive half precision.
        wide = torch.promote_types(v.dtype, torch.float32)
        delta = F.softplus(project(self.dt_proj, step, (v.shape[2],))[0].to(wide))
        delta = delta if keep is None else delta.masked_fill(~keep.unsqueeze(-1), 0)
        return delta, -self.A_log.to(wide).exp(), B, C

    def forward(self, x: Stream, keep: Keep | None = None) -> Stream:
        v = self.values(x, keep)
        return recurrent.selective_scan(v, *recomputed(self.select, v, keep))[0] + self.D * v

    def weights(self, x: Stream, keep: Keep | None = None) -> Float[Tensor, "batch channels n n"]:
        """The matrices that `forward` applies to `values`, D left out."""
        v = self.values(x, keep)
        delta, A, B, C = self.select(v, keep)
        return recurrent.selective_weights(delta, A, B.to(delta), C.to(delta)).to(v.dtype)

    def after(self, x: Stream) -> ScanState:
        """The state after a whole stream, from which `step` goes on."""
        v, taps = self.values(x), self.conv1d.kernel_size[0] - 1
        return ScanState(F.pad(x, (0, 0, taps, 0))[:, x.shape[1] :], recurrent.selective_scan(v, *self.select(v))[1])

    def step(self, x: Float[Tensor, "batch 1 channels"], state: ScanState | None) -> tuple[Stream, ScanState]:
        """The output at the next token; ``state`` is None at the first."""
        before = x.new_zeros(x.shape[0], self.conv1d.kernel_size[0] - 1, x.shape[2]) if state is None else state.recent
        v = self.values(x, recent=before)
        y, h = recurrent.selective_scan(v, *self.select(v), None if state is None else state.h)
        return y + self.D * v, ScanState(torch.cat([before, x], 1)[:, 1:], h)
