"""Layers in at least float32, whatever dtype their weights have: rounding must not choose another token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is wider."""
    return torch.promote_types(dtype, torch.float32)


def in_full(layer: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """layer(x, *args) in at least float32."""
    wide = widened(x.dtype)
    if x.dtype == wide and all(p.dtype == wide for p in layer.parameters()):
        return layer(x, *args)
    parameters = {name: p.to(wide) for name, p in layer.named_parameters()}
    return torch.func.functional_call(layer, parameters, (x.to(wide), *args))
