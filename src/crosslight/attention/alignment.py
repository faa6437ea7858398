"""Alignments that move on from query to query: `Aligned` is the layer around one.

One that is a nonlinear function of the one before is found query after query (`unrolled`): no scan or product of
matrices takes such a recurrence, as it takes no plain RNN. What can be taken for all queries at once is to be taken
before the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.attention.base import How, Mechanism, head_width
from crosslight.engines import dense

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Context = Float[Tensor, "batch m context_dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Keep = Bool[Tensor, "batch m"]
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


@dataclass
class AlignmentCache:
    """The context's values, padding and keys (None where places alone decide), and the state of the alignment."""

    v: Heads
    keep: Keep | None
    state: Tensor
    k: Heads | None = None
    cross: bool = True


class Aligned(Mechanism):
    """W_o [a v] in cross-attention, with an alignment a whose state each query moves on."""

    def __init__(self, dim: int, heads: int, head_dim: int | None, context_dim: int | None, bias: bool) -> None:
        super().__init__(dim, context_dim)
        self.heads, self.head_dim = heads, head_width(dim, heads, head_dim)
        width = heads * self.head_dim
        self.v, self.out = nn.Linear(self.context_dim, width, bias), nn.Linear(width, dim, bias)

    def _start(self, context: Context, how: How) -> AlignmentCache:
        """What is known before the first query."""
        raise NotImplementedError

    def _attend(self, x: Stream, cache: AlignmentCache) -> tuple[Heads, Tensor]:
        """What the queries read, and the state after them."""
        raise NotImplementedError

    def _split(self, t: Tensor) -> Heads:
        return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _merge(self, y: Heads) -> Stream:
        return self.out(y.transpose(1, 2).flatten(2))

    def _forward(self, x, context, how):
        return self._merge(self._attend(x, self._start(context, how))[0])

    def _read(self, weights, x, context, how):
        return self._merge(weights @ self._split(self.v(context)))

    def _step(self, x, cache, context, how):
        cache = self._start(context, how) if cache is None else cache
        y, state = self._attend(x, cache)
        return self._merge(y), AlignmentCache(cache.v, cache.keep, state, cache.k)
