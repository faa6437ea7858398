"""Our own mechanisms. A layer around a core is entered at its core, so that decoding passes through as well; every
other mechanism is ``read`` of its ``weights``."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from crosslight.attention.base import AttentionLayer, Core, Mechanism
from crosslight.cards import Card
from crosslight.errors import CrosslightError
from crosslight.hosts.base import Site, Undo, bind, seat, site

HOST = "crosslight"
_LAYER = "_crosslight_layer"


def claim(module: nn.Module, name: str, parents: tuple[nn.Module, ...]) -> Site | None:
    if not isinstance(module, Mechanism | Core):
        return None
    heads = getattr(module, "heads", 1)
    width = module.dim // heads if isinstance(module, Mechanism) else 0
    cross = getattr(module, "context_dim", None) != getattr(module, "dim", None)
    head_dim = getattr(module, "head_dim", width)
    return site(HOST, module, name, parents, heads, head_dim, "cross" if cross else "")


def attach(place: Site) -> Undo:
    module = place.module
    if isinstance(module, AttentionLayer):
        undos = [bind(module, "_forward", _layer_forward), bind(module, "_step", _layer_step)]
    elif isinstance(module, Core):
        undos = [bind(module, "forward", _core_forward)]
    else:
        undos = [bind(module, "_forward", _forward), bind(module, "_step", _step)]

    def undo() -> None:
        for each in undos:
            each()

    return undo


def why_not_swap(place: Site) -> str:
    return ""


def _layer_forward(layer: AttentionLayer, inner: Any, x: Any, context: Any, how: Any) -> Any:
    with seat(layer).layer(x, context if how.cross else None), _led(layer):
        return inner(x, context, how)


def _layer_step(layer: AttentionLayer, inner: Any, x: Any, cache: Any, context: Any, how: Any) -> Any:
    with seat(layer).layer(x, context), _led(layer):
        return inner(x, cache, context, how)


class _led:
    """Inside the block, calls of the layer's core pass through the layer's seat."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        here = seat(self.layer)
        self.undo = bind(self.layer.core, "forward", partial(_lead, here, self.layer.card))

    def __exit__(self, *exc: object) -> None:
        self.undo()


def _core_forward(core: Core, inner: Any, q: Any, k: Any, v: Any, **how: Any) -> Any:
    return _lead(seat(core), core.card, core, inner, q, k, v, **how)


def _lead(here: Any, card: Card, core: Core, inner: Any, q: Any, k: Any, v: Any, **how: Any) -> Any:
    grid = {"grid": how["grid"]} if how.get("grid") is not None else {}
    return here.pass_(
        weights=lambda: core.weights(q, k, **how),
        read=lambda a: core.read(a, v, **grid),
        plain=lambda: inner(q, k, v, **how),
        linear=card.linear_in_values,
        q=q,
        k=k,
        v=v,
    )[0]


def _forward(module: Mechanism, inner: Any, x: Any, context: Any, how: Any) -> Any:
    here = seat(module)
    with here.layer(x, context if how.cross else None):
        return here.pass_(
            weights=lambda: module._weights(x, context, how),
            read=lambda a: module._read(a, x, context, how),
            plain=lambda: inner(x, context, how),
            linear=module.card.linear_in_values,
        )[0]


def _step(module: Mechanism, inner: Any, x: Any, cache: Any, context: Any, how: Any) -> Any:
    if any(e.active for e in seat(module).entries):
        raise CrosslightError(f"step: got a rule at {module.card.id}, which can be steered in full passes only")
    return inner(x, cache, context, how)
