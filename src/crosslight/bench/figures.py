"""The figures that the project holds itself to, as ratios within one run: `crosslight bench --figures`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from crosslight import registry
from crosslight.bench import marked, memory, timing
from crosslight.bench.calls import Call, Prepared, Setting, Unsupported, fitting, home
from crosslight.bench.curves import growth
from crosslight.bench.machine import machine
from crosslight.cards import Card
from crosslight.errors import CrosslightError, require
from crosslight.tasks.base import Entrant

K = 1024
#: 8 heads of 64, as the figures say.
SIZES: dict[str, Any] = {"dim": 512, "heads": 8}


@dataclass(frozen=True)
class Figure:
    """One figure: ``value`` has to be at most, or at least, ``target``."""

    name: str
    sense: Literal["at most", "at least"]
    target: float
    value: float | None
    unit: str = "×"
    detail: str = ""

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.target if self.sense == "at most" else self.value >= self.target

    @property
    def shown(self) -> str:
        return "-" if self.value is None else f"{self.value:.3g}{self.unit}"

    def line(self) -> str:
        return (
            f"{'reached' if self.holds else 'MISSED':8}{self.shown:>9}  ({self.sense} {self.target:g}{self.unit})  "
            f"{self.name}" + (f"  [{self.detail}]" if self.detail else "")
        )


class _Bench:
    """Calls on one device, timed in turns."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.shared = {**SIZES, "device": device, "dtype": "bfloat16" if self.on_gpu else "float32"}

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def call(self, entrant: str | Entrant, n: int, **setting: Any) -> Call:
        entrant = Entrant(entrant) if isinstance(entrant, str) else entrant
        return Prepared(entrant, Setting(**{**self.shared, **setting})).call(n)

    def times(self, seconds: float = 10.0, **calls: Call) -> dict[str, timing.Times]:
        for call in calls.values():
            timing.once(call, self.device)
        return timing.interleaved(calls, rounds=5, seconds=seconds, device=self.device)


def _times(taken: dict[str, timing.Times]) -> str:
    return ", ".join(f"{name} {1e3 * t.median:.4g} ms" for name, t in taken.items()) + f", {_rounds(taken)} rounds"


def _rounds(taken: dict[str, timing.Times]) -> int:
    return len(next(iter(taken.values())).rounds)


def softmax(bench: _Bench) -> Iterator[Figure]:
    """The layer against nn.Linear + scaled_dot_product_attention written out."""
    for pattern in ("noncausal-self", "noncausal-cross"):
        for n in (K, 4 * K):
            for backward in (False, True):
                setting: dict[str, Any] = {"pattern": pattern, "backward": backward}
                taken = bench.times(softmax=bench.call("softmax", n, **setting), sdpa=bench.call("sdpa", n, **setting))
                name = f"softmax over nn.Linear + SDPA, {pattern}, {n:,}, {_passes(backward)}"
                yield Figure(name, "at most", 1.05, taken["softmax"].ratio(taken["sdpa"]), detail=_times(taken))


def window(bench: _Bench) -> Iterator[Figure]:
    """Between heads, with a window of 256 to both sides, against dense SDPA without a mask and FlexAttention."""
    n, near = 8 * K, {"mask": "window:256", "level": "core"}
    taken = bench.times(softmax=bench.call("softmax", n, **near), sdpa=bench.call("sdpa", n, level="core"))
    ratio = taken["sdpa"].ratio(taken["softmax"])
    yield Figure("dense SDPA over window 256 at 8,192, forward + backward", "at least", 6, ratio, detail=_times(taken))
    for backward in (False, True) if bench.on_gpu else (False,):
        setting = {**near, "backward": backward}
        taken = bench.times(softmax=bench.call("softmax", n, **setting), flex=bench.call("flex", n, **setting))
        name = f"window 256 over compiled FlexAttention at 8,192, {_passes(backward)}"
        yield Figure(name, "at most", 1.25, taken["softmax"].ratio(taken["flex"]), detail=_times(taken))


def moba(bench: _Bench) -> Iterator[Figure]:
    setting = {"pattern": "causal-self", "level": "core"}
    taken = bench.times(
        moba=bench.call(Entrant("moba", {"block_size": 128, "top_k": 8}), 16 * K, **setting),
        sdpa=bench.call("sdpa", 16 * K, **setting),
    )
    name = "dense causal SDPA over moba (block 128, top 8) at 16,384, forward + backward"
    yield Figure(name, "at least", 4, taken["sdpa"].ratio(taken["moba"]), detail=_times(taken))


def lightning(bench: _Bench) -> Iterator[Figure]:
    setting = {"pattern": "causal-self", "level": "core"}
    taken = bench.times(
        lightning=bench.call("lightning-attention", 8 * K, **setting), sdpa=bench.call("sdpa", 8 * K, **setting)
    )
    name = "dense causal SDPA over lightning-attention at 8,192, forward + backward"
    yield Figure(name, "at least", 8, taken["sdpa"].ratio(taken["lightning"]), detail=_times(taken))
    if bench.on_gpu:
        yield from _fla(bench, setting)
    lengths = [k * K for k in (4, 8, 16, 32, 64)]
    calls = {str(n): bench.call("lightning-attention", n, **setting) for n in lengths}
    taken = bench.times(30, **calls)
    # A round has all lengths, so its exponent is one of the same disturbance.
    exponents = [
        growth({n: taken[str(n)].rounds[i] for n in lengths}) or 0.0 for i in range(len(taken[str(lengths[0])].rounds))
    ]
    name = "growth exponent of lightning-attention, 4,096 to 65,536, forward + backward"
    yield Figure(name, "at most", 1.1, statistics.median(exponents), unit="", detail=_times(taken))


def _fla(bench: _Bench, setting: dict[str, Any]) -> Iterator[Figure]:
    """Against the Triton kernel of flash-linear-attention."""
    for n in (8 * K, 64 * K):
        taken = bench.times(lightning=bench.call("lightning-attention", n, **setting), fla=_fla_call(n, bench.device))
        name = f"lightning-attention over fla's kernel at {n:,}, forward + backward"
        yield Figure(name, "at most", 1.3, taken["lightning"].ratio(taken["fla"]), detail=_times(taken))


def _fla_call(n: int, device: str) -> Call:
    kernel = require("fla.ops.lightning_attn", "gpu").chunk_lightning_attn
    shape = (1, n, SIZES["heads"], SIZES["dim"] // SIZES["heads"])  # tokens before heads
    streams = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def both() -> Any:
        out = kernel(*streams, 0, 1, scale=1.0)[0]
        return torch.autograd.grad(out, streams, torch.ones_like(out))

    return both


def extra_memory(bench: _Bench) -> Iterator[Figure]:
    """Every sub-quadratic row of kind token: what a call allocates, in bytes of q, k, v and output together."""
    for card in registry.find(kind="token"):
        if card.growth < 2 and card.group != "baseline":
            yield from _extra_memory(bench, card, 64 * K)


def _extra_memory(bench: _Bench, card: Card, n: int) -> Iterator[Figure]:
    pattern = home(card)
    entrant = fitting(card.id, n)
    for backward in (False, True):
        setting: dict[str, Any] = {"pattern": pattern, "backward": backward}
        name = f"extra memory of {card.id} at {n:,}, {pattern}, {_passes(backward)}"
        try:
            try:
                call, level = bench.call(entrant, n, level="core", **setting), "between heads"
            except Unsupported:  # no core between heads
                call, level = bench.call(entrant, n, **setting), "the whole layer"
            with memory.bounded():
                peak = memory.peak(call, bench.device)
        except (CrosslightError, RuntimeError, MemoryError) as error:
            yield Figure(name, "at most", 8, None, detail=str(error).partition("\n")[0])
            continue
        given = 4 * n * SIZES["dim"] * torch.finfo(torch.bfloat16 if bench.on_gpu else torch.float32).bits // 8
        yield Figure(name, "at most", 8, peak / given, detail=f"{peak / 2**20:,.0f} MiB, {level}")


def importing(bench: _Bench) -> Iterator[Figure]:
    """Seconds that `import crosslight` takes after `import torch`, each time in a new process."""
    code = "import time, torch; t = time.perf_counter(); import crosslight; print(time.perf_counter() - t)"

    def run() -> float:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    run()
    yield Figure(
        "import crosslight beyond import torch", "at most", 0.2, statistics.median(run() for _ in range(5)), " s"
    )


def _passes(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


ALL: tuple[Callable[[_Bench], Iterator[Figure]], ...] = (softmax, window, moba, lightning, extra_memory, importing)


def take(device: str = "cpu", started: Callable[[str], None] = lambda name: None) -> Iterator[Figure]:
    """Take all figures, one after the other."""
    bench = _Bench(device)
    for part in ALL:
        started(part.__name__.replace("_", " "))
        try:
            yield from part(bench)
        except (CrosslightError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            yield Figure(part.__name__.replace("_", " "), "at most", 0, None, detail=first)


def files(root: Path, device: str, taken: Sequence[Figure]) -> dict[Path, str]:
    """What to write where: bench/figures.json, and this device's part of docs/performance.md."""
    return written(root, "figures", device, taken, _section)


def written(
    root: Path, name: str, device: str, taken: Sequence[Figure], section: Callable[[str, str, Sequence[Any]], str]
) -> dict[Path, str]:
    """bench/NAME.json, which keeps other devices, and the part NAME of docs/performance.md.

    Args:
        section: makes the part of the kind of device, of where it was taken, in words, and of what was taken.
    """
    kind, about = torch.device(device).type, machine(device)
    record, page = root / "bench" / f"{name}.json", root / "docs" / "performance.md"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    known[kind] = {"machine": about, "figures": [asdict(f) | {"holds": f.holds} for f in taken]}
    text = page.read_text(encoding="utf-8") if page.exists() else "# Performance\n"
    command = f"crosslight bench --{name}" + ("" if kind == "cpu" else f" --device {device}")
    where = (
        f"Taken on {about['date']} with `{command}` on {about['processor']}, {about['cores']} cores, "
        f"{about['threads']} threads, {about['system']}; Python {about['python']}, torch {about['torch']}, "
        f"crosslight {about['crosslight']}."
    )
    return {
        record: json.dumps(known, indent=1) + "\n",
        page: marked.placed(text, f"{name}: {kind}", section(kind, where, taken)),
    }


def _section(kind: str, where: str, taken: Sequence[Figure]) -> str:
    lines = [
        f"## On {'a CPU' if kind == 'cpu' else 'a GPU'}",
        "",
        f"{where} 8 heads of 64, batch 1, {'float32' if kind == 'cpu' else 'bfloat16'}. Ratios are medians over "
        "pairs of calls that took turns; the process keeps the memory that it frees, and subnormal numbers are zero.",
        "",
        "| figure | to reach | taken | |",
        "| --- | --- | --- | --- |",
        *(f"| {f.name} | {f.sense} {f.target:g}{f.unit} | {f.shown} | {'' if f.holds else 'missed'} |" for f in taken),
    ]
    return "\n".join(lines)
