"""diffusers: attention modules with a processor. Processors that do not call ``scaled_dot_product_attention`` are
replaced, while the module runs, by the one of the same arithmetic that does."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from crosslight.hosts import functional
from crosslight.hosts.base import HEAD_DIM, HEADS, Site, Undo, bind, number, seat, site

HOST = "diffusers"
_SAME = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}


def claim(module: Any, name: str, parents: tuple[nn.Module, ...]) -> Site | None:
    cls: Any = type(module)
    if "diffusers" not in sys.modules or not any(c.__module__.startswith("diffusers.") for c in cls.__mro__):
        return None
    heads = number(module, HEADS)
    if heads is None or not hasattr(module, "set_processor") or not hasattr(module, "to_q"):
        return None
    inner = number(module, ("inner_dim",)) or module.to_q.out_features
    head_dim = number(module, HEAD_DIM) or inner // heads
    if isinstance(getattr(module, "add_q_proj", None), nn.Linear):
        stream = "joint"
    else:
        stream = "cross" if getattr(module, "is_cross_attention", False) else ""
    return site(HOST, module, name, parents, heads, head_dim, stream)


def attach(place: Site) -> Undo:
    return bind(place.module, "forward", _run)


def why_not_swap(place: Site) -> str:
    return ""


def _run(module: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    if seat(module).idle:
        return inner(*args, **kwargs)
    processor: Any = module.processor
    same = _SAME.get(type(processor).__name__)
    if same is None:
        return functional.run(module, inner, *args, **kwargs)
    from diffusers.models import attention_processor

    module.processor = getattr(attention_processor, same)()
    try:
        return functional.run(module, inner, *args, **kwargs)
    finally:
        module.processor = processor
