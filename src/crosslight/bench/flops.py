"""FLOPs of a call, counted as operators are dispatched (nothing is timed).

PyTorch's counter knows matrix products, convolutions and CUDA attention. It has no formula for the flash attention
that CPUs run, nor for Fourier transforms, and counts both as 0; here they are added. Element-wise work is not counted.
A causal flag does not halve the count, as in PyTorch: what is counted is the operator's whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

_aten = torch.ops.aten


def _attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _fourier(real: bool) -> Callable[..., int]:
    def flops(x: Any, axes: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
        # A transform of N points takes 5 N log2 N operations, half of it where one side is real.
        shape = [max(a, b) for a, b in zip(x, out_shape, strict=True)]
        points = math.prod(shape[a] for a in axes)
        return round((2.5 if real else 5) * math.prod(shape) * math.log2(max(points, 2)))

    return flops


_OWN: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._fft_c2c: _fourier(real=False),
    _aten._fft_r2c: _fourier(real=True),
    _aten._fft_c2r: _fourier(real=True),
}
#: PyTorch's formulas and those above, by operator; each takes the operator's arguments and ``out_val``.
FORMULAS = {**flop_registry, **{operator: shape_wrapper(formula) for operator, formula in _OWN.items()}}


class _Counter(TorchDispatchMode):
    # FlopCounterMode also follows modules, by hooks that `torch.autograd.grad` refuses.
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count(fn: Callable[[], Any]) -> int:
    """Floating-point operations that ``fn()`` performs, its backward passes included if it runs them."""
    with _Counter() as counter:
        fn()
    return counter.total
