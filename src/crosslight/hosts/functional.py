"""Hosts that call ``scaled_dot_product_attention`` or a softmax over scores in their own forward: hand-written
attention, and what timm, diffusers and older transformers modules come down to.

While such a module runs, a torch function mode takes its attention calls out of the stream of torch functions. A
module that forms the matrix itself shows it as the softmax of a tensor (batch, heads, n, m): it can be watched and
steered, but there is nothing to swap.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crosslight.errors import CrosslightError, expect
from crosslight.hosts.base import (
    CORE,
    HEAD_DIM,
    HEADS,
    WIDTH,
    Site,
    Undo,
    attend,
    bind,
    names_in,
    number,
    seat,
    site,
)

HOST = "functional"
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Intercept(TorchFunctionMode):
    """Leads the attention calls of one module through its seat."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return sdpa(self.module, *args, **kwargs)
        made = func(*args, **kwargs)
        if func in _SOFTMAX and made.dim() == 4 and made.shape[1] == number(self.module, HEADS):
            return _formed(self.module, made)
        return made


def sdpa(module, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """``scaled_dot_product_attention`` through the seat of a module."""
    if query.dim() < 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    # Windows are often an axis of their own: a batch as well.
    batch = query.shape[:-3]
    query, key, value = (t.flatten(0, -4) for t in (query, key, value))
    keep, bias = None, None
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (len(batch) + 3 - attn_mask.dim())]
        if len(batch) > 1:
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
        keep, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    how = {"scale": scale, "keep": keep, "bias": bias, "causal": is_causal, "dropout": dropout_p}
    return attend(module, query, key, value, **how, caches=True)[0].unflatten(0, batch)


def _formed(module: nn.Module, weights: Tensor) -> Tensor:
    """A matrix that the module made itself and will multiply with its values itself."""
    expect(not hasattr(module, CORE), "swap", f"a {type(module).__name__}, {_OWN}", "another host")
    return seat(module).pass_(weights=lambda: weights, read=lambda a: a, plain=lambda: weights)[0]


def run(module: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's forward with its attention calls led through the seat."""
    here = seat(module)
    if here.idle:
        return inner(*args, **kwargs)
    with here.layer(*here.streams(args, kwargs)), Intercept(module):
        made = inner(*args, **kwargs)
    if not here.calls:
        raise CrosslightError(
            f"model: a {type(module).__name__} ran without an attention call that Crosslight could see, expected one "
            "through scaled_dot_product_attention, or a softmax of (batch, heads, n, m); leave it out by where="
        )
    return made


_OWN = "which forms its attention matrix itself"


def why_not_swap(place: Site) -> str:
    """Why a core cannot be put here, or nothing."""
    cls: Any = type(place.module)
    return "" if "scaled_dot_product_attention" in names_in(cls, None) else _OWN


def claim(module: Any, name: str, parents: tuple[nn.Module, ...]) -> Site | None:
    cls: Any = type(module)
    if isinstance(module, nn.MultiheadAttention) or cls.__module__.startswith("torch."):
        return None
    used = names_in(cls, None)
    named = any(word in cls.__name__.lower() for word in ("attention", "attn"))
    formed = named and bool({"softmax", "Softmax"} & used)
    if "scaled_dot_product_attention" not in used and not formed:
        return None
    heads = number(module, HEADS)
    if heads is None:
        return None
    head_dim = number(module, HEAD_DIM) or (number(module, WIDTH) or 0) // heads
    return site(HOST, module, name, parents, heads, head_dim)


def attach(place: Site) -> Undo:
    return bind(place.module, "forward", run)
