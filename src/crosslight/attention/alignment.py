"""Alignments that are found one query after the other, because each is a nonlinear function of the one before.

No scan or product of matrices takes such a recurrence, as it takes no plain RNN. What can be taken for all queries at
once is to be taken before the loop; what is left is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crosslight.engines import dense

if TYPE_CHECKING:
    from jaxtyping import Float

    Row = Float[Tensor, "batch heads m"]
    Rows = Float[Tensor, "batch heads n m"]
    Out = Float[Tensor, "batch heads n out"]

#: (state, what belongs to the query) -> (the query's row of the attention matrix, the next state).
Advance = Callable[..., "tuple[Row, Tensor]"]


def unrolled(
    advance: Advance, state: Tensor, inputs: tuple[Tensor, ...], read: Callable[[Rows], Out], row: int
) -> tuple[Out, Tensor]:
    """``read`` of the rows that ``advance`` gives query by query, and the state after the last.

    Args:
        inputs: (batch, heads, n, ...) each; ``advance`` gets their slices of one query.
        read: from rows to the output, for some of the queries at a time; what it gives is joined.
        row: elements that one query keeps for the backward pass. Where all of them keep more than `dense.CHUNK`, they
            are taken in chunks, which the backward pass computes anew.
    """

    def part(state: Tensor, *inputs: Tensor) -> tuple[Out, Tensor]:
        rows = []
        for at in zip(*(t.unbind(2) for t in inputs), strict=True):
            found, state = advance(state, *at)
            rows.append(found)
        return read(torch.stack(rows, 2)), state

    n, size = inputs[0].shape[2], max(1, dense.CHUNK // row)
    if size >= n:
        return part(state, *inputs)
    parts = []
    for start in range(0, n, size):
        chunk = tuple(t[:, :, start : start + size] for t in inputs)
        if torch.is_grad_enabled():
            y, state = checkpoint(part, state, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = part(state, *chunk)
        parts.append(y)
    return torch.cat(parts, 2), state
