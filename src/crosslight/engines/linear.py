"""Linear attention: a product of features in place of a normalised score, so that the keys and values can be summed
up before any query arrives.

    out_i = phi(q_i) sum_j D_ij phi(k_j)^T v_j        optionally divided by  phi(q_i) sum_j D_ij phi(k_j)^T

The features are made outside; ``q`` and ``k`` here are phi(q) and phi(k). ``D`` is one everywhere, or with
``causal`` a decay over the tokens between j and i, in one of three forms given as logarithms, none positive:

    (heads,)                    a constant a head:        D_ij = exp((i - j) g)
    (batch, heads, n)           a scalar a token:         D_ij = exp(g_{j+1} + ... + g_i)
    (batch, heads, n, dim)      a vector a token:         the same in each channel of the features

Causal attention goes in chunks: inside a chunk by scores, between chunks by a state (dim, value_dim) a head, which a
scan carries on. Only differences of log-decays are exponentiated, so every factor is at most one. Chunks are taken in
segments that fit into a processor's cache; only the state at the head of each segment is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crosslight.engines.backend import forced
from crosslight.engines.dense import repeat_heads
from crosslight.engines.recurrent import scan
from crosslight.errors import expect

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Query = Float[Tensor, "batch heads n dim"]
    Key = Float[Tensor, "batch kv_heads m dim"]
    Value = Float[Tensor, "batch kv_heads m value_dim"]

#: Tokens in a chunk: as wide as a usual head, where scores, states and values take about the same memory.
CHUNK = 64
#: Elements of the queries, over batch and heads, in a segment: what stays in the cache of a processor. Accelerators
#: get segments 64 times as long.
SEGMENT = 1 << 19


def weights(
    q: Query,
    k: Key,
    *,
    causal: bool = False,
    keep: Bool[Tensor, "batch m"] | None = None,
    log_decay: Tensor | None = None,
    normalise: bool = False,
) -> Float[Tensor, "batch heads n m"]:
    """The matrix that `attend` stands for."""
    k = _kept(repeat_heads(k, q.shape[1]), keep)
    n = q.shape[2]
    _check(q, k, causal, log_decay)
    if log_decay is not None and log_decay.dim() == 4:
        size = 1 << (n - 1).bit_length()
        q, k, g = (F.pad(t, (0, 0, 0, size - n)) for t in (q, k, log_decay))
        a = _dyadic(q, k, _wide(g).cumsum(2))[..., :n, :n]
    else:
        a = q @ k.transpose(-1, -2)
        if causal:
            a = a.tril() if log_decay is None else a * _within(_cumulative(log_decay, n)).to(a.dtype)
        elif log_decay is not None:
            i = torch.arange(n, device=q.device)
            a = a * ((i[:, None] - i).abs() * log_decay.view(-1, 1, 1)).exp().to(a.dtype)
    return _divided(a, a.sum(-1, keepdim=True)) if normalise else a


def attend(
    q: Query,
    k: Key,
    v: Value,
    *,
    causal: bool = False,
    keep: Bool[Tensor, "batch m"] | None = None,
    log_decay: Tensor | None = None,
    normalise: bool = False,
) -> Float[Tensor, "batch heads n value_dim"]:
    """weights(q, k) @ v in time and memory linear in n and m.

    Args:
        q, k: features, (batch, heads, n, dim) and (batch, kv_heads, m, dim); heads is a multiple of kv_heads.
        causal: query i reads keys j <= i, and n = m.
        keep: key padding, True = may be read.
        log_decay: see the head of this module. Without ``causal`` only a constant a head, over |i - j|.
        normalise: divide by the sum of the row's weights, for features that are not negative. A row whose sum is
            zero stays zero.
    """
    expect(forced() in ("auto", "reference", "chunked"), "backend", repr(forced()), "'reference' or 'chunked'")
    _check(q, k, causal, log_decay)
    if forced() == "reference":
        how = {"causal": causal, "keep": keep, "log_decay": log_decay, "normalise": normalise}
        return weights(q, k, **how) @ repeat_heads(v, q.shape[1])  # type: ignore[arg-type]
    k = _kept(k, keep)
    if normalise:  # the sum of the weights is what they read from a value of one
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if causal:
        out = _causal(q, k, v, log_decay)
    elif log_decay is not None:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        back = _causal(q.flip(2), k.flip(2), v.flip(2), log_decay).flip(2)
        out = _causal(q, k, v, log_decay) + back - (q * k).sum(-1, keepdim=True) * v
    else:
        out = q @ repeat_heads(k.transpose(-1, -2) @ v, q.shape[1])
    return _divided(out[..., :-1], out[..., -1:]) if normalise else out


@dataclass
class LinearState:
    """What causal linear attention carries from token to token: as large after a million tokens as after one."""

    S: Float[Tensor, "batch heads dim value_dim"]
    z: Float[Tensor, "batch heads dim"] | None
    length: int

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.S, self.z) if t is not None)


def step(
    q: Float[Tensor, "batch heads 1 dim"],
    k: Float[Tensor, "batch kv_heads 1 dim"],
    v: Float[Tensor, "batch kv_heads 1 value_dim"],
    state: LinearState | None,
    *,
    log_decay: Tensor | None = None,
    normalise: bool = False,
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], LinearState]:
    """Causal attention of the next token; ``state`` is None at the first. Arguments as of `attend`, with n = 1."""
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    wide = torch.promote_types(q.dtype, torch.float32)
    k_wide = k.to(wide)
    # Not a matrix product, which autocast would put into half precision.
    S, z = k_wide.transpose(-1, -2) * v.to(wide), k_wide.squeeze(2) if normalise else None
    if state is not None:
        old, old_z = state.S, state.z
        if log_decay is not None:
            g = log_decay.to(wide).exp()
            # (heads,) -> (heads, 1, 1); (batch, heads, 1) -> (batch, heads, 1, 1); (.., 1, dim) -> (.., dim, 1)
            fade = g.view(-1, 1, 1) if g.dim() == 1 else g.unsqueeze(-1) if g.dim() == 3 else g.transpose(-1, -2)
            old, old_z = fade * old, None if old_z is None else fade.squeeze(-1) * old_z
        S, z = S + old, None if z is None or old_z is None else z + old_z
    out = q.to(wide) @ S
    if z is not None:
        out = _divided(out, (q.to(wide) * z.unsqueeze(2)).sum(-1, keepdim=True))
    return out.to(q.dtype), LinearState(S, z, 1 if state is None else state.length + 1)


def _check(q: Tensor, k: Tensor, causal: bool, log_decay: Tensor | None) -> None:
    expect(
        not (causal or log_decay is not None) or q.shape[2] == k.shape[2],
        "k",
        f"{k.shape[2]} tokens",
        f"the {q.shape[2]} of q, as attention is causal or decays",
    )
    if log_decay is not None:
        shapes: tuple[tuple[int, ...], ...] = ((q.shape[1],),)
        if causal:
            shapes += (tuple(q.shape[:3]), tuple(q.shape))
        expect(
            tuple(log_decay.shape) in shapes, "log_decay", tuple(log_decay.shape), " or ".join(str(s) for s in shapes)
        )


def _kept(k: Tensor, keep: Tensor | None) -> Tensor:
    return k if keep is None else k.masked_fill(~keep[:, None, :, None], 0)


def _divided(out: Tensor, total: Tensor) -> Tensor:
    return out / torch.where(total == 0, 1, total)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _times(t: Tensor, factor: Tensor | None) -> Tensor:
    return t if factor is None else t * factor.to(t.dtype)


def _faded_by(log: Tensor) -> Tensor:
    """exp(log), zero where it is next to nothing: subnormal numbers slow a processor's products down tenfold."""
    return F.threshold(log.exp(), 1e4 * torch.finfo(log.dtype).tiny, 0.0)


def _cumulative(log_decay: Tensor, n: int) -> Tensor:
    """Log-decay from the start up to each token: (heads, n) or (batch, heads, n)."""
    g = _wide(log_decay)
    if g.dim() == 1:
        return g[:, None] * torch.arange(1, n + 1, device=g.device)
    return g.cumsum(2)


def _within(total: Float[Tensor, "*c n"]) -> Float[Tensor, "*c n n"]:
    """D_ij = exp(total_i - total_j) for j <= i, else 0."""
    n = total.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=total.device).triu(1)
    return _faded_by((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf))


def _halves(t: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later half of each block of 2 * half rows."""
    first, second = t.unflatten(-2, (-1, 2, half)).unbind(-3)
    return first, second


def _dyadic(q: Tensor, k: Tensor, total: Tensor) -> Float[Tensor, "*c n n"]:
    """Causal scores under a decay a channel, sum_c q_ic k_jc exp(total_ic - total_jc), for n a power of two.

    Blocks of doubling size: the later half of a block reads the earlier half, both scaled to the point between
    them, so that no factor exceeds one whatever the decays, and no (n, n, dim) tensor arises.
    """
    a = (q * k).sum(-1)[..., None, None]
    half = 1
    while half < q.shape[-2]:
        late, early = _faded(q, k, total, half)
        first, second = a.unflatten(-3, (-1, 2)).unbind(-3)
        a = torch.cat([F.pad(first, (0, half)), torch.cat([late @ early.transpose(-1, -2), second], -1)], -2)
        half *= 2
    return a.squeeze(-3)


def _dyadic_backward(da: Tensor, q: Tensor, k: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_dyadic` by q and k."""
    diagonal = da.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dq, dk = diagonal * k, diagonal * q
    da, half = da.unsqueeze(-3), q.shape[-2] // 2
    while half:
        late, early = _faded(q, k, total, half)
        in_late, in_early = _faded(torch.ones_like(q), torch.ones_like(k), total, half)
        block = da[..., half:, :half]
        zero = torch.zeros_like(late)
        dq = dq + torch.stack([zero, (block @ early) * in_late], -3).flatten(-4, -2)
        dk = dk + torch.stack([(block.transpose(-1, -2) @ late) * in_early, zero], -3).flatten(-4, -2)
        da = torch.stack([da[..., :half, :half], da[..., half:, half:]], -3).flatten(-4, -3)
        half //= 2
    return dq, dk


def _faded(q: Tensor, k: Tensor, total: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Queries of later halves and keys of earlier halves, scaled to the last token of the earlier half."""
    first, second = _halves(total, half)
    edge = first[..., -1:, :]
    return _times(_halves(q, half)[1], _faded_by(second - edge)), _times(_halves(k, half)[0], _faded_by(edge - first))


def _causal(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return _Causal.apply(q, k, v, None if log_decay is None else _wide(log_decay))


class _Segment:
    """Some chunks of the sequence, (batch, heads, chunks, size, ...), with the factors of their decay:

    within (size x size), `into` the state at the end of a chunk, `out_of` that at its head, `across` the chunk.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, size: int) -> None:
        self.n = q.shape[2]
        self.q, self.k, self.v = (_chunked(t, size) for t in (q, k, v))
        self.total: Tensor | None = None
        self.within: Tensor | None = None
        self.into: Tensor | None = None
        self.out_of: Tensor | None = None
        self.across: Tensor | None = None
        if g is None:
            return
        chunks = self.q.shape[2]
        if g.dim() == 4:
            total = self.total = _chunked(g, size).cumsum(-2)
            last = total[..., -1:, :]
            self.into, self.out_of = _faded_by(last - total), _faded_by(total)
            self.across = _faded_by(last).transpose(-1, -2)
        else:
            total = _cumulative(g, size)[None, :, None] if g.dim() == 1 else _chunked(g, size).cumsum(-1)
            last = total[..., -1:]
            self.within = _within(total)
            self.into, self.out_of = _faded_by(last - total).unsqueeze(-1), _faded_by(total).unsqueeze(-1)
            self.across = _faded_by(last).unsqueeze(-1).expand(-1, -1, chunks, -1, -1)

    def scores(self) -> Tensor:
        if self.total is not None:
            return _dyadic(self.q, self.k, self.total)
        scores = self.q @ self.k.transpose(-1, -2)
        return scores.tril() if self.within is None else _times(scores, self.within)

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state at the head of each chunk, from that at the head of the segment, and the one at its end."""
        fresh = (_times(self.k, self.into).transpose(-1, -2) @ self.v).to(state.dtype)
        if self.across is None:
            after = fresh.cumsum(2) + state.unsqueeze(2)
        else:
            after = scan(self.across.to(state.dtype), fresh, dim=2, initial=state)
        return torch.cat([state.unsqueeze(2), after[:, :, :-1]], 2), after[:, :, -1]

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        heads_of, state = self.states(state)
        out = self.scores() @ self.v + _times(self.q, self.out_of) @ heads_of.to(self.q.dtype)
        return _flat(out, self.n), state

    def backward(self, grad: Tensor, state: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients by q, k, v and by the state at the head, from those of the output and of the state at the end."""
        q, k, v, grad = self.q, self.k, self.v, _chunked(grad, self.q.shape[3])
        heads_of = self.states(state)[0].to(q.dtype)
        fresh = (_times(q, self.out_of).transpose(-1, -2) @ grad).to(state.dtype).flip(2)
        if self.across is None:
            before = fresh.cumsum(2) + dstate.unsqueeze(2)
        else:
            before = scan(self.across.flip(2).to(state.dtype), fresh, dim=2, initial=dstate)
        ends = torch.cat([dstate.unsqueeze(2), before[:, :, :-1]], 2).flip(2).to(q.dtype)
        dscores = grad @ v.transpose(-1, -2)
        if self.total is not None:
            dq, dk = _dyadic_backward(dscores, q, k, self.total)
        else:
            dscores = dscores.tril() if self.within is None else _times(dscores, self.within)
            dq, dk = dscores @ k, dscores.transpose(-1, -2) @ q
        dq = dq + _times(grad @ heads_of.transpose(-1, -2), self.out_of)
        dk = dk + _times(v @ ends.transpose(-1, -2), self.into)
        dv = self.scores().transpose(-1, -2) @ grad + _times(k, self.into) @ ends
        return _flat(dq, self.n), _flat(dk, self.n), _flat(dv, self.n), before[:, :, -1]


def _chunked(t: Tensor, size: int) -> Tensor:
    """(batch, heads, n, ...) -> (batch, heads, chunks, size, ...), zeros where the last chunk is not full."""
    rest = -t.shape[2] % size
    t = F.pad(t, (0, 0) * (t.dim() - 3) + (0, rest)) if rest else t.contiguous()
    return t.unflatten(2, (-1, size))


def _flat(t: Tensor, n: int) -> Tensor:
    return t.flatten(2, 3)[:, :, :n]


class _Causal(torch.autograd.Function):
    """Segment by segment, forwards and then backwards in time. For second derivatives use the reference backend."""

    @staticmethod
    def segments(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[slice], int]:
        n, width = q.shape[2], max(k.shape[3], v.shape[3])
        size = min(CHUNK, 1 << (n - 1).bit_length())
        elements = SEGMENT if q.device.type == "cpu" else 64 * SEGMENT
        step = max(1, elements // (q.shape[0] * q.shape[1] * size * width)) * size
        return [slice(i, min(i + step, n)) for i in range(0, n, step)], size

    @staticmethod
    def cut(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, part: slice, size: int) -> _Segment:
        here = g if g is None or g.dim() == 1 else g[:, :, part]
        return _Segment(q[:, :, part], k[:, :, part], v[:, :, part], here, size)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        parts, size = _Causal.segments(q, k, v)
        out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        state = _wide(k.new_zeros(*q.shape[:2], k.shape[3], v.shape[3]))
        states = []
        for part in parts:
            states.append(state)
            out[:, :, part], state = _Causal.cut(q, k, v, g, part, size).forward(state)
        ctx.save_for_backward(q, k, v, g, *states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, *states = ctx.saved_tensors
        parts, size = _Causal.segments(q, k, v)
        dq, dk, dv, dstate = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.zeros_like(states[0])
        for part, state in zip(reversed(parts), reversed(states), strict=True):
            segment = _Causal.cut(q, k, v, g, part, size)
            dq[:, :, part], dk[:, :, part], dv[:, :, part], dstate = segment.backward(grad[:, :, part], state, dstate)
        if g is None or not ctx.needs_input_grad[3]:
            return dq, dk, dv, None
        # The output depends on differences of the cumulative log-decay alone: D_ij = exp(G_i - G_j).
        dg = _wide(q) * dq - _wide(k) * dk
        dg = (dg if g.dim() == 4 else dg.sum(-1)).flip(2).cumsum(2).flip(2)
        return dq, dk, dv, dg.sum((0, 2)) if g.dim() == 1 else dg
