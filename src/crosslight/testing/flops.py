"""Counting, instead of timing, what a call costs: the work it does and the largest tensor it allocates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosslight.bench.flops import FORMULAS

#: Work in proportion to the elements read, besides the operators that torch tags as pointwise or reduction.
_LINEAR = {"_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "logsumexp", "cummax", "native_layer_norm"}
_LINEAR |= {"mean", "amax", "amin", "var", "var_mean", "linalg_vector_norm", "native_batch_norm", "native_group_norm"}
_LINEAR |= {f"{name}_backward_data" for name in ("_softmax", "_log_softmax")} | {"native_layer_norm_backward"}
#: Times the logarithm of the length.
_SORTING = {"sort", "topk"}


class Meter(TorchDispatchMode):
    """Counts while it is entered, backward passes included.

    Attributes:
        flops: products (matrix products, convolutions, attention, Fourier transforms) by their formulas, a unit for
            every element of a pointwise result or of what a reduction reads, n log n for sorts. Views, copies and
            gathers count nothing.
        largest: elements of the largest tensor that was allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # A view has the storage of what it looks at, so an expanded one counts as little as it holds.
        self.largest = max([self.largest, *map(_held, tree_leaves(out))])
        self.flops += _work(func, args, kwargs or {}, out)
        return out


def _held(t: Any) -> int:
    return t.untyped_storage().nbytes() // t.element_size() if isinstance(t, Tensor) else 0


def _work(func, args, kwargs, out) -> int:
    packet = func._overloadpacket
    if packet in FORMULAS:
        return FORMULAS[packet](*args, **kwargs, out_val=out)
    name = packet.__name__
    read = max((t.numel() for t in tree_leaves((args, out)) if isinstance(t, Tensor)), default=0)
    if name in _SORTING:
        return int(read * math.log2(read + 1))
    if torch.Tag.pointwise in func.tags:
        return sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
    return read if torch.Tag.reduction in func.tags or name in _LINEAR else 0


def measure(call: Callable[[], Tensor]) -> Meter:
    """Run ``call`` and the backward pass of its sum under a `Meter`."""
    with Meter() as meter:
        y = call()
        if y.requires_grad:
            y.sum().backward()
    return meter


def growth(small: int, large: int, factor: float) -> float:
    """The exponent e with large = small * factor^e."""
    return math.log(max(large, 1) / max(small, 1)) / math.log(factor)


__all__ = ["Meter", "growth", "measure"]
