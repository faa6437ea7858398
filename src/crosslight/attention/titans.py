"""Titans: a neural memory, a small MLP that learns keys -> values while it reads, and three ways to join attention.

Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", 2025, arXiv 2501.00663.

The memory M of each head is an MLP with SiLU between its layers, W_1 .. W_L. For each token, with q, k, v = SiLU(conv(
W x)), q and k of length one, and gates alpha, eta, theta = sigmoid(linear(x)), a number a head:

    l(M; x) = ||M(k) - v||^2                                           surprise
    S_t = eta_t S_{t-1} - theta_t grad l(M; x_t)                       momentum
    M_t = (1 - alpha_t) M_{t-1} + S_t,      y_t = M_t(q_t)             forgetting, reading

Gradients are taken at the weights at the head of each chunk. The gradient of a layer's weights at token i is an outer
product of its input a_i and error d_i, so that inside a chunk no token has weights of its own:

    z W_l,t = m_t z W_l + s_t z S_l - sum_{i <= t} c_ti (z . a_i) d_i,   c = (decay of M) (decay of S) theta

with m, s, c products of the gates, (chunk, chunk) a head. A chunk of one token is the recurrence itself. Forms, with
learned persistent tokens P that every query sees:

    mac   each segment attends to [P ; M(q) of the segments before ; segment]; the memory learns what comes out, y, and
          the output is gate(y, M(y))
    mag   gate(attention over [P ; x] of the last ``segment`` tokens, memory(x)),  gate(a, b) = norm(a) sigmoid(norm(b))
    mal   that attention over memory(x)
    lmm   the memory alone

`weights` shows the attention of each head; of mag also, and of lmm alone, what each token's surprise v_i - M(k_i) adds
to later readings, 2 c_ti (z_t . a_i) in the last layer, so that the memory too is a matrix over tokens. Decoding
carries the weights of the memory and one segment, whatever the length.

For the backward pass the weights at the head of each group of 64 tokens are kept, and what the memory reads; what is
between is computed again, in mac also the attention and the readings of each segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from crosslight.attention.base import Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask, Pairs
from crosslight.engines.positions import Rotary
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Weights = Float[Tensor, "batch heads n n"]
    Keep = Bool[Tensor, "batch n"]
    Layers = list[Tensor]  # (batch, heads, in, out) each

CARD = Card(
    id="titans",
    kind="token",
    group="recurrent",
    title="Titans: Learning to Memorize at Test Time",
    year=2025,
    paper="2501.00663",
    summary="A neural memory that learns keys to values while it reads, as context, gate or layer of attention.",
    patterns=("causal-self",),
    why_not="The memory is written token after token of the stream that reads it.",
    cost="n",
    mask="keys",
    decode="state",
    small={"segment": 16, "chunk": 8, "persistent": 2},
    checked="the token recurrence with gradients by autograd, taken at the head of each chunk; the gated delta rule "
    "for a linear memory; the attention of each form query by query",
    differs="In mac a query sees the readings M(q_j) of its own and earlier tokens only, and the memory reads y as it "
    "is after that token, so that it is causal inside a segment too. Gates start at 0.02, 0.5, 0.02 (alpha, eta, "
    "theta), and the MLP is twice as wide inside: the paper gives no figures. Readings inside a chunk see each token's "
    "own update, as in the paper; titans-pytorch reads at the weights of whole chunks.",
    evidence=Evidence(
        claim="with attention over the last 8 tokens, pairs from further back are recalled through the memory",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.2,
        baseline="fused-neighborhood-attention",
        options={"form": "mag", "segment": 8, "chunk": 8},
        baseline_options={"kernel_size": 8, "position": "rope"},
        budget={"steps": 400},
    ),
)

#: Tokens in whose terms the weights are held: what is kept for the backward pass is those at the head of each group.
GROUP = 64
FORMS = ("mac", "mag", "mal", "lmm")


@dataclass
class MemoryState:
    """The memory's weights, their momentum, the weights at the head of the chunk, the tokens since, and the last
    inputs of the convolution."""

    both: Layers  # (batch, heads, 2, in, out), M and S
    head: Layers
    place: int
    recent: Float[Tensor, "batch taps dim3"]

    @property
    def M(self) -> Layers:
        return [w[:, :, 0] for w in self.both]

    @property
    def S(self) -> Layers:
        return [w[:, :, 1] for w in self.both]


@dataclass
class Trace:
    """What reading left behind: input z of the last layer for queries, a for keys, surprise, and its coefficients."""

    z: Heads
    a: Heads
    surprise: Heads
    base: Heads


class _Again(torch.autograd.Function):
    """fn(*tensors), computed again in the backward pass; as `torch.utils.checkpoint`, without a hook a tensor."""

    @staticmethod
    def forward(ctx: Any, fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.fn = fn
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return fn(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            needed = ctx.needs_input_grad[1:]
            inputs = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)]
            pairs = zip(ctx.fn(*inputs), grads, strict=True)
            asked = [(y, g) for y, g in pairs if g is not None and y.requires_grad]
        wanted, outputs, given = [t for t in inputs if t.requires_grad], [y for y, _ in asked], [g for _, g in asked]
        if not asked:
            return None, *(None for _ in needed)
        found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
        return None, *(next(found) if n else None for n in needed)


def _settled(w: Tensor) -> Tensor:
    """The weights without those that have decayed to nothing: soon they would be subnormal numbers, on which arithmetic
    is many times slower. Their gradient stays."""
    least = math.sqrt(torch.finfo(w.dtype).tiny)
    return w - (w * (w.abs() < least)).detach()


def recomputed(fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling() or forced() == "reference":
        return fn(*tensors)
    return _Again.apply(fn, *tensors)


class _Errors(torch.autograd.Function):
    """Inputs a_l (of layers after the first) and errors d_l of all layers at the tokens of a group, chunk after chunk.

    k, v (heads, n, dim), c (heads, chunks, n) and W_l (heads, chunks, in, out): in chunk j the weights of a layer are
    W_lj - sum_i c_ji a_li^T d_li, so that a product with them is one with W_lj and one with what came before."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, c: Tensor, *W: Tensor) -> tuple[Tensor, ...]:
        last, size = len(W) - 1, k.shape[1] // W[0].shape[1]
        a = [k, *(k.new_empty(*k.shape[:2], w.shape[2]) for w in W[1:])]
        d = [k.new_empty(*k.shape[:2], w.shape[3]) for w in W]
        before, errors = [torch.empty_like(t) for t in a[1:]], [torch.empty_like(t) for t in a[1:]]
        for j in range(W[0].shape[1]):
            now, old = slice(j * size, (j + 1) * size), slice(0, j * size)

            def times(z: Tensor, w: Tensor, a: Tensor, d: Tensor, j: int = j, now=now, old=old) -> Tensor:
                y = torch.bmm(z[:, now], w[:, j])
                if j:
                    y.baddbmm_(torch.bmm(z[:, now], a[:, old].mT).mul_(c[:, j : j + 1, old]), d[:, old], alpha=-1)
                return y

            for i in range(last):
                before[i][:, now] = y = times(a[i], W[i], a[i], d[i])
                a[i + 1][:, now] = F.silu(y)
            d[last][:, now] = times(a[last], W[last], a[last], d[last]).sub_(v[:, now]).mul_(2)
            for i in reversed(range(last)):
                errors[i][:, now] = y = times(d[i + 1], W[i + 1].mT, d[i + 1], a[i + 1])
                d[i][:, now] = torch.ops.aten.silu_backward(y, before[i][:, now])
        ctx.save_for_backward(c, *W, *a, *d, *before, *errors)
        return *a[1:], *d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        c, *saved = ctx.saved_tensors
        depth = (len(saved) + 2) // 5
        last, at = depth - 1, iter(saved)
        W, a, d = ([next(at) for _ in range(depth)] for _ in range(3))
        before, errors = ([next(at) for _ in range(last)] for _ in range(2))
        chunks, size = W[0].shape[1], a[0].shape[1] // W[0].shape[1]
        gates = [p.sigmoid() for p in before]
        slopes = [g * (1 + p * (1 - g)) for g, p in zip(gates, before, strict=True)]
        bends = [u * g * (1 - g) * (2 + p * (1 - 2 * g)) for u, g, p in zip(errors, gates, before, strict=True)]
        rows = c.repeat_interleave(size, 1)
        like, alike = ([torch.bmm(t, t.mT) for t in side] for side in (a, d[1:]))
        by_a = [torch.zeros_like(a[0]), *(g.clone() for g in grads[:last])]
        by_d = [g.clone() for g in grads[last:]]
        # Gradients of the products with W_l, and with its transpose.
        up, down = [torch.empty_like(t) for t in d], [torch.empty_like(t) for t in a]

        def back(j, g, w, a, d, share, by_a, by_d):
            """What the gradient g of a product, at chunk j, is to its inputs and to what came before."""
            now, old = slice(j * size, (j + 1) * size), slice(0, j * size)
            y = torch.bmm(g, w[:, j].mT)
            if j:
                t = torch.bmm(g, d[:, old].mT).mul_(c[:, j : j + 1, old])
                y.baddbmm_(t, a[:, old], alpha=-1)
                by_a[:, old] -= torch.bmm(t.mT, a[:, now])
                by_d[:, old] -= torch.bmm(share[:, now, old].mT, g)
            by_a[:, now] += y

        shares, reverse = ([t * rows for t in side] for side in (like, alike))
        for j in reversed(range(chunks)):
            now = slice(j * size, (j + 1) * size)
            for i in range(last):
                down[i + 1][:, now] = g = by_d[i][:, now] * slopes[i][:, now]
                back(j, g, W[i + 1].mT, d[i + 1], a[i + 1], reverse[i], by_d[i + 1], by_a[i + 1])
            g = 2 * by_d[last][:, now]
            for i in reversed(range(depth)):
                up[i][:, now] = g
                back(j, g, W[i], a[i], d[i], shares[i], by_a[i], by_d[i])
                if i:
                    g = by_a[i][:, now] * slopes[i - 1][:, now]
                    g.addcmul_(by_d[i - 1][:, now], bends[i - 1][:, now])

        def products(x: Tensor, y: Tensor) -> Tensor:
            return x.unflatten(1, (chunks, size)).mT @ y.unflatten(1, (chunks, size))

        by_c = torch.zeros_like(rows)
        by_W = []
        for i in range(depth):
            by_c.addcmul_(torch.bmm(up[i], d[i].mT), like[i], value=-1)
            by_W.append(products(a[i], up[i]))
            if i:
                by_c.addcmul_(torch.bmm(down[i], a[i].mT), alike[i - 1], value=-1)
                by_W[i] += products(down[i], d[i])
        return by_a[0], -2 * by_d[last], by_c.unflatten(1, (chunks, size)).sum(2), *by_W


class NeuralMemory(nn.Module):
    """(batch, n, dim) -> the same, token after token.

    Args:
        depth: layers L of the MLP; 1 is a matrix.
        expand: its hidden width over head_dim.
        chunk: tokens whose gradients are taken at the same weights.
        kernel: taps of the convolution of queries, keys and values.
    """

    def __init__(self, dim: int, heads: int, *, depth: int, expand: int, chunk: int, kernel: int) -> None:
        super().__init__()
        d = dim // heads
        widths = [d] + [expand * d] * (depth - 1) + [d]
        self.heads, self.chunk, self.taps = heads, chunk, kernel - 1
        self.start = nn.ParameterList(
            torch.randn(heads, widths[i], widths[i + 1]) / widths[i] ** 0.5 for i in range(depth)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = nn.Conv1d(3 * dim, 3 * dim, kernel, groups=3 * dim)
        self.gates = nn.Linear(dim, 3 * heads)
        with torch.no_grad():  # alpha, eta, theta
            self.gates.bias.copy_(torch.tensor([-4.0, 0.0, -4.0]).repeat_interleave(heads))
        self.gate, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)

    def state(self, x: Stream) -> MemoryState:
        """Before the first token."""
        wide = torch.promote_types(x.dtype, torch.float32)
        M = [w.to(wide).expand(x.shape[0], -1, -1, -1) for w in self.start]
        recent = x.new_zeros(x.shape[0], self.taps, 3 * x.shape[2])
        return MemoryState([torch.stack([w, torch.zeros_like(w)], 2) for w in M], M, 0, recent)

    def project(self, x: Stream, keep: Keep | None, recent: Tensor, count: int = 3) -> tuple[list[Heads], Tensor]:
        """The first ``count`` of q, k, v, and the inputs that the next convolutions read."""
        width, wide = count * x.shape[2], torch.promote_types(x.dtype, torch.float32)
        p = F.linear(x, self.qkv.weight[:width])
        p = torch.cat([recent[..., :width], p if keep is None else p.masked_fill(~keep.unsqueeze(-1), 0)], 1)
        # Taps one by one, where tokens lie: a convolution would turn the map around, and back.
        taps = self.conv.weight[:width, 0].unbind(1)
        assert self.conv.bias is not None
        y = self.conv.bias[:width] + p[:, : x.shape[1]] * taps[0]
        for i, tap in enumerate(taps[1:], 1):
            y = torch.addcmul(y, p[:, i : i + x.shape[1]], tap)
        y = F.silu(y).unflatten(2, (count, self.heads, -1)).to(wide)
        q, *rest = (t.transpose(1, 2) for t in y.unbind(2))
        units = [F.normalize(t, dim=-1) for t in (q, *rest[:1])]
        return [*units, *rest[1:]], p[:, p.shape[1] - self.taps :]

    def _gates(self, x: Stream, keep: Keep | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log(1 - alpha), log(eta), theta and what is 0 at masked tokens, (batch, heads, n) each."""
        wide = torch.promote_types(x.dtype, torch.float32)
        alpha, eta, theta = self.gates(x).to(wide).transpose(1, 2).chunk(3, 1)
        stays, flows, theta = F.logsigmoid(-alpha), F.logsigmoid(eta), theta.sigmoid()
        if keep is None:
            return stays, flows, theta, torch.ones_like(theta)
        hidden = ~keep.unsqueeze(1)
        return (
            stays.masked_fill(hidden, 0),
            flows.masked_fill(hidden, 0),
            theta.masked_fill(hidden, 0),
            (keep.unsqueeze(1).to(wide).expand_as(theta)),
        )

    @staticmethod
    def _coefficients(stays: Tensor, flows: Tensor, theta: Tensor, there: Tensor) -> tuple[Tensor, ...]:
        """Of n tokens: c (n, n), m and s (n,), and the decays of S, (n, n)."""
        later = torch.ones(stays.shape[-1], stays.shape[-1], dtype=torch.bool, device=stays.device).triu(1)

        def decay(log: Tensor) -> Tensor:
            total = log.cumsum(-1)
            return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()

        kept, flow = decay(stays) * there.unsqueeze(-2), decay(flows)
        s = (kept @ flows.cumsum(-1).exp().unsqueeze(-1)).squeeze(-1)
        return (kept @ flow) * theta.unsqueeze(-2), stays.cumsum(-1).exp(), s, flow

    def _group(self, q, k, v, stays, flows, theta, there, *weights: Tensor) -> tuple[Tensor, ...]:
        """What is read, then of the last layer its inputs for queries and for keys and its errors, then the weights
        of each layer, M and S, after the last token.

        (batch * heads, n, dim), (batch * heads, n) and (batch * heads, 2, in, out). Inside a group the weights are
        those at its head and what each token has added, as inside a chunk: the errors of a chunk are read through
        those of the chunks before."""
        n, depth = k.shape[1], len(weights)
        c, m, s, flow = self._coefficients(stays, flows, theta, there)
        # Weights at the head of each chunk, and M and S at the end, but for what tokens of the group add.
        both = torch.stack([m, s], -1)
        one = torch.zeros_like(both[:, :1])
        one[..., 0] = 1
        last = torch.stack([torch.zeros_like(m[:, -1:]), flows.sum(1, keepdim=True).exp()], -1)
        rows = torch.cat([one, both[:, self.chunk - 1 : n - 1 : self.chunk], both[:, -1:], last], 1)
        scaled = [torch.bmm(rows, w.flatten(2)).unflatten(2, w.shape[2:]) for w in weights]
        firsts, finals = zip(*(w.split([rows.shape[1] - 2, 2], 1) for w in scaled), strict=True)

        heads = torch.cat([torch.zeros_like(c[:, :1]), c[:, self.chunk - 1 : n - 1 : self.chunk]], 1)
        learned = _Errors.apply(k, v, heads, *firsts)
        known = zip([k, *learned[: depth - 1]], learned[depth - 1 :], strict=True)

        z, y, ends = q, q, []
        ended = torch.stack([c[:, -1], flow[:, -1] * theta], -1).unsqueeze(-1)
        for i, (w, final, (a, d)) in enumerate(zip(weights, finals, known, strict=True)):
            z = q if i == 0 else F.silu(y)
            y = torch.bmm((both.unsqueeze(-1) * z.unsqueeze(2)).flatten(2), w.flatten(1, 2))
            y = torch.baddbmm(y, c * torch.bmm(z, a.mT), d, alpha=-1)
            inputs = (ended * a.unsqueeze(2)).flatten(2)
            ends.append(torch.baddbmm(final.flatten(1, 2), inputs.mT, d, alpha=-1).unflatten(1, (2, -1)))
        return y, z, a, d, *ends

    def _sides(self, x: Stream, keep: Keep | None, state: MemoryState, count: int) -> tuple[list[Heads], MemoryState]:
        """The first ``count`` tensors that groups yield, of all tokens."""
        inputs, recent = self.inputs(x, keep, state.recent)
        return self.scan(inputs, replace(state, recent=recent), count)

    def inputs(self, x: Stream, keep: Keep | None, recent: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v and the gates, and what `project` gives besides."""
        sides, recent = self.project(x, keep, recent)
        return (*sides, *self._gates(x, keep)), recent

    def scan(self, inputs: tuple[Tensor, ...], state: MemoryState, count: int) -> tuple[list[Heads], MemoryState]:
        batch, n = inputs[0].shape[0], inputs[0].shape[2]
        size = max(1, GROUP // self.chunk) * self.chunk
        rest = -n % self.chunk  # what fills the last chunk is as masked tokens are
        flat = (t.flatten(0, 1) for t in inputs)
        whole = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, rest)) if rest else t for t in flat)
        weights, parts = tuple(w.flatten(0, 1) for w in state.both), []
        with torch.autocast(inputs[0].device.type, enabled=False):
            for group in zip(*(t.split(size, 1) for t in whole), strict=True):
                part = recomputed(self._group, *group, *weights)
                parts.append(part[:count])
                weights = tuple(map(_settled, part[4:]))
        both = [w.unflatten(0, (batch, -1)) for w in weights]
        sides = [torch.cat(side, 1)[:, :n].unflatten(0, (batch, -1)) for side in zip(*parts, strict=True)]
        return sides, replace(state, both=both, head=[w[:, :, 0] for w in both])

    def run(self, x: Stream, keep: Keep | None = None, state: MemoryState | None = None) -> tuple[Heads, MemoryState]:
        """M_t(q_t) of all tokens, chunk by chunk from ``state``, which stands at the head of a chunk."""
        (y,), state = self._sides(x, keep, self.state(x) if state is None else state, 1)
        return y, state

    def trace(self, x: Stream, keep: Keep | None = None) -> Trace:
        """What `weights` and `read` are made of."""
        first = self.state(x)
        (_, z, a, error), _ = self._sides(x, keep, first, 4)
        # What the last layer would read had it learned nothing of these tokens; momentum is 0 before the first.
        base = self._gates(x, keep)[0].cumsum(-1).exp().unsqueeze(-1) * (z @ first.M[-1])
        return Trace(z, a, -error / 2, base)

    def retrieve(self, q: Heads, M: Layers) -> Heads:
        """M(q), of weights that stay."""
        for w in M[:-1]:
            q = F.silu(q @ w)
        return q @ M[-1]

    def end(self, y: Heads, x: Stream) -> Stream:
        y = F.rms_norm(y, (y.shape[-1],), eps=1e-6).transpose(1, 2).flatten(2).to(x.dtype)
        return self.out(y * F.silu(self.gate(x)))

    def forward(
        self, x: Stream, keep: Keep | None = None, state: MemoryState | None = None
    ) -> tuple[Stream, MemoryState]:
        y, state = self.run(x, keep, state)
        return self.end(y, x), state

    def weights(self, x: Stream, keep: Keep | None) -> Weights:
        """What a token's surprise adds to later readings."""
        trace = self.trace(x, keep)
        c = self._coefficients(*self._gates(x, keep))[0]
        return (2 * c * (trace.z @ trace.a.transpose(-1, -2))).to(x.dtype)

    def read(self, weights: Weights, x: Stream, keep: Keep | None) -> Stream:
        trace = self.trace(x, keep)
        return self.end(trace.base + weights.to(trace.base.dtype) @ trace.surprise, x)

    def step(self, x: Float[Tensor, "batch 1 dim"], state: MemoryState | None) -> tuple[Stream, MemoryState]:
        """The recurrence itself."""
        state = self.state(x) if state is None else state
        head = state.M if state.place % self.chunk == 0 else state.head
        (q, k, v), recent = self.project(x, None, state.recent)
        stays, flows, theta, _ = (g.unsqueeze(-1) for g in self._gates(x, None))
        flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
        learned = _Errors.apply(
            flat_k, flat_v, flat_k.new_zeros(1, 1, 1), *(w.flatten(0, 1).unsqueeze(1) for w in head)
        )
        a, d = (
            [t.unflatten(0, k.shape[:2]) for t in side]
            for side in ([flat_k, *learned[: len(head) - 1]], learned[len(head) - 1 :])
        )
        S = [
            flows.exp() * old - theta * (a_l.transpose(-1, -2) @ d_l)
            for old, a_l, d_l in zip(state.S, a, d, strict=True)
        ]
        M = [stays.exp() * old + fresh for old, fresh in zip(state.M, S, strict=True)]
        y = self.end(self.retrieve(q, M), x)
        both = [torch.stack(w, 2) for w in zip(M, S, strict=True)]
        return y, MemoryState(both, head, state.place + 1, recent)


@dataclass
class TitansCache:
    """The memory, and keys and values of the persistent tokens, and of the segment or window so far."""

    length: int
    memory: MemoryState
    k: Heads
    v: Heads
    before: Layers | None = None  # of mac: the memory at the head of the segment, and the queries' convolution
    recent: Tensor | None = None


@register(CARD)
class Titans(Mechanism):
    """x (batch, n, dim).

    Args:
        form: "mac", "mag", "mal" or "lmm".
        segment: tokens a segment of mac, a multiple of chunk; of mag and mal the tokens that a query reads.
        persistent: learned tokens that every query sees.
        depth, expand, chunk, kernel: the memory, as for `NeuralMemory`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        form: str = "mac",
        segment: int = 128,
        persistent: int = 4,
        depth: int = 2,
        expand: int = 2,
        chunk: int = 16,
        kernel: int = 4,
    ) -> None:
        super().__init__(dim)
        expect(heads > 0 and dim % (2 * heads) == 0, "dim", dim, f"a multiple of 2 * heads = {2 * heads}")
        expect(form in FORMS, "form", repr(form), f"one of {', '.join(FORMS)}")
        for name, value in {"segment": segment, "depth": depth, "expand": expand, "chunk": chunk}.items():
            expect(value > 0, name, value, "a positive int")
        expect(kernel > 1, "kernel", kernel, "a number above 1")
        expect(form != "mac" or segment % chunk == 0, "segment", segment, f"a multiple of chunk = {chunk}")
        expect(persistent >= 0, "persistent", persistent, "a number >= 0")
        self.heads, self.form, self.segment = heads, form, segment
        self.memory = NeuralMemory(dim, heads, depth=depth, expand=expand, chunk=chunk, kernel=kernel)
        self.sinks = 0 if form == "lmm" else persistent
        self.persistent = nn.Parameter(0.02 * torch.randn(persistent, dim)) if self.sinks else None
        if form != "lmm":
            self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
            self.out = nn.Linear(dim, dim, bias=False)
            self.rope = Rotary(dim // heads)
        self.scale = nn.Parameter(torch.ones(2, dim)) if form in ("mac", "mag") else None

    def _split(self, t: Tensor) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _join(self, y: Heads) -> Stream:
        return self.out(y.transpose(1, 2).flatten(2))

    def _gate(self, a: Stream, b: Stream) -> Stream:
        assert self.scale is not None
        a, b = (F.rms_norm(t, (self.dim,), weight, eps=1e-6) for t, weight in zip((a, b), self.scale, strict=True))
        return a * b.sigmoid()

    def _first(self, x: Stream) -> Stream:
        """Persistent tokens, (batch, sinks, dim)."""
        return x[:, :0] if self.persistent is None else self.persistent.expand(x.shape[0], -1, -1)

    # Attention of mag and mal: a window behind persistent tokens --------------------------------------------------
    def _window(self, x: Stream, keep: Keep | None) -> tuple[Heads, Heads, Heads, Mask]:
        s = torch.cat([self._first(x), x], 1)
        mask: Mask = masks.window(self.segment - 1) | masks.sink(self.sinks)
        if keep is not None:
            mask = mask & masks.keys(F.pad(keep, (self.sinks, 0), value=True))
        q, k = (self.rope.rotate(self._split(f(s))) for f in (self.q, self.k))
        return q, k, self._split(self.v(s)), mask

    def _attend(self, x: Stream, keep: Keep | None) -> Stream:
        q, k, v, mask = self._window(x, keep)
        return self._join(sparse.attend(q, k, v, mask=mask, causal=True)[:, :, self.sinks :])

    def _attention(self, x: Stream, keep: Keep | None) -> Weights:
        q, k, _, mask = self._window(x, keep)
        return dense.weights(q, k, mask=mask, causal=True)[:, :, self.sinks :, self.sinks :]

    def _attention_read(self, weights: Weights, x: Stream, keep: Keep | None) -> Stream:
        q, k, v, mask = self._window(x, keep)
        first = torch.arange(v.shape[2], device=x.device) < self.sinks
        y = dense.attend(q, k, v * first.unsqueeze(1), mask=mask, causal=True)
        return self._join(y[:, :, self.sinks :] + weights @ v[:, :, self.sinks :])

    # Segments of mac --------------------------------------------------------------------------------------------
    def _heads_of(self, x: Stream, offset: int) -> tuple[Heads, Heads, Heads]:
        q, k = (self.rope.rotate(self._split(f(x)), offset=offset) for f in (self.q, self.k))
        return q, k, self._split(self.v(x))

    def _context(self, x: Stream, keep: Keep | None, weights: Weights | None, shown: bool) -> Stream:
        """mac, with ``weights`` in place of its attention if given; or the attention itself if ``shown``."""
        memory, state, outs, n = self.memory, self.memory.state(x), [], x.shape[1]
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        (asks,), _ = again(memory.project, x, keep, state.recent, 1)
        first_k, first_v = (self._split(f(self._first(x))) for f in (self.k, self.v))

        def joined(i: int, ask: Heads, q: Heads, k: Heads, v: Heads, recent: Tensor, *M: Tensor) -> tuple:
            """A segment's attention, which the memory is to learn, and the inputs of that."""
            size = q.shape[2]
            now = slice(i, i + size)
            kept = None if keep is None else keep[:, now]
            told = memory.retrieve(ask, list(M)).transpose(1, 2).flatten(2).to(x.dtype)
            told_k, told_v = self.rope.rotate(self._split(self.k(told)), offset=i), self._split(self.v(told))
            seen = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
            seen = seen if kept is None else seen & kept[:, None, None, :]
            seen = F.pad(torch.cat([seen, seen], -1), (self.sinks, 0), value=True)
            mask = Pairs(seen if seen.dim() == 4 else seen[None, None])
            keys, values = torch.cat([first_k, told_k, k], 2), torch.cat([first_v, told_v, v], 2)
            if weights is None:
                y = dense.attend(q, keys, values, mask=mask)
            else:
                besides = torch.cat([first_v, told_v, torch.zeros_like(v)], 2)
                y = dense.attend(q, keys, besides, mask=mask) + weights[:, :, now, now] @ v
            if shown:
                outs.append(F.pad(dense.weights(q, keys, mask=mask)[..., -size:], (i, n - i - size)))
            y = self._join(y)
            return y, *memory.inputs(y, kept, recent)

        parts = zip(*(t.split(self.segment, 2) for t in (asks, *self._heads_of(x, 0))), strict=True)
        for i, part in enumerate(parts):
            args = (i * self.segment, *part, state.recent, *state.M)
            if shown:
                y, inputs, recent = joined(*args)
            else:
                y, inputs, recent = again(joined, *args)
            (reading,), state = memory.scan(inputs, replace(state, recent=recent), 1)
            if not shown:
                outs.append(again(lambda y, reading: self._gate(y, memory.end(reading, y)), y, reading))
        return torch.cat(outs, 2 if shown else 1)

    # The contract of kind token ---------------------------------------------------------------------------------
    def _forward(self, x, context, how):
        keep = masks.split(how.mask)[1]
        if self.form == "mac":
            return self._context(x, keep, None, shown=False)
        y = self.memory(x, keep)[0]
        if self.form == "lmm":
            return y
        return self._attend(y, keep) if self.form == "mal" else self._gate(self._attend(x, keep), y)

    def _weights(self, x, context, how):
        keep = masks.split(how.mask)[1]
        if self.form == "mac":
            return self._context(x, keep, None, shown=True)
        if self.form == "lmm":
            return self.memory.weights(x, keep)
        if self.form == "mal":
            return self._attention(self.memory(x, keep)[0], keep)
        return torch.cat([self._attention(x, keep), self.memory.weights(x, keep)], 1)

    def _read(self, weights, x, context, how):
        keep = masks.split(how.mask)[1]
        if self.form == "mac":
            return self._context(x, keep, weights, shown=False)
        if self.form == "lmm":
            return self.memory.read(weights, x, keep)
        if self.form == "mal":
            return self._attention_read(weights, self.memory(x, keep)[0], keep)
        a, b = weights.split(self.heads, 1)
        return self._gate(self._attention_read(a, x, keep), self.memory.read(b, x, keep))

    def _step(self, x, cache, context, how):
        state: Any = None if cache is None else cache.memory
        length = 0 if cache is None else cache.length
        if self.form == "mac":
            return self._context_step(x, cache)
        remembered = None
        if self.form != "mag":
            remembered, state = self.memory.step(x, state)
        if self.form == "lmm":
            none = x[:, :0]
            return remembered, TitansCache(length + 1, state, none, none)
        s = x if remembered is None else remembered
        if cache is None:
            first = self._first(x)
            _, k, v = self._heads_of(first, 0)
        else:
            # Of a full window the oldest token, behind the persistent ones, goes.
            full = cache.k.shape[2] == self.sinks + self.segment
            k, v = (torch.cat([t[:, :, : self.sinks], t[:, :, self.sinks + full :]], 2) for t in (cache.k, cache.v))
        q, k_now, v_now = self._heads_of(s, self.sinks + length)
        k, v = torch.cat([k, k_now], 2), torch.cat([v, v_now], 2)
        y = self._join(dense.attend(q, k, v))
        if self.form == "mag":
            remembered, state = self.memory.step(x, state)
            y = self._gate(y, remembered)
        return y, TitansCache(length + 1, state, k, v)

    def _context_step(self, x: Stream, cache: TitansCache | None) -> tuple[Stream, TitansCache]:
        memory, length = self.memory, 0 if cache is None else cache.length
        state = memory.state(x) if cache is None else cache.memory
        recent = state.recent if cache is None else cache.recent
        assert recent is not None
        (asks,), recent = memory.project(x, None, recent, 1)
        if cache is None or length % self.segment == 0:
            before = state.M
            k, v = (self._split(f(self._first(x))) for f in (self.k, self.v))
        else:
            k, v = cache.k, cache.v
            before = state.M if cache.before is None else cache.before
        told = memory.retrieve(asks, before).transpose(1, 2).flatten(2).to(x.dtype)
        (q, k_now, v_now), (_, told_k, told_v) = self._heads_of(x, length), self._heads_of(told, length)
        k, v = torch.cat([k, told_k, k_now], 2), torch.cat([v, told_v, v_now], 2)
        y = self._join(dense.attend(q, k, v))
        remembered, state = memory.step(y, state)
        return self._gate(y, remembered), TitansCache(length + 1, state, k, v, before, recent)
