"""``torch.nn.MultiheadAttention``, alone and in PyTorch's transformer layers.

A forward hook on the module keeps ``TransformerEncoderLayer`` from its fused path, which reads the weights and calls
nothing; nested tensors, which only that path can read, are switched off in the encoder around it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.hosts.base import Site, Undo, attend, bind, seat, site

HOST = "torch"
_COUNT = "_crosslight_sites"


def claim(module: nn.Module, name: str, parents: tuple[nn.Module, ...]) -> Site | None:
    if not isinstance(module, nn.MultiheadAttention) or type(module).__module__.startswith("torch.ao."):
        return None
    # TransformerDecoderLayer calls its cross-attention multihead_attn.
    cross = name.endswith("multihead_attn") or module.kdim != module.embed_dim
    return site(HOST, module, name, parents, module.num_heads, module.head_dim, "cross" if cross else "")


def attach(place: Site) -> Undo:
    undo = bind(place.module, "forward", _run)
    hook = place.module.register_forward_hook(_nothing)
    nest = without_nesting(place.parents)

    def restore() -> None:
        undo()
        hook.remove()
        nest()

    return restore


def without_nesting(parents: tuple[nn.Module, ...]) -> Undo:
    """Keep the encoders among ``parents`` from nested tensors, which only PyTorch's fused path can read."""
    encoders = [p for p in parents if isinstance(p, nn.TransformerEncoder)]
    for encoder in encoders:
        encoder.__dict__.setdefault(_COUNT, [0, encoder.use_nested_tensor])[0] += 1
        encoder.use_nested_tensor = False

    def restore() -> None:
        for encoder in encoders:
            encoder.__dict__[_COUNT][0] -= 1
            if not encoder.__dict__[_COUNT][0]:
                encoder.use_nested_tensor = encoder.__dict__.pop(_COUNT)[1]

    return restore


def why_not_swap(place: Site) -> str:
    return ""


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    return None


def _run(
    module: nn.MultiheadAttention,
    inner: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    here = seat(module)
    if here.idle:
        return inner(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    batched = query.dim() == 3
    if not batched:
        query, key, value = query[None], key[None], value[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not module.batch_first:
        same = key is query
        query, value = query.transpose(0, 1), value.transpose(0, 1)
        key = query if same else key.transpose(0, 1)
    q, k, v = (_split(t, module.num_heads) for t in _project(module, query, key, value))
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    keep, bias = masks(module.num_heads, key_padding_mask, attn_mask, k.shape[2], q.shape[0])
    dropout = module.dropout if module.training else 0.0
    with here.layer(query, None if key is query else key):
        made, weights = attend(module, q, k, v, keep=keep, bias=bias, dropout=dropout, wanted=need_weights)
    y = module.out_proj(made.transpose(1, 2).flatten(2))
    y = y[0] if not batched else y if module.batch_first else y.transpose(0, 1)
    if not need_weights or weights is None:
        return y, None
    weights = weights.mean(1) if average_attn_weights else weights
    return y, weights if batched else weights[0]


def _project(module, query, key, value):
    if module._qkv_same_embed_dim:
        parts = module.in_proj_weight.chunk(3)
    else:
        parts = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True))
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.transpose(0, 1).expand(k.shape[0], -1, -1)], 1)
        v = torch.cat([v, module.bias_v.transpose(0, 1).expand(v.shape[0], -1, -1)], 1)
    return q, k, v


def _split(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def masks(heads, padding, pairs, m, batch):
    """PyTorch's masks, True or -inf = may not be read, as (keep, bias)."""
    keep, bias = None, None
    for mask, shape in ((padding, (batch, 1, 1, -1)), (pairs, None)):
        if mask is None:
            continue
        if shape is None:
            shape = (1, 1, *mask.shape) if mask.dim() == 2 else (batch, heads, *mask.shape[1:])
        mask = F.pad(mask.view(shape), (0, m - mask.shape[-1]))
        if mask.dtype == torch.bool:
            keep = ~mask if keep is None else keep & ~mask
        else:
            bias = mask if bias is None else bias + mask
    return keep, bias
