"""Sparse attention: softmax over the pairs that a mask lets through, at a cost that follows their number.

`attend` runs the tiles that a planner found (`engines.plans`), `engines.routed` the blocks that each query chose, and
`merge` joins attention over disjoint sets of keys. On CPU the tiles are cut out of the sequence, in place where they
are evenly spaced, and go through batched matrix products chunk by chunk; the backward pass computes them again, so that
nothing of the size of the matrix is ever kept. On CUDA the plan becomes the block mask of FlexAttention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslight.engines import dense, masks, tiles
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask
from crosslight.engines.plans import Part, plan
from crosslight.errors import CrosslightError

if TYPE_CHECKING:
    from jaxtyping import Float

    Query = Float[Tensor, "batch heads n dim"]
    Key = Float[Tensor, "batch kv_heads m dim"]
    Value = Float[Tensor, "batch kv_heads m value_dim"]
    Out = Float[Tensor, "batch heads n value_dim"]
    LSE = Float[Tensor, "batch heads n"]

__all__ = ["attend", "attend_with_lse", "merge", "pays", "plan"]

#: Scores that are held at a time: they should fit in a core's cache.
CHUNK = 1 << 20
#: Below this many pairs the dense way is fast whatever the mask.
SMALL = 1 << 20
#: Up to this many pairs even what has to be sparse is computed densely: tiles cost more calls than they save work.
TINY = 1 << 14
#: A plan pays where it computes less than this share of all pairs.
SHARE = 0.6


def pays(mask: Mask | None, causal: bool, n: int, m: int) -> bool:
    """Whether softmax under this mask is faster here than densely: long, with a structure that leaves most out."""
    if forced() != "auto":
        return forced() in ("gather", "flex") and (mask is not None or causal)
    if mask is None or n * m < SMALL:
        return False
    if torch.compiler.is_compiling():
        # What tensors hold is not known while tracing.
        mask = masks.join(*[term for term in mask.terms() if not masks.pack(term)[1]])
        return mask is not None and _area(masks.pack(mask)[0], causal, n, m) < SHARE * n * m
    return plan(mask, causal, n, m).area < SHARE * n * m


@torch.compiler.assume_constant_result
def _area(text: str, causal: bool, n: int, m: int) -> int:
    return plan(masks.unpack(text, []), causal, n, m).area


def attend(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Out:
    """softmax(q k^T * scale) v over the visible pairs; a query with none gets zero.

    Args:
        q, k, v: (batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, value_dim); heads is a
            multiple of kv_heads.
        causal: query i reads keys j <= i.
        scale: 1/sqrt(dim) unless given.
    """
    if forced() in ("reference", "sdpa") or tiny(q, k):
        return dense.attend(q, k, v, mask=mask, causal=causal, scale=scale)
    return _attend(q, k, v, mask, causal, scale, want_lse=False)[0]


def attend_with_lse(
    q: Query, k: Key, v: Value, *, mask: Mask | None = None, causal: bool = False, scale: float | None = None
) -> tuple[Out, LSE]:
    """`attend`, and the log-sum-exp of each query's visible scores (-inf without any), by which `merge` joins parts."""
    return _attend(q, k, v, mask, causal, scale, want_lse=True)


def _attend(q, k, v, mask, causal, scale, want_lse):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    rule = masks.join(masks.Causal() if causal else None, mask)
    if forced() == "reference" or tiny(q, k):
        return _reference(q, k, v, rule, scale)
    if forced() == "flex" or (forced() == "auto" and q.is_cuda):
        from crosslight.engines import flex

        if forced() == "flex" or flex.serves(q, k, v):
            return flex.attend(q, k, v, rule, scale, want_lse)
    if forced() not in ("auto", "gather", "flex"):
        raise CrosslightError(
            f"backend: got {forced()!r}, expected one that sparse attention has: reference, flex, gather"
        )
    # Once here, and not in every pass.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    text, tensors = pack(rule)
    if torch.compiler.is_compiling():
        return _planned_operator(q, k, v, tensors, text, scale, want_lse)
    return _Planned.apply(q, k, v, tensors, text, scale, want_lse)


def tiny(q: Query, k: Key) -> bool:
    """Whether a call is so short that the matrix is the fastest way."""
    return forced() == "auto" and q.shape[2] * k.shape[2] <= TINY


def pack(mask: Mask | None) -> tuple[str, list[Tensor]]:
    """As `masks.pack`; what is kept for the backward pass is a copy, as the caller may change a mask in between."""
    text, tensors = masks.pack(mask)
    return text, [t.clone() for t in tensors] if torch.is_grad_enabled() else tensors


def merge(parts: Sequence[tuple[Out, LSE]]) -> tuple[Out, LSE]:
    """Attention over the union of disjoint sets of keys, of the outputs and log-sum-exps over each of them."""
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -math.inf, 0.0)
    shares = (lses - top).exp()
    total = shares.sum(0)
    empty = total == 0
    shares = shares / total.masked_fill(empty, 1.0)
    out = sum(out * share[..., None].to(out.dtype) for (out, _), share in zip(parts, shares, strict=True))
    return out, (total.masked_fill(empty, 1.0).log() + top).masked_fill(empty, -math.inf)


def _reference(q, k, v, rule, scale):
    scores = dense.scores(q, k, scale=scale)
    keep = dense.visible(q, k, rule, False)
    if keep is None:
        return scores.softmax(-1) @ dense.repeat_heads(v, q.shape[1]), scores.logsumexp(-1)
    empty = ~keep.any(-1).expand(scores.shape[:-1])
    lse = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).logsumexp(-1).masked_fill(empty, -math.inf)
    return dense.softmax(scores, keep) @ dense.repeat_heads(v, q.shape[1]), lse


# The executor -------------------------------------------------------------------------------------------------------


class _Work:
    """One call's tiles, chunk by chunk, with the tensors in the layout that the sides of a plan read:
    (batch * heads, length, dim), contiguous, padded to whole units."""

    def __init__(self, q: Tensor, k: Tensor, text: str, tensors: list[Tensor]) -> None:
        rule = masks.unpack(text, tensors)
        self.batch, self.heads, self.n = q.shape[:3]
        self.kv_heads, self.m = k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.rule, self.plan = rule, plan(rule, False, self.n, self.m)
        self.device, self.dtype = q.device, tiles.working_dtype(q.dtype)

    def flat(self, x: Tensor, unit: int = 1) -> Tensor:
        x = x.flatten(0, 1)
        short = -x.shape[1] % unit
        return F.pad(x, (0, 0, 0, short)) if short else x.contiguous()

    def zeros(self, x: Tensor) -> Tensor:
        """Where sums are gathered for the tokens of ``x``."""
        return torch.zeros_like(x, dtype=self.dtype, memory_format=torch.contiguous_format)

    def queries(self, part: Part, x: Tensor, chunk: tuple[int, int, int, int]) -> Tensor:
        """(s, tiles, g, rows, dim) of x (batch * heads, n, dim)."""
        s0, s1, first, stop = chunk
        taken = part.queries.take(x[s0 * self.group : s1 * self.group], first, stop)
        return taken.unflatten(0, (s1 - s0, self.group)).transpose(1, 2).to(self.dtype)

    def add_queries(self, part: Part, x: Tensor, chunk: tuple[int, int, int, int], y: Tensor) -> None:
        s0, s1, first, stop = chunk
        part.queries.add_(x[s0 * self.group : s1 * self.group], first, stop, y.transpose(1, 2).flatten(0, 1))

    def keys(self, part: Part, x: Tensor, chunk: tuple[int, int, int, int]) -> Tensor:
        """(s, tiles, keys, dim) of x (batch * kv_heads, m, dim)."""
        s0, s1, first, stop = chunk
        return part.keys.take(x[s0:s1], first, stop).to(self.dtype)

    def add_keys(self, part: Part, x: Tensor, chunk: tuple[int, int, int, int], y: Tensor) -> None:
        s0, s1, first, stop = chunk
        part.keys.add_(x[s0:s1], first, stop, y)

    def __iter__(self) -> Iterator[tuple[Part, tuple[int, int, int, int], tiles.Hidden | None]]:
        """Chunks of tiles: their part, (first and last key/value head, first and last tile), and what is hidden."""
        rule, total = self.rule, self.batch * self.kv_heads
        shared = rule is None or rule.shared
        for part in self.plan.parts:
            same = rule is not None and shared and rule.period and part.step and part.step % rule.period == 0
            width = max(1, CHUNK // (part.area * self.group))
            for first in range(0, part.count, width):
                stop = min(first + width, part.count)
                if first == 0 or not same:
                    here = (0, 1) if same else (first, stop)
                    hidden = self._hidden(part, 0, 1, *here) if shared else None
                several = max(1, width // (stop - first))
                for s0 in range(0, total, several):
                    s1 = min(s0 + several, total)
                    if not shared:
                        hidden = self._hidden(part, s0, s1, first, stop)
                    yield part, (s0, s1, first, stop), hidden

    def _hidden(self, part: Part, s0: int, s1: int, first: int, stop: int) -> tiles.Hidden | None:
        if part.whole:
            return None
        i = part.queries.positions(first, stop, self.device)[None, :, None, :, None]
        j = part.keys.positions(first, stop, self.device)[None, :, None, None, :]
        there = (i >= 0) & (j >= 0) & (j < self.m)
        if self.rule is None:
            return tiles.Hidden.of(there, self.dtype)
        s = torch.arange(s0, s1, device=self.device).view(-1, 1, 1, 1, 1)
        b = s // self.kv_heads
        h = s % self.kv_heads * self.group + torch.arange(self.group, device=self.device).view(-1, 1, 1)
        if self.rule.shared:
            b = h = torch.zeros_like(b)
        # Rules may look positions up in tensors, so empty places must be valid ones.
        seen = self.rule.visible(b, h, i.clamp(min=0), j.clamp(min=0, max=self.m - 1))
        return tiles.Hidden.of(seen & there, self.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], text: str, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        work, room = _Work(q, k, text, tensors), tiles.Room()
        flat_q, flat_k = work.flat(q), work.flat(k, work.plan.unit)
        flat_v = work.flat(v, work.plan.unit)
        out = flat_q.new_zeros(*flat_q.shape[:2], v.shape[3], dtype=work.dtype)
        # The log-sum-exp, and whether there is one: rows outside of the plan have none.
        stats = flat_q.new_zeros(*flat_q.shape[:2], 2 if want_lse else 0, dtype=work.dtype)
        for part, chunk, hidden in work:
            args = (work.queries(part, flat_q, chunk), work.keys(part, flat_k, chunk), work.keys(part, flat_v, chunk))
            y, lse = tiles.forward(*args, hidden, room, want_lse, scale=scale)
            work.add_queries(part, out, chunk, y)
            if lse is not None:
                some = lse.isfinite()
                work.add_queries(part, stats, chunk, torch.stack([lse.masked_fill(~some, 0.0), some.to(lse)], -1))
        out = out.to(q.dtype).unflatten(0, q.shape[:2])
        if not want_lse:
            return out, stats.view(0)
        lse, some = stats.unflatten(0, q.shape[:2]).unbind(-1)
        return out, lse.masked_fill(some == 0, -math.inf)


def delta_of(grad: Tensor, out: Tensor, grad_lse: Tensor | None) -> LSE:
    """What each row subtracts in the gradient of its softmax, see `tiles.backward`."""
    dtype, rows = tiles.working_dtype(out.dtype), max(1, CHUNK // max(1, out.shape[2] * out.shape[3]))
    pairs = zip(grad.flatten(0, 1).split(rows), out.flatten(0, 1).split(rows), strict=True)
    delta = torch.cat([torch.linalg.vecdot(g.to(dtype), o.to(dtype)) for g, o in pairs]).view(out.shape[:3])
    return delta if grad_lse is None else delta - grad_lse


def whole_rows(lse: LSE) -> LSE:
    """The log-sum-exps as `tiles.backward` takes them: rows with nothing to read take no part."""
    return lse.masked_fill(lse == -math.inf, math.inf)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    grad: Tensor,
    delta: Tensor,
    text: str,
    scale: float,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; with ``lse`` of `whole_rows`, those of the part that this mask has in rows of more keys."""
    with torch.autocast(q.device.type, enabled=False):
        work, room = _Work(q, k, text, tensors), tiles.Room()
        flat_q, flat_k = work.flat(q), work.flat(k, work.plan.unit)
        flat_v, flat_grad, delta = work.flat(v, work.plan.unit), work.flat(grad), delta.flatten(0, 1)[..., None]
        flat_lse = None if lse is None else lse.flatten(0, 1)[..., None]
        grad_q, grad_k, grad_v = work.zeros(flat_q), work.zeros(flat_k), work.zeros(flat_v)
        for part, chunk, hidden in work:
            args = (work.queries(part, flat_q, chunk), work.keys(part, flat_k, chunk), work.keys(part, flat_v, chunk))
            by = work.queries(part, flat_grad, chunk), work.queries(part, delta, chunk).squeeze(-1)
            rows = None if flat_lse is None else work.queries(part, flat_lse, chunk)
            by_q, by_k, by_v = tiles.backward(*args, hidden, room, *by, rows, scale=scale)
            work.add_queries(part, grad_q, chunk, by_q)
            work.add_keys(part, grad_k, chunk, by_k)
            work.add_keys(part, grad_v, chunk, by_v)
        m = k.shape[2]
        return (
            grad_q.unflatten(0, q.shape[:2]).to(q.dtype),
            grad_k[:, :m].unflatten(0, k.shape[:2]).to(k.dtype),
            grad_v[:, :m].unflatten(0, v.shape[:2]).to(v.dtype),
        )


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, tensors, text, scale, want_lse):
        ctx.set_materialize_grads(False)
        out, lse = forward(q, k, v, tensors, text, scale, want_lse)
        ctx.save_for_backward(q, k, v, out, *tensors)
        ctx.text, ctx.scale = text, scale
        if not want_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad, grad_lse):
        q, k, v, out, *tensors = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(out)
        delta = delta_of(grad, out, grad_lse)
        return *backward(q, k, v, tensors, grad, delta, ctx.text, ctx.scale), None, None, None, None


# While torch.compile traces, the same two functions are operators, so that a graph holds one node for all chunks.


@torch.library.custom_op("crosslight::planned", mutates_args=())
def _planned_operator(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], text: str, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, tensors, text, scale, want_lse)


@_planned_operator.register_fake
def _(q, k, v, tensors, text, scale, want_lse):
    lse = q.new_empty(q.shape[:3] if want_lse else (0,), dtype=tiles.working_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op("crosslight::planned_backward", mutates_args=())
def _planned_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    grad: Tensor,
    delta: Tensor,
    text: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    by_q, by_k, by_v = backward(q, k, v, tensors, grad, delta, text, scale)
    return by_q.contiguous(), by_k.contiguous(), by_v.contiguous()


@_planned_backward.register_fake
def _(q, k, v, tensors, grad, delta, text, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, tensors, text, scale, want_lse = inputs
    ctx.save_for_backward(q, k, v, output[0], *tensors)
    ctx.text, ctx.scale, ctx.want_lse = text, scale, want_lse


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple:
    q, k, v, out, *tensors = ctx.saved_tensors
    delta = delta_of(grad, out, grad_lse if ctx.want_lse else None)
    by = _planned_backward(q, k, v, tensors, grad, delta, ctx.text, ctx.scale)
    return *by, [None] * len(tensors), None, None, None


_planned_operator.register_autograd(_differentiate, setup_context=_keep)
