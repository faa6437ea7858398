"""timm: attention modules with a ``fused_attn`` switch, which is on while they run under Crosslight."""

from __future__ import annotations

from typing import Any

from torch import nn

from crosslight.hosts import functional
from crosslight.hosts.base import HEAD_DIM, HEADS, WIDTH, Site, Undo, bind, number, seat, site

HOST = "timm"


def claim(module: Any, name: str, parents: tuple[nn.Module, ...]) -> Site | None:
    heads = number(module, HEADS)
    ours = any(c.__module__.startswith("timm.") for c in type(module).__mro__)
    if heads is None or not ours or not hasattr(module, "fused_attn"):
        return None
    head_dim = number(module, HEAD_DIM) or (number(module, ("attn_dim", *WIDTH)) or 0) // heads
    if not head_dim and isinstance(getattr(module, "qkv", None), nn.Linear):
        head_dim = module.qkv.out_features // 3 // heads
    return site(HOST, module, name, parents, heads, head_dim)


def attach(place: Site) -> Undo:
    return bind(place.module, "forward", _run)


def why_not_swap(place: Site) -> str:
    return ""


def _run(module: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    if seat(module).idle:
        return inner(*args, **kwargs)
    fused, module.fused_attn = module.fused_attn, True
    try:
        return functional.run(module, inner, *args, **kwargs)
    finally:
        module.fused_attn = fused
