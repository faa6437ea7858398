"""Which implementation an engine uses. Semantics never depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from crosslight.errors import expect

Backend = Literal["auto", "reference", "sdpa", "flex", "gather", "chunked"]
#: A module variable, as torch.compile can guard on it (it cannot trace a ContextVar).
_forced: Backend = "auto"


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force every engine to one backend inside the block.

    ``reference`` is the plain matrix form in any dtype; ``sdpa`` scaled_dot_product_attention; ``flex``
    FlexAttention; ``gather`` block gather + SDPA; ``chunked`` chunks without an L x L tensor. An engine that lacks
    the forced backend for a call raises a `CrosslightError`.
    """
    expect(name in get_args(Backend), "backend", repr(name), f"one of {', '.join(get_args(Backend))}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> Backend:
    return _forced
