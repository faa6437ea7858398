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
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse
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

FORMS = ("mac", "mag", "mal", "lmm")


@dataclass
class MemoryState:
    """The memory's weights, their momentum, the weights at the head of the chunk, the tokens since, and the last
    inputs of the convolution."""

    M: Layers
    S: Layers
    head: Layers
    place: int
    recent: Float[Tensor, "batch taps dim3"]


@dataclass
class Trace:
    """What reading left behind: input z of the last layer for queries, a for keys, surprise, and its coefficients."""

    z: Heads
    a: Heads
    surprise: Heads
    base: Heads


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
        return MemoryState(M, [torch.zeros_like(w) for w in M], M, 0, recent)

    def project(self, x: Stream, keep: Keep | None, recent: Tensor) -> tuple[Heads, Heads, Heads, Tensor]:
        """q, k, v, and the inputs that the next convolutions read."""
        p = self.qkv(x)
        p = torch.cat([recent, p if keep is None else p.masked_fill(~keep.unsqueeze(-1), 0)], 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.silu(self.conv(p.transpose(1, 2))).unflatten(1, (3 * self.heads, -1)).transpose(2, 3).to(wide)
        q, k, v = y.chunk(3, 1)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, p[:, p.shape[1] - self.taps :]

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

    def errors(self, W: Layers, k: Heads, v: Heads) -> tuple[Layers, Layers]:
        """Inputs a and errors d of each layer: the gradient of the loss by W_l at a token is a^T d."""
        a, before = [k], []
        for w in W[:-1]:
            before.append(a[-1] @ w)
            a.append(F.silu(before[-1]))
        d = [2 * (a[-1] @ W[-1] - v)]
        for w, p in zip(reversed(W[1:]), reversed(before), strict=True):
            gate = p.sigmoid()
            d.insert(0, (d[0] @ w.transpose(-1, -2)) * gate * (1 + p * (1 - gate)))
        return a, d

    def _chunk(
        self, state: MemoryState, q: Heads, k: Heads, v: Heads, gates: tuple[Tensor, ...]
    ) -> tuple[Heads, Heads, Heads, Heads, MemoryState]:
        """What is read, then of the last layer its inputs for queries and for keys and its errors."""
        c, m, s, flow = self._coefficients(*gates)
        a, d = self.errors(state.M, k, v)
        z, y = q, q
        for i, (w, momentum) in enumerate(zip(state.M, state.S, strict=True)):
            z = q if i == 0 else F.silu(y)
            y = m.unsqueeze(-1) * (z @ w) + s.unsqueeze(-1) * (z @ momentum) - (c * (z @ a[i].transpose(-1, -2))) @ d[i]
        theta, M, S = gates[2], [], []
        for w, momentum, a_l, d_l in zip(state.M, state.S, a, d, strict=True):
            at = a_l.transpose(-1, -2)
            old, fresh = (t[..., -1, None, None] for t in (m, s))
            M.append(old * w + fresh * momentum - (at * c[..., -1, None, :]) @ d_l)
            flown = gates[1].sum(-1).exp()[..., None, None]
            S.append(flown * momentum - (at * (flow[..., -1, :] * theta).unsqueeze(-2)) @ d_l)
        return y, z, a[-1], d[-1], replace(state, M=M, S=S, head=M)

    def _sides(self, x: Stream, keep: Keep | None, state: MemoryState, count: int) -> tuple[list[Heads], MemoryState]:
        """The first ``count`` tensors that chunks yield, of all tokens."""
        q, k, v, recent = self.project(x, keep, state.recent)
        gates, parts = self._gates(x, keep), []
        for i in range(0, x.shape[1], self.chunk):
            now = slice(i, i + self.chunk)
            here = q[:, :, now], k[:, :, now], v[:, :, now]
            *part, state = self._chunk(state, *here, tuple(g[..., now] for g in gates))
            parts.append(part[:count])
        return [torch.cat(side, 2) for side in zip(*parts, strict=True)], replace(state, recent=recent)

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
        q, k, v, recent = self.project(x, None, state.recent)
        stays, flows, theta, _ = (g.unsqueeze(-1) for g in self._gates(x, None))
        a, d = self.errors(head, k, v)
        S = [
            flows.exp() * old - theta * (a_l.transpose(-1, -2) @ d_l)
            for old, a_l, d_l in zip(state.S, a, d, strict=True)
        ]
        M = [stays.exp() * old + fresh for old, fresh in zip(state.M, S, strict=True)]
        y = self.end(self.retrieve(q, M), x)
        return y, MemoryState(M, S, head, state.place + 1, recent)


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
        asks = memory.project(x, keep, state.recent)[0]
        first_k, first_v = (self._split(f(self._first(x))) for f in (self.k, self.v))
        for i in range(0, n, self.segment):
            now = slice(i, min(i + self.segment, n))
            part, kept = x[:, now], None if keep is None else keep[:, now]
            told = memory.retrieve(asks[:, :, now], state.M).transpose(1, 2).flatten(2).to(x.dtype)
            (q, k, v), (_, told_k, told_v) = self._heads_of(part, i), self._heads_of(told, i)
            size = part.shape[1]
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
                a = dense.weights(q, keys, mask=mask)[..., -size:]
                outs.append(F.pad(a, (i, n - i - size)))
            y = self._join(y)
            remembered, state = memory(y, kept, state)
            if not shown:
                outs.append(self._gate(y, remembered))
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
        asks, _, _, recent = memory.project(x, None, recent)
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
