"""Crosslight: every published way for one stream of tokens to attend to another, behind one contract.

>>> import crosslight
>>> attn = crosslight.create("moba", dim=256, heads=8, block_size=64)  # doctest: +SKIP
>>> y = attn(x, causal=True)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from crosslight import bench, explain, testing
    from crosslight.cards import Card, Evidence
    from crosslight.comparison import compare
    from crosslight.engines.backend import backend
    from crosslight.hosts import insert, steer, swap, watch
    from crosslight.registry import card, create, find, register

#: Rooms load when asked for, so that `import crosslight` stays light.
_HOME = {
    "Card": "cards",
    "Evidence": "cards",
    "backend": "engines.backend",
    "card": "registry",
    "compare": "comparison",
    "create": "registry",
    "find": "registry",
    "insert": "hosts",
    "register": "registry",
    "steer": "hosts",
    "swap": "hosts",
    "watch": "hosts",
}
_ROOMS = {"bench", "explain", "testing"}

__all__ = [
    "Card",
    "Evidence",
    "backend",
    "bench",
    "card",
    "compare",
    "create",
    "explain",
    "find",
    "insert",
    "register",
    "steer",
    "swap",
    "testing",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"crosslight.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"crosslight.{_HOME[name]}"), name)
    raise AttributeError(f"module 'crosslight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
