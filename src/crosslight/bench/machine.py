"""What a figure was taken on, in words."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

import crosslight
from crosslight.bench import memory


def steady() -> None:
    """Set this process up for measuring, so that time follows the work: for a command that owns its process.

    Freed memory is kept, and subnormal numbers are zero, on which a processor's arithmetic is many times slower. A GPU
    does both by itself.
    """
    memory.keep_freed()
    torch.set_flush_denormal(True)


def machine(device: str = "cpu") -> dict[str, str | int]:
    """Date, processor, cores, threads and versions."""
    found: dict[str, str | int] = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(device),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "crosslight": crosslight.__version__,
    }
    return found


def _processor(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
