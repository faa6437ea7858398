"""Time, memory and FLOPs against length, for any entrants under one setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from crosslight.bench import flops, memory, timing
from crosslight.bench.baselines import BASELINES
from crosslight.bench.calls import Call, Prepared, Setting, Unsupported
from crosslight.bench.curves import Crossing, efficiency_length, growth
from crosslight.bench.machine import machine
from crosslight.errors import CrosslightError, UnsupportedPattern
from crosslight.tasks.base import Entrant

Status = Literal["ok", "out of memory", "over time", "unsupported", "failed"]


@dataclass
class Measurement:
    """One entrant at one length.

    Attributes:
        seconds, best: median and shortest time of a call.
        peak_bytes: peak memory of a call beyond its input.
        ratios: time over that of each baseline in the same rounds (median of the pairs).
    """

    entrant: str
    id: str
    length: int
    status: Status
    seconds: float | None = None
    best: float | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    flops: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Summary:
    """What the curves of one entrant say: growth exponents, and efficiency lengths against the baselines."""

    entrant: str
    growth: dict[str, float | None]
    efficiency_length: dict[str, Crossing | None]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Runner:
    """An entrant on its way through the lengths."""

    entrant: Entrant
    prepared: Prepared | None = None
    failed: Measurement | None = None
    last: tuple[int, float] | None = None
    call: Call | None = None

    def predicted(self, n: int) -> float:
        """Seconds at length n, if the time grew with the square from the last length on (a safe guess for most)."""
        return self.last[1] * (n / self.last[0]) ** 2 if self.last else 0.0


def sweep(
    entrants: Sequence[Entrant],
    lengths: Sequence[int],
    setting: Setting,
    *,
    rounds: int = 5,
    limit: float = 60.0,
    baselines: Sequence[str] = ("sdpa", "naive"),
    counts: bool = True,
    started: Callable[[str, int], None] = lambda entrant, length: None,
) -> Iterator[Measurement]:
    """Measure every entrant at every length, shortest first; yields as it goes.

    All entrants take turns at a length (see `timing`). One that runs out of memory, fails, or would take more than
    ``limit`` seconds for a call is recorded so, and the rest go on.

    Args:
        counts: whether peak memory and FLOPs are taken too, with one more call each.
        started: called before each measurement, for a progress bar.

    Raises:
        CrosslightError: an unknown id or option, or no entrant supports this setting.
    """
    runners = [_Runner(entrant) for entrant in entrants]
    for runner in runners:
        try:
            runner.prepared = Prepared(runner.entrant, setting)
        except Unsupported as error:
            runner.failed = _measurement(runner, 0, "unsupported", error)
    asked = [r for r in runners if r.entrant.id not in BASELINES] or runners
    if all(r.failed for r in asked):
        raise CrosslightError(asked[0].failed.error if asked[0].failed else "entrants: got none, expected one at least")
    for n in sorted(set(lengths)):
        ready = []
        for runner in runners:
            started(runner.entrant.label, n)
            stopped = _warm(runner, n, limit, setting)
            if stopped:
                yield stopped
            else:
                ready.append(runner)
        yield from _measure(ready, n, setting, rounds, limit, baselines, counts)


def _measurement(runner: _Runner, n: int, status: Status, error: BaseException | str = "") -> Measurement:
    text = str(error).strip().partition("\n")[0] or (type(error).__name__ if error else "")
    return Measurement(runner.entrant.label, runner.entrant.id, n, status, error=text)


def _status(error: BaseException) -> Status:
    if memory.is_out_of_memory(error):
        return "out of memory"
    return "unsupported" if isinstance(error, Unsupported | UnsupportedPattern) else "failed"


def _warm(runner: _Runner, n: int, limit: float, setting: Setting) -> Measurement | None:
    """Make the call and run it once; what stands in the way is a measurement itself."""
    if runner.failed is not None:
        return Measurement(**{**runner.failed.as_dict(), "length": n})
    if runner.predicted(n) > limit:
        return _measurement(runner, n, "over time", f"about {runner.predicted(n):.0f} s a call expected")
    assert runner.prepared is not None
    try:
        with memory.bounded():
            runner.call = runner.prepared.call(n)
            timing.once(runner.call, setting.device)  # compiles, allocates, fills caches
            runner.last = (n, timing.once(runner.call, setting.device))
    except (CrosslightError, RuntimeError, MemoryError, NotImplementedError) as error:
        found = _measurement(runner, n, _status(error), error)
        if found.status != "failed":
            runner.failed = found  # longer ones end the same way
        return found
    return None


def _measure(
    ready: list[_Runner],
    n: int,
    setting: Setting,
    rounds: int,
    limit: float,
    baselines: Sequence[str],
    counts: bool,
) -> Iterator[Measurement]:
    calls = {r.entrant.label: r.call for r in ready if r.call is not None}
    slowest = sum(r.last[1] for r in ready if r.last)
    # Slow calls are long enough to average over disturbances by themselves.
    times = timing.interleaved(calls, rounds if slowest < limit else 1, device=setting.device)
    for runner in ready:
        label = runner.entrant.label
        found = _measurement(runner, n, "ok")
        found.seconds, found.best, found.rounds = times[label].median, times[label].best, len(times[label].rounds)
        found.ratios = {b: times[label].ratio(times[b]) for b in baselines if b in times and b != label}
        if counts:
            _count(found, calls[label], setting)
        runner.call = None
        yield found


def _count(found: Measurement, call: Call, setting: Setting) -> None:
    try:
        with memory.bounded():
            found.peak_bytes = memory.peak(call, setting.device)
        found.flops = flops.count(call)
    except (RuntimeError, NotImplementedError) as error:  # compiled code cannot be counted
        found.error = str(error).strip().partition("\n")[0]


def summarise(measurements: Sequence[Measurement], baselines: Sequence[str] = ("sdpa", "naive")) -> list[Summary]:
    """Growth exponents and efficiency lengths of every entrant, in the order of the measurements."""
    entrants = dict.fromkeys(m.entrant for m in measurements)
    return [_summary([m for m in measurements if m.entrant == e and m.status == "ok"], e, baselines) for e in entrants]


def _summary(own: Sequence[Measurement], entrant: str, baselines: Sequence[str]) -> Summary:
    # The shortest time grows most evenly: a disturbance only ever adds.
    fields = {"time": "best", "memory": "peak_bytes", "flops": "flops"}
    curves = {name: {m.length: getattr(m, key) for m in own if getattr(m, key)} for name, key in fields.items()}
    ratios = {b: {m.length: m.ratios[b] for m in own if b in m.ratios} for b in baselines if b != entrant}
    return Summary(
        entrant,
        {name: growth(curve) for name, curve in curves.items()},
        {b: efficiency_length(curve, dict.fromkeys(curve, 1.0)) for b, curve in ratios.items() if curve},
    )


def record(measurements: Sequence[Measurement], setting: Setting, baselines: Sequence[str]) -> dict[str, Any]:
    """What was measured, with its summary, setting and machine, as JSON holds it and the report draws it."""
    return {
        "setting": setting.as_dict(),
        "machine": machine(setting.device),
        "measurements": [m.as_dict() for m in measurements],
        "summary": [s.as_dict() for s in summarise(measurements, baselines)],
    }
