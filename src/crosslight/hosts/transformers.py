"""transformers: modules that take their attention function from ``ALL_ATTENTION_FUNCTIONS``.

While such a module runs, its configuration names our function; before and after it names the model's own, which also
goes on making the masks. Modules of older models, which form their matrix themselves, are left to `functional`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from crosslight.errors import expect
from crosslight.hosts.base import (
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

HOST = "transformers"
NAME = "crosslight"
_FLAG = "_attn_implementation_internal"


def claim(module: Any, name: str, parents: tuple[nn.Module, ...]) -> Site | None:
    cls: Any = type(module)
    if "transformers" not in sys.modules or "ALL_ATTENTION_FUNCTIONS" not in names_in(cls):
        return None
    heads = number(module, HEADS)
    if heads is None or not hasattr(module, "config"):
        return None
    head_dim = number(module, HEAD_DIM) or (number(module, WIDTH) or 0) // heads
    return site(HOST, module, name, parents, heads, head_dim)


def attach(place: Site) -> Undo:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    return bind(place.module, "forward", _run)


def why_not_swap(place: Site) -> str:
    return ""


def _run(module: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    config: Any = module.config
    here = seat(module)
    if here.idle:
        return inner(*args, **kwargs)
    here.host = getattr(config, _FLAG)
    with here.layer(*here.streams(args, kwargs)):
        # The flag itself: the property's setter also reaches into sub-configurations.
        setattr(config, _FLAG, NAME)
        try:
            return inner(*args, **kwargs)
        finally:
            setattr(config, _FLAG, here.host)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers: heads (batch, heads, length, dim) in, (batch, n, heads, dim) out."""
    name = seat(module).host
    expect(
        attention_mask is None or isinstance(attention_mask, Tensor),
        "model",
        f"attention implementation {name!r}, whose masks are {type(attention_mask).__name__}",
        "'sdpa' or 'eager': model.set_attn_implementation('sdpa')",
    )
    n, m = query.shape[2], key.shape[2]
    # Eager attention does only what its mask says; the others take the flag where there is no matrix of a mask.
    flagged = getattr(module, "is_causal", True) if is_causal is None else is_causal
    matrix = attention_mask is not None and attention_mask.dim() == 4
    causal = bool(flagged) and n > 1 and not matrix and name not in ("eager", None)
    keep, bias, offset = None, position_bias, 0
    if matrix:
        mask = attention_mask[..., :m]
        if mask.dtype == torch.bool:
            keep = mask
        else:
            bias = mask if bias is None else bias + mask
    elif attention_mask is not None:
        keep = attention_mask.bool()[:, None, None, :m]
    if causal and name != "sdpa":
        offset = m - n  # flash kernels align the last query with the last key
    made, weights = attend(
        module,
        query,
        key,
        value,
        scale=scaling,
        keep=keep,
        bias=bias,
        causal=causal,
        offset=offset,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
        wanted=bool(rest.get("output_attentions")),
        caches=getattr(module, "is_causal", True),
        window=rest.get("sliding_window"),
    )
    return made.transpose(1, 2).contiguous(), weights
