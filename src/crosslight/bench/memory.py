"""Peak memory of a call: what it allocates beyond its input and holds at the same time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def peak(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak bytes that ``fn()`` allocates, its result included; operators' own buffers count too.

    On CUDA the caching allocator keeps the figure. On CPU the profiler reports every allocation and release.
    """
    return _peak_cuda(fn) if torch.device(device).type == "cuda" else _peak_cpu(fn)


def _peak_cuda(fn: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(fn: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and end otherwise
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        kept = fn()
    del kept
    events = trace.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = top = 0
    for _, change in changes:
        live += change
        top = max(top, live)
    return top


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
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(
        resource.RLIMIT_AS, (used + free if hard == resource.RLIM_INFINITY else min(used + free, hard), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def available() -> int | None:
    """Free bytes of this machine, if the system says."""
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
