"""Peak memory of a call: what it allocates beyond its input and holds at the same time."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak bytes that ``fn()`` allocates, its result and what autograd saves included; operators' own buffers too.

    On CUDA the caching allocator keeps the figure. On CPU the profiler reports every allocation and release.
    """
    return _peak_cuda(fn) if torch.device(device).type == "cuda" else _peak_cpu(fn)


def peak_of_tensors(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The same without the buffers that one operator allocates and frees inside, on a CPU.

    For a training step: no profiler has to start, and what the step frees from before it is not taken for its own.
    """
    if torch.device(device).type == "cuda":
        return _peak_cuda(fn)
    with _Storages() as counter:
        fn()
    return counter.peak


def _peak_cuda(fn: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(fn: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and end otherwise
    from torch.autograd.profiler import profile

    with profile(use_kineto=True, profile_memory=True) as trace:
        kept = fn()
    del kept
    # The raw events: torch's own list of them takes ten times as long to build as a call with many operators runs.
    events = trace.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = top = 0
    for _, change in changes:
        live += change
        top = max(top, live)
    return top


class _Storages(TorchDispatchMode):
    """Bytes of the storages that operators inside the block allocate: now, and at most at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_address(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_iter(out):
            if isinstance(t, Tensor) and _address(t) not in given | self._seen:
                self._hold(t.untyped_storage())
        return out

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


def keep_freed() -> None:
    """Let this process keep the CPU memory that it frees, as CUDA's caching allocator does on a GPU.

    glibc gives each released block of more than 32 MiB back to the system, and the next one comes as fresh pages that
    have to be zeroed: where tensors are that large, a call takes up to twice as long, and time appears to grow faster
    than the work. Does nothing on a system without glibc.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc; to find out means to read Python's own program."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


#: Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, an allocation beyond the memory that is free now raises, where Linux would end the process later."""
    free = available()
    if free is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize() - _kept()
    resource.setrlimit(
        resource.RLIMIT_AS, (used + free if hard == resource.RLIM_INFINITY else min(used + free, hard), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


#: The fields of malloc.h's struct mallinfo2, each a size_t.
_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def _kept() -> int:
    """Bytes of address space that glibc holds for later blocks: of what was given back, they are not in memory."""
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo
    return libc.mallinfo2().fordblks


def available() -> int | None:
    """Free bytes of this machine, if the system says; what this process freed and kept is given back first."""
    if not sys.platform.startswith("linux"):
        return None
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
