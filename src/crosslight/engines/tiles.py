"""Softmax attention inside a batch of tiles: a few queries on a few keys each, with the log-sum-exp of their scores.

The sparse engine cuts attention into tiles and adds their results up; this module is the arithmetic of one batch of
tiles and its gradient. Queries come already scaled. Shapes, with s key/value heads and g query heads to each:

    q, out          (s, tiles, g, rows, dim)
    k, v            (s, tiles, keys, dim)
    hide, lse       broadcastable to (s, tiles, g, rows, keys), and (s, tiles, g, rows)
"""

from __future__ import annotations

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
    #: a row of -inf is NaN; and a sum is many times faster than a boolean fill.
    floor: Tensor
    #: Rows with nothing to read, (..., rows, 1).
    empty: Tensor

    @classmethod
    def of(cls, visible: Tensor, dtype: torch.dtype) -> Hidden:
        hidden = ~visible
        return cls(hidden.to(dtype).mul_(torch.finfo(dtype).min / 2), hidden.all(-1, keepdim=True))


def _probabilities(q: Tensor, k: Tensor, hidden: Hidden | None) -> tuple[Tensor, Tensor]:
    """Scores and their softmax, (s * tiles, g * rows, keys). Empty rows come out uniform."""
    scores = torch.bmm(q.flatten(2, 3).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    if hidden is not None:
        scores.view(*q.shape[:4], -1).add_(hidden.floor)
    return scores, scores.softmax(-1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden | None, want_lse: bool = True, into: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention inside each tile, and the log-sum-exp of each row. Empty rows give 0 and -inf.

    ``into`` (s * tiles, g * rows, dim) is where the output is written, if given.
    """
    scores, weights = _probabilities(q, k, hidden)
    out = torch.bmm(weights, v.flatten(0, 1), out=into).view(*q.shape[:4], v.shape[-1])
    lse = None
    if want_lse:
        lse = (scores.amax(-1) - weights.amax(-1).log_()).view(q.shape[:4])
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
    grad: Tensor,
    delta: Tensor,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the scaled q, k and v; ``into`` as in `forward`, for that by q.

    ``grad`` is the gradient by the tile's output. ``delta`` (s, tiles, g, rows) is what each row subtracts: the sum of
    grad * out over the channels, less the gradient by the log-sum-exp. Where a row's keys are spread over several
    tiles, out is that of the whole row, and both are weighted with the share of the row that this tile holds.
    """
    if hidden is not None:
        grad, delta = grad.masked_fill(hidden.empty, 0.0), delta.masked_fill(hidden.empty.squeeze(-1), 0.0)
    _, weights = _probabilities(q, k, hidden)
    flat_q, flat_grad = q.flatten(2, 3).flatten(0, 1), grad.flatten(2, 3).flatten(0, 1)
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    grad_v = torch.bmm(weights.transpose(1, 2), flat_grad)
    by_score = torch.bmm(flat_grad, flat_v.transpose(1, 2)).sub_(delta.reshape(*flat_grad.shape[:2], 1))
    by_score.mul_(weights)
    grad_q = torch.bmm(by_score, flat_k, out=into)
    grad_k = torch.bmm(by_score.transpose(1, 2), flat_q)
    return grad_q.view_as(q), grad_k.view_as(k), grad_v.view(*k.shape[:3], -1)
