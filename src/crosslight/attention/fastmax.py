"""Fastmax: the exponential of softmax replaced by its Taylor polynomial, which factors.

Gerami, Hoover, Dulepet, Duraiswami, "FAST: Factorizable Attention for Speeding up Transformers", 2024,
arXiv 2402.07901.

    q^ = (q - mean(q)) / ||q - mean(q)||,   k^ likewise        mean over the d channels of a token
    s_ij = q^_i . k^_j / c,   f(s) = 1 + s + ... + s^p / p!     p = 1 or 2, temperature c
    A_ij = f(s_ij) / sum_j f(s_ij),   out = A V                 (batch, heads, n, d)

Plain attention has exp(q . k / sqrt(d)) for f. A polynomial of a product of vectors is itself a product of vectors,
f(s_ij) = phi(q^_i / c) . phi(k^_j) with

    phi(x) = (1, x_a, x_a^2 / sqrt(2), x_a x_b for a < b)       1 + d for p = 1, 1 + d + d (d + 1) / 2 for p = 2

so that A is never formed: time O(n d^(p+1)), a state of d (d + 1) / 2 + d + 1 rows. For p = 2, f(s) > 1/2: every row is
a distribution over all the keys. For p = 1 that holds while |s| < 1.

`step` and p = 1 take these features. For p = 2, `forward` sums products of keys and values, S = sum_j (1, k_j) k_j v_j
and sum_j v_j (q, k for q^ / c, k^), and a query turns S into a matrix, so that no token has d^2 features to write out:

    T_c(q) = sum_j (1 + c q . k_j) k_j v_j^T        (d, e) a query, one product of (1, c q) and S
    sum_j f(s_ij) v_j = sum_j v_j + q_i T_1/2(q_i)       its gradient by q_i, from g by the sum:  T_1(q_i) g_i

f is symmetric in q and k, so the gradients by k and v are the same with (q, g) in place of (k, v). Causal attention
goes in chunks: inside a chunk by scores, what came before it by S. Only q, k and v are kept for the backward pass,
which carries S forwards once more, for q, and the sums of queries and gradients backwards, for k and v.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, linear, masks
from crosslight.engines.backend import forced
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

CARD = Card(
    id="fastmax",
    kind="token",
    group="linear",
    title="FAST: Factorizable Attention for Speeding up Transformers",
    year=2024,
    paper="2402.07901",
    summary="Softmax with the Taylor polynomial of exp: exact attention over all keys, factored to linear cost.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the n x n matrix of the polynomial, row by row, in float64; softmax for small scores, with error O(s^3)",
    differs="Dropout on the quadratic features is left out. Equal products x_a x_b = x_b x_a are kept once: half of "
    "the features. Queries and keys can be divided by their deviation instead of their norm (`normalise`).",
    evidence=Evidence(
        claim="quality close to softmax attention at linear cost, p = 2",
        task="language",
        metric="bits_per_byte",
        margin=-0.1,
    ),
)


#: Tokens whose T is held at a time; accelerators take 4 times as many.
CHUNK = 64


@register(CARD)
class Fastmax(Core):
    """q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        p: degree of the polynomial, 1 or 2.
        temperature: c, by which scores are divided.
        normalise: what centred queries and keys are divided by: their "norm", or their deviation, "std".
    """

    grouped = True

    def __init__(
        self, heads: int, head_dim: int, *, p: int = 2, temperature: float = 1.0, normalise: str = "norm"
    ) -> None:
        super().__init__(heads, head_dim)
        expect(p in (1, 2), "p", p, "1 or 2")
        expect(temperature > 0, "temperature", temperature, "a number > 0")
        expect(normalise in ("norm", "std"), "normalise", repr(normalise), "'norm' or 'std'")
        self.p, self.temperature, self.normalise = p, float(temperature), normalise

    def forward(self, q, k, v, *, mask=None, causal=False):
        keep = masks.split(mask)[1]
        if forced() == "reference":
            return self.weights(q, k, mask=mask, causal=causal) @ dense.repeat_heads(v, q.shape[1])
        if self.p == 1:
            features = self._features(q, self.temperature), self._features(k)
            return linear.attend(*features, v, causal=causal, keep=keep, normalise=True)
        # The sum of the weights is what they read from a value of one.
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        if keep is not None:
            v = v * keep[:, None, :, None].to(v.dtype)
        k, v = dense.repeat_heads(self._standard(k), q.shape[1]), dense.repeat_heads(v, q.shape[1])
        out = _Quadratic.apply(self._standard(q, self.temperature), k, v, causal)
        return out[..., :-1] / torch.where(out[..., -1:] == 0, 1, out[..., -1:])

    def weights(self, q, k, *, mask=None, causal=False):
        q, k = self._features(q, self.temperature), self._features(k)
        return linear.weights(q, k, causal=causal, keep=masks.split(mask)[1], normalise=True)

    def step(self, q, k, v, state, **extra):
        return linear.step(self._features(q, self.temperature), self._features(k), v, state, normalise=True)

    def _standard(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """Centred over the channels and of length one (or deviation one), over the temperature."""
        length = 1.0 if self.normalise == "norm" else math.sqrt(x.shape[-1])
        return F.normalize(x - x.mean(-1, keepdim=True), dim=-1, eps=1e-6) * (length / temperature)

    def _expanded(self, x: Tensor) -> Float[Tensor, "batch heads n features"]:
        """phi."""
        parts = [torch.ones_like(x[..., :1]), x]
        if self.p == 2:
            a, b = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
            parts += [x.square() / math.sqrt(2), x[..., a] * x[..., b]]
        return torch.cat(parts, -1)

    def _features(self, x: Tensor, temperature: float = 1.0) -> Float[Tensor, "batch heads n features"]:
        return self._expanded(self._standard(x, temperature))


class _Sums:
    """What tokens x, (heads, n, d), with values v, (heads, n, e), leave to those that read them:

    total = sum_j v_j and S = sum_j (1, x_j) x_j v_j, (heads, 1 + d, d e).
    """

    def __init__(self, x: Tensor, v: Tensor, size: int, of: list[slice]) -> None:
        self.x, self.v, self.wide = x, v, torch.promote_types(x.dtype, torch.float32)
        heads, d, e = x.shape[0], x.shape[2], v.shape[2]
        self.total = x.new_zeros(heads, 1, e, dtype=self.wide)
        self.S = x.new_zeros(heads, 1 + d, d * e, dtype=self.wide)
        # Written again for each chunk: fresh pages take longer than the products.
        self.buffer = x.new_empty(heads * size * d * e, dtype=self.wide)
        for part in of:
            self.add(part)

    def add(self, part: slice) -> None:
        x, v = self.x[:, part].to(self.wide), self.v[:, part].to(self.wide)
        outer = torch.mul(x.unsqueeze(3), v.unsqueeze(2), out=self._empty(x))
        self.S.baddbmm_(_after_one(x).transpose(1, 2), outer.flatten(2))
        self.total += v.sum(1, keepdim=True)

    def slope(self, x: Tensor) -> Float[Tensor, "heads n d e"]:
        """T_1(x)."""
        T = self._empty(x)
        torch.bmm(_after_one(x), self.S, out=T.flatten(2))
        return T

    def read(self, x: Tensor, T: Tensor) -> Float[Tensor, "heads n e"]:
        """total + x T_1/2(x), from T_1(x)."""
        first = self.S[:, 0].unflatten(1, T.shape[2:])
        return self.total + ((x.unsqueeze(2) @ T).squeeze(2) + x @ first) / 2

    def _empty(self, x: Tensor) -> Tensor:
        shape = (*x.shape, self.v.shape[2])
        return self.buffer[: math.prod(shape)].view(shape)


class _Quadratic(torch.autograd.Function):
    """sum_j f(q_i . k_j) v_j for p = 2, over all keys or, causal, over j <= i."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        batch = q.shape[:2]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = v.new_empty(*q.shape[:2], v.shape[2])
        size = _size(q, k)
        sums = _Sums(k, v, size, [] if causal else _parts(k, size))
        for part in _parts(q, size):
            x = q[:, part].to(sums.wide)
            here = sums.read(x, sums.slope(x))
            if causal:
                s = x @ k[:, part].to(sums.wide).transpose(1, 2)
                here += (1 + s + s.square() / 2).tril() @ v[:, part].to(sums.wide)
                sums.add(part)
            out[:, part] = here
        return out.unflatten(0, batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        batch = grad.shape[:2]
        q, k, v, grad = (t.flatten(0, 1) for t in (*ctx.saved_tensors, grad))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        size = _size(q, k)
        sums = _Sums(k, v, size, [] if ctx.causal else _parts(k, size))
        for part in _parts(q, size):
            x, g = q[:, part].to(sums.wide), grad[:, part].to(sums.wide)
            here = (sums.slope(x) @ g.unsqueeze(3)).squeeze(3)
            if ctx.causal:
                y, values = k[:, part].to(sums.wide), v[:, part].to(sums.wide)
                s = x @ y.transpose(1, 2)
                ds = ((g @ values.transpose(1, 2)) * (1 + s)).tril()
                here += ds @ y
                dk[:, part] = ds.transpose(1, 2) @ x
                dv[:, part] = (1 + s + s.square() / 2).tril().transpose(1, 2) @ g
                sums.add(part)
            dq[:, part] = here
        sums = _Sums(q, grad, size, [] if ctx.causal else _parts(q, size))
        for part in reversed(_parts(k, size)):
            y, values = k[:, part].to(sums.wide), v[:, part].to(sums.wide)
            T = sums.slope(y)
            dk[:, part] += (T @ values.unsqueeze(3)).squeeze(3)
            dv[:, part] += sums.read(y, T)
            if ctx.causal:
                sums.add(part)
        dq, dk, dv = (t.unflatten(0, batch) for t in (dq, dk, dv))
        return dq, dk, dv, None


def _after_one(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), x], -1)


def _size(q: Tensor, k: Tensor) -> int:
    return min(CHUNK if q.device.type == "cpu" else 4 * CHUNK, max(q.shape[1], k.shape[1]))


def _parts(x: Tensor, size: int) -> list[slice]:
    """The chunks of the tokens of x."""
    return [slice(i, min(i + size, x.shape[1])) for i in range(0, x.shape[1], size)]
