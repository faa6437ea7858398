"""Location-relative attention: where a decoder reads next follows from where it read last, not from what stands there.

Battenberg, Skerry-Ryan, Mariooryad, Stanton, Kao, Shannon, Bagby, "Location-Relative Attention Mechanisms For Robust
Long-Form Speech Synthesis", 2019, arXiv 1910.10288.

For decoder states s_i = x_i and an encoder memory z_j, a_i the row of weights (batch, heads, n, m), a_0 = one-hot at 0:

    dca      a_i = softmax_j(v^T tanh(U f_ij + T g_ij + b) + p_ij)
             f_i = F * a_{i-1}            8 static filters of length 21
             g_i = G(s_i) * a_{i-1}       8 filters that the state predicts: G(s) = V_G tanh(W_G s + b_G)
             p_i = log max(P * a_{i-1}, 1e-6)        P the beta-binomial(10; 0.1, 0.9) pmf, over 0 to 10 steps ahead
    gmm      (w^, D^, s^) = V tanh(W s_i + b) + c,  mu_i = mu_{i-1} + D_i,  mu_0 = 0
             a_ij = sum_k w_ik / Z_ik exp(-(j - mu_ik)^2 / (2 sigma_ik^2))
        v0   w = exp w^,      D = exp D^,      sigma = sqrt(exp(-s^) / 2),  Z = 1            (Graves 2013)
        v1   w = softmax w^,  D = exp D^,      sigma = sqrt(exp s^),        Z = sqrt(2 pi sigma^2)
        v2   w = softmax w^,  D = softplus D^, sigma = softplus s^,         Z = sqrt(2 pi sigma^2)
        v2b  v2 with c at first such that D is about 1 and sigma about 10; c is 0 at first in the others
    y_i = W_o sum_j a_ij W_v z_j

The prior P of dca allows no way back and at most 10 steps ahead. Both know no position, so they read texts far longer
than those of the training. The means of gmm are a running sum, taken for all queries at once; dca is a recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.alignment import Aligned, AlignmentCache, unrolled
from crosslight.attention.precision import widened
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Rows = Float[Tensor, "batch heads n m"]
    Out = Float[Tensor, "batch heads n out"]
    Keep = Bool[Tensor, "batch 1 m"]

Form = Literal["gmm-v2b", "gmm-v2", "gmm-v1", "gmm-v0", "dca"]
Read = Callable[["Rows"], "Out"]

CARD = Card(
    id="dca-gmm-attention",
    kind="token",
    group="positions-masks",
    title="Location-Relative Attention Mechanisms For Robust Long-Form Speech Synthesis",
    year=2019,
    paper="1910.10288",
    code="coqui-ai/TTS",
    summary="Weights over a memory that come from the weights before and the decoder's state alone: dynamic "
    "convolutions with a monotonic prior, or Gaussians that move forward.",
    patterns=("noncausal-cross", "causal-cross"),
    why_not="A query's place in a second stream is found step by step; in its own stream it is known.",
    cost="n^2",
    mask="keys",
    decode="state",
    small={"hidden": 8},
    checked="coqui-tts' MonotonicDynamicConvolutionAttention with the same weights; the mixtures written out; "
    "scipy's beta-binomial",
    differs="The paper has one alignment, the default; more heads each move on their own. It reads the memory as it "
    "is: W_v and W_o are those of multi-head attention. The default is the GMM whose means come without a loop over "
    "queries. coqui-tts masks after the softmax and does not normalise again; "
    "here masked keys are left out of it. Output i depends on x up to i also in calls that are not causal.",
    evidence=Evidence(
        claim="what was trained to copy up to 10 symbols copies 40, where attention by content loses its place",
        task="copy-longer",
        metric="accuracy",
        margin=0.3,
        options={"form": "dca", "heads": 1, "hidden": 32},
    ),
)


def prior(length: int, alpha: float, beta: float) -> Float[Tensor, " length"]:
    """The beta-binomial pmf over 0 to ``length`` - 1 steps ahead."""

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    n = length - 1
    start = log_beta(alpha, beta)
    pmf = [math.comb(n, k) * math.exp(log_beta(k + alpha, n - k + beta) - start) for k in range(length)]
    return torch.tensor(pmf, dtype=torch.get_default_dtype())


class DynamicConvolution(nn.Module):
    """The alignment of dca; its state is the last row of weights, (batch, heads, m)."""

    prior: Tensor

    def __init__(
        self, dim: int, heads: int, hidden: int, filters: int, length: int, prior_length: int, alpha: float, beta: float
    ) -> None:
        super().__init__()
        expect(length % 2 == 1, "length", length, "an odd number of taps")
        expect(1 <= prior_length <= length // 2 + 1, "prior", prior_length, f"1 to {length // 2 + 1} taps")
        self.heads, self.filters, self.length = heads, filters, length
        self.query = nn.Linear(dim, heads * hidden)
        self.dynamic = _matrix(heads, hidden, length * filters)
        self.static = _matrix(heads, length, filters)
        self.from_static, self.from_dynamic = _matrix(heads, filters, hidden), _matrix(heads, filters, hidden)
        self.bias, self.v = nn.Parameter(torch.zeros(heads, 1, hidden)), _matrix(heads, hidden, 1)
        # As taps of a window around each key: that of k steps back holds the probability of k steps ahead.
        taps = F.pad(prior(prior_length, alpha, beta).flip(0), (length // 2 + 1 - prior_length, length // 2))
        self.register_buffer("prior", taps, persistent=False)

    def start(self, context: Tensor) -> Tensor:
        """All weight on the first key."""
        first = torch.arange(context.shape[1], device=context.device) == 0
        return first.to(widened(context.dtype)).expand(context.shape[0], self.heads, -1)

    def align(self, x: Stream, state: Tensor, keep: Keep | None, read: Read) -> tuple[Out, Tensor]:
        wide = state.dtype  # a row of weights is fed back n times
        dynamic = (self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).tanh() @ self.dynamic).to(wide)
        dynamic = dynamic.unflatten(-1, (self.length, self.filters))
        static, mix = (self.static @ self.from_static).to(wide), self.from_dynamic.to(wide)
        bias, v, taps = self.bias.to(wide), self.v.to(wide), self.prior.to(wide)

        def advance(last: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
            around = F.pad(last, (self.length // 2, self.length // 2)).unfold(-1, self.length, 1)
            # (U F + T G) * a in place of U (F * a) + T (G * a)
            energy = ((around @ (static + filters @ mix) + bias).tanh() @ v).squeeze(-1)
            row = dense.softmax(energy + (around @ taps).clamp(min=1e-6).log(), keep)
            return row, row

        row = state.numel() * (self.length + 2 * self.bias.shape[-1])
        return unrolled(advance, state, (dynamic,), read, row)


class Mixture(nn.Module):
    """The alignment of gmm; its state is where the means are, (batch, heads, components)."""

    def __init__(self, dim: int, heads: int, hidden: int, components: int, version: str) -> None:
        super().__init__()
        self.heads, self.components, self.version = heads, components, version
        self.query, self.out = nn.Linear(dim, heads * hidden), _matrix(heads, hidden, 3 * components)
        bias = torch.zeros(heads, 1, 3, components)
        if version == "v2b":
            bias[:, :, 1], bias[:, :, 2] = math.log(math.expm1(1.0)), math.log(math.expm1(10.0))
        self.bias = nn.Parameter(bias)

    def start(self, context: Tensor) -> Tensor:
        """All means on the first key."""
        return context.new_zeros(context.shape[0], self.heads, self.components, dtype=widened(context.dtype))

    def parameters_of(self, x: Stream, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """w / Z, D and 1 / (2 sigma^2), each (batch, heads, n, components)."""
        raw = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).tanh() @ self.out
        w, step, width = (raw.unflatten(-1, (3, -1)) + self.bias).to(dtype).unbind(-2)
        if self.version == "v0":
            return w.exp(), step.exp(), width.exp()
        variance = width.exp() if self.version == "v1" else F.softplus(width).square()
        step = step.exp() if self.version == "v1" else F.softplus(step)
        return w.softmax(-1) / (2 * math.pi * variance).sqrt(), step, 1 / (2 * variance)

    def align(self, x: Stream, state: Tensor, keep: Keep | None, read: Read, m: int) -> tuple[Out, Tensor]:
        height, step, rate = self.parameters_of(x, state.dtype)
        mean = state.unsqueeze(2) + step.cumsum(2)
        j = torch.arange(m, device=x.device, dtype=state.dtype).unsqueeze(-1)

        def part(start: int, stop: int) -> Tensor:
            w, mu, r = (t[:, :, start:stop].unsqueeze(3) for t in (height, mean, rate))
            rows = (w * (-(j - mu).square() * r).exp()).sum(-1)
            return read(rows if keep is None else rows.masked_fill(~keep.unsqueeze(2), 0))

        return dense.by_rows(part, x.shape[1], state.numel() * m), mean[:, :, -1]


@register(CARD)
class LocationRelativeAttention(Aligned):
    """W_o [a v] with an alignment that moves on from query to query.

    Args:
        dim, heads, head_dim, context_dim, bias: as in `AttentionLayer`.
        form: "gmm-v2b", "gmm-v2", "gmm-v1", "gmm-v0" or "dca".
        hidden: width inside the MLPs.
        filters, length: of dca, static and dynamic filters and their taps.
        prior, alpha, beta: of dca, taps and parameters of the prior.
        components: of gmm, K.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        form: Form = "gmm-v2b",
        hidden: int = 128,
        filters: int = 8,
        length: int = 21,
        prior: int = 11,
        alpha: float = 0.1,
        beta: float = 0.9,
        components: int = 5,
    ) -> None:
        super().__init__(dim, heads, head_dim, context_dim, bias)
        expect(form in get_args(Form), "form", repr(form), f"one of {', '.join(get_args(Form))}")
        expect(hidden > 0, "hidden", hidden, "a positive int")
        self.alignment: DynamicConvolution | Mixture
        if form == "dca":
            self.alignment = DynamicConvolution(dim, heads, hidden, filters, length, prior, alpha, beta)
        else:
            self.alignment = Mixture(dim, heads, hidden, components, form.removeprefix("gmm-"))

    def align(
        self, x: Stream, state: Tensor, keep: Tensor | None, m: int, read: Read = lambda rows: rows
    ) -> tuple[Out, Tensor]:
        """The rows of weights over m keys for the states ``x``, going on from ``state``, and the state after them."""
        keep = None if keep is None else keep.unsqueeze(1)
        if isinstance(self.alignment, Mixture):
            return self.alignment.align(x, state, keep, read, m)
        return self.alignment.align(x, state, keep, read)

    def _start(self, context, how):
        keep = masks.split(how.mask)[1]
        return AlignmentCache(self._split(self.v(context)), keep, self.alignment.start(context))

    def _attend(self, x, cache):
        v = cache.v
        return self.align(x, cache.state, cache.keep, v.shape[2], lambda rows: rows.to(v.dtype) @ v)

    def _weights(self, x, context, how):
        keep = masks.split(how.mask)[1]
        return self.align(x, self.alignment.start(context), keep, context.shape[1])[0].to(x.dtype)


def _matrix(heads: int, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(heads, rows, columns).uniform_(-1, 1) * rows**-0.5)
