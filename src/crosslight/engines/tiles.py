"""Softmax attention inside a batch of tiles: a few queries on a few keys each, with the log-sum-exp of their scores.

The sparse engine cuts attention into tiles and adds their results up; this module is the arithmetic of one batch of
tiles and its gradient. Shapes, with s key/value heads and g query heads to each:

    q, out          (s, tiles, g, rows, dim)
    k, v            (s, tiles, keys, dim)
    hide, lse       broadcastable to (s, tiles, g, rows, keys), and (s, tiles, g, rows)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and sums are kept in at least float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Hidden:
    """Which pairs of a tile may not be read, ready to be added to scores."""

    #: 0 where a key may be read, else a number so low that its weight is exactly zero. It is finite, as the softmax of
    #: a row of -inf is NaN; and a sum is many times faster than a boolean fill. It may end before the last keys, if
    #: these are read by all.
    floor: Tensor
    #: Rows with nothing to read, (..., rows, 1).
    empty: Tensor

    @classmethod
    def of(cls, visible: Tensor, dtype: torch.dtype) -> Hidden:
        hidden = ~visible
        return cls(hidden.to(dtype).mul_(torch.finfo(dtype).min / 2), hidden.all(-1, keepdim=True))


class Room:
    """Memory that the chunks of a call use in turn, by name: fresh pages cost more than what is computed in them.

    What comes out of it holds until the name is asked for again.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An empty tensor with the dtype and device of ``like``."""
        size, held = math.prod(shape), self._held.get(name)
        if held is None or held.shape[0] < size or held.dtype != like.dtype:
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(shape)

    def bmm(self, name: str, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """scale * a b."""
        return _bmm(a, b, self.take(name, a, a.shape[0], a.shape[1], b.shape[2]), scale)

    def rows(self, name: str, table: Tensor, index: Tensor) -> Tensor:
        """table[index] along the first dimension."""
        return torch.index_select(table, 0, index, out=self.take(name, table, index.shape[0], *table.shape[1:]))


def _bmm(a: Tensor, b: Tensor, out: Tensor, scale: float) -> Tensor:
    """A product takes its factor along; queries that were scaled before would be a pass over fresh memory."""
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _scores(q: Tensor, k: Tensor, hidden: Hidden | None, room: Room, scale: float) -> Tensor:
    """(s * tiles, g * rows, keys)."""
    scores = room.bmm("scores", q.flatten(2, 3).flatten(0, 1), k.flatten(0, 1).transpose(1, 2), scale)
    if hidden is not None:
        scores.view(*q.shape[:4], -1)[..., : hidden.floor.shape[-1]].add_(hidden.floor)
    return scores


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Hidden | None,
    room: Room,
    want_lse: bool = True,
    into: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Attention inside each tile, and the log-sum-exp of each row. Empty rows give 0 and -inf.

    ``into`` (s * tiles, g * rows, dim) is where the output is written, if given.
    """
    weights = _scores(q, k, hidden, room, scale)
    if hidden is None or want_lse:
        top = weights.amax(-1, keepdim=True)
    if hidden is None:  # in place, and divided where there are fewer numbers: faster than softmax
        total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    else:  # exp alone is slow where it underflows
        weights = torch.softmax(weights, -1, out=room.take("weights", weights, *weights.shape))
        if want_lse:
            total = weights.amax(-1, keepdim=True).reciprocal_()
    if into is None:
        into = room.take("out", weights, *weights.shape[:2], v.shape[-1])
    out = torch.bmm(weights, v.flatten(0, 1), out=into)
    if hidden is None:
        out.div_(total)
    out = out.view(*q.shape[:4], v.shape[-1])
    lse = (top + total.log_()).view(q.shape[:4]) if want_lse else None
    if hidden is not None:
        out.masked_fill_(hidden.empty, 0.0)
        if lse is not None:
            lse.masked_fill_(hidden.empty.squeeze(-1), -torch.inf)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Hidden | None,
    room: Room,
    grad: Tensor,
    delta: Tensor,
    lse: Tensor | None = None,
    into: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, in this room; ``into`` as in `forward`, for that by q.

    ``grad`` is the gradient by the tile's output. ``delta`` (s, tiles, g, rows) is what each row subtracts: the sum of
    grad * out over the channels, less the gradient by the log-sum-exp. Where a row's keys are spread over several
    tiles, out and ``lse`` (s, tiles, g, rows) are those of the whole row; inf for rows that take no part. Without
    ``lse`` the tile holds whole rows.
    """
    weights = _scores(q, k, hidden, room, scale)
    if lse is None:
        weights = torch.softmax(weights, -1, out=room.take("weights", weights, *weights.shape))
        if hidden is not None:
            grad, delta = grad.masked_fill(hidden.empty, 0.0), delta.masked_fill(hidden.empty.squeeze(-1), 0.0)
    else:
        weights.sub_(lse.reshape(*weights.shape[:2], 1))
        if hidden is None:
            weights.exp_()
        else:  # zero again what was hidden, without an exp that underflows
            least = 0.9 * math.log(torch.finfo(weights.dtype).tiny)
            torch.threshold_(weights.clamp_(min=least).exp_(), 2 * math.exp(least), 0.0)
    flat_q, flat_grad = q.flatten(2, 3).flatten(0, 1), grad.flatten(2, 3).flatten(0, 1)
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    grad_v = room.bmm("grad_v", weights.transpose(1, 2), flat_grad)
    by_score = room.bmm("by_score", flat_grad, flat_v.transpose(1, 2))
    by_score.sub_(delta.reshape(*flat_grad.shape[:2], 1)).mul_(weights)
    if into is None:
        into = room.take("grad_q", flat_q, *flat_q.shape)
    grad_q = _bmm(by_score, flat_k, into, scale)
    grad_k = room.bmm("grad_k", by_score.transpose(1, 2), flat_q, scale)
    return grad_q.view_as(q), grad_k.view_as(k), grad_v.view(*k.shape[:3], -1)
