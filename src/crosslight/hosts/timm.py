"""timm: attention modules with a ``fused_attn`` switch, which is on while they run under Crosslight."""

from __future__ import annotations

from typing import Any

from torch import nn

from crosslight.hosts import functional
from crosslight.hosts.base import HEAD_DIM, HEADS, WIDTH, Site, Undo, bind, crosses, number, seat

HOST = "timm"


def claim(module: nn.Module, name: str, parents: tuple[nn.Module, ...]) -> Site | None:
    cls = type(module)
    heads = number(module, HEADS)
    if (
        heads is None
        or not any(c.__module__.startswith("timm.") for c in cls.__mro__)
        or not hasattr(module, "fused_attn")
    ):
        return None
    head_dim = number(module, HEAD_DIM) or (number(module, ("attn_dim", *WIDTH)) or 0) // heads
    if not head_dim and isinstance(getattr(module, "qkv", None), nn.Linear):
        head_dim = module.qkv.out_features // 3 // heads
    return Site(
        name, module, "cross" if crosses(name, module, *parents[-1:]) else "self", heads, head_dim, HOST, parents
    )


def attach(site: Site) -> Undo:
    return bind(site.module, "forward", _run)


def why_not_swap(site: Site) -> str:
    return ""


def _run(module: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    if seat(module).idle:
        return inner(*args, **kwargs)
    fused, module.fused_attn = module.fused_attn, True
    try:
        return functional.run(module, inner, *args, **kwargs)
    finally:
        module.fused_attn = fused
