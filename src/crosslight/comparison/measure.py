"""Peak memory of a training step, counted as tensors come and go, and so independent of other load."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Peak bytes of the tensors that operations inside the block allocate and that live at the same time.

    What autograd saves for the backward pass counts while it lives. Tensors from before the block do not count,
    nor does what a single operation allocates and frees inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {_address(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_iter(result):
            if isinstance(t, Tensor) and _address(t) not in held | self._seen:
                self._hold(t.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def peak_memory(step: Callable[[], Any]) -> int:
    """Peak bytes of live tensors that ``step()`` allocates: on CUDA from the allocator, elsewhere by `PeakMemory`."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as counter:
        step()
    return counter.peak
