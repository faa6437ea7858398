"""Every row of kind token against length, with the decoding time of a token: `crosslight bench --table`."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosslight import registry
from crosslight.attention.base import AttentionLayer, Core, How, LayerCache, Mechanism
from crosslight.bench import guide, marked, memory, timing
from crosslight.bench.baselines import BASELINES
from crosslight.bench.calls import DTYPES, Call, Prepared, Setting, built, fitting, home
from crosslight.bench.curves import efficiency_length, growth
from crosslight.bench.machine import machine
from crosslight.cards import Card
from crosslight.engines.cache import KVCache
from crosslight.errors import CrosslightError, expect
from crosslight.tasks.base import Entrant

K = 1024
LENGTHS = (K, 4 * K, 16 * K, 64 * K)
#: The length at which a decoding step is timed.
DECODED = 16 * K
BASELINE_IDS = ("sdpa", "naive")
#: The order of the table.
PATTERNS = ("causal-self", "noncausal-self", "noncausal-cross", "causal-cross")

Status = Literal["ok", "out of memory", "over time", "failed"]


@dataclass(frozen=True)
class Limits:
    """What a measurement may take: seconds a call (of a row that is declared sub-quadratic, of others, of a baseline),
    seconds from which a baseline's first call is not made again, seconds of a call that still takes turns, seconds of
    rounds at a length, seconds to fill a cache."""

    subquadratic: float = 60.0
    call: float = 40.0
    baseline: float = 300.0
    again: float = 60.0
    turn: float = 20.0
    rounds: float = 2.0
    fill: float = 40.0


@dataclass
class Point:
    """A row at one length. ``sdpa`` and ``naive``: its time as a multiple of theirs.

    They are taken in the same rounds as long as calls are short, and otherwise against the baseline's own entry.
    """

    status: Status
    seconds: float | None = None
    peak_bytes: int | None = None
    sdpa: float | None = None
    naive: float | None = None
    error: str = ""


@dataclass
class Row:
    """A row, or a baseline, of the table."""

    id: str
    pattern: str
    source: str
    measured: dict[int, Point] = field(default_factory=dict)
    step_seconds: float | None = None
    step_error: str = ""

    def curve(self, name: str) -> dict[int, float]:
        return {n: value for n, p in self.measured.items() if (value := getattr(p, name)) is not None}

    def line(self) -> str:
        cells = [
            f"{_ms(p.seconds)} at {n:,}" if p.seconds else f"{p.status} at {n:,}" for n, p in self.measured.items()
        ]
        return f"{self.id}, {self.pattern}: {', '.join(cells)}" + (
            f", {_ms(self.step_seconds)} a step" if self.step_seconds else ""
        )

    def as_dict(self) -> dict[str, Any]:
        crossings = {b: efficiency_length(c := self.curve(b), dict.fromkeys(c, 1.0)) for b in BASELINE_IDS}
        return {
            "id": self.id,
            "pattern": self.pattern,
            "source": self.source,
            "measured": {str(n): vars(point) for n, point in self.measured.items()},
            # Short calls have a fixed part, so the exponent is that of the longer half.
            "growth": {
                "time": growth({n: s for n, s in self.curve("seconds").items() if n >= 4 * K}),
                "memory": growth({n: s for n, s in self.curve("peak_bytes").items() if n >= 4 * K}),
            },
            "efficiency_length": {b: str(c) if c else None for b, c in crossings.items()},
            "step_seconds": self.step_seconds,
            "step_error": self.step_error,
        }

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Row:
        measured = {int(n): Point(**point) for n, point in known["measured"].items()}
        return cls(known["id"], known["pattern"], known["source"], measured, known["step_seconds"], known["step_error"])


class Table:
    """The rows measured so far; `measure` goes on with those that are missing."""

    def __init__(
        self,
        device: str = "cpu",
        known: Mapping[str, Any] | None = None,
        *,
        lengths: Sequence[int] = LENGTHS,
        decoded: int = DECODED,
        limits: Limits = Limits(),
    ) -> None:
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
        self.setting = Setting(dtype=dtype, device=device)
        self.lengths, self.decoded, self.limits = lengths, decoded, limits
        self.machine = machine(device)
        self.rows: dict[tuple[str, str], Row] = {}
        if known and self._alike(known):
            self.rows = {(row.id, row.pattern): row for row in map(Row.of, known["rows"])}
        self._calls: dict[tuple[str, int], Call] = {}

    def _alike(self, known: Mapping[str, Any]) -> bool:
        """Figures of another machine or setting are not mixed with those of this one."""
        about = ("processor", "cores", "threads", "torch")
        same = all(known["machine"].get(name) == self.machine[name] for name in about)
        return bool(same and known["setting"] == self.setting.as_dict())

    def measure(
        self, ids: Sequence[str] = (), started: Callable[[str, int], None] = lambda id, n: None
    ) -> Iterator[Row]:
        """Measure the rows of ``ids`` again, or all that are missing or whose code has changed.

        Args:
            started: called with the id and the length before each measurement, for a progress bar.

        Raises:
            CrosslightError: an id that is no row of kind token.
        """
        for pattern, wanted in self._wanted(ids).items():
            for baseline in BASELINE_IDS:
                if (baseline, pattern) not in self.rows:
                    yield self._row(Entrant(baseline), pattern, "", None, started)
            for card in wanted:
                yield self._row(Entrant(card.id), pattern, registry.source_of(card.id), card, started)
            self._calls.clear()

    def _wanted(self, ids: Sequence[str]) -> dict[str, list[Card]]:
        cards = {card.id: card for card in registry.find(kind="token")}
        for id in ids:
            expect(id in cards, "id", repr(id), "a row of kind token")
        found: dict[str, list[Card]] = {}
        for card in cards.values():
            pattern = home(card)
            known = self.rows.get((card.id, pattern))
            if card.id in ids or (not ids and (known is None or known.source != registry.source_of(card.id))):
                found.setdefault(pattern, []).append(card)
        return found

    def _row(
        self, entrant: Entrant, pattern: str, source: str, card: Card | None, started: Callable[[str, int], None]
    ) -> Row:
        row = Row(entrant.id, pattern, source)
        for n in self.lengths:
            started(entrant.id, n)
            row.measured[n] = self._point(entrant, row, card, n)
        if card is not None and card.decode is not None:
            started(entrant.id, 1)
            try:
                row.step_seconds = self._step(card)
            except (CrosslightError, RuntimeError, MemoryError) as error:
                row.step_error = _first(error)
        self.rows[row.id, row.pattern] = row
        return row

    def _point(self, entrant: Entrant, row: Row, card: Card | None, n: int) -> Point:
        refused = self._hopeless(row, 2.0 if card is None else card.growth, n)
        if refused is not None:
            return refused
        try:
            with memory.bounded():
                call = self._call(entrant, row.pattern, n)
                start = time.perf_counter()
                peak = memory.peak(call, self.setting.device)  # the first call: it fills caches as well
                first = time.perf_counter() - start
                if entrant.id not in BASELINES or first < self.limits.again:  # few operators, so watched at no cost
                    first = timing.once(call, self.setting.device)
        except (CrosslightError, RuntimeError, MemoryError) as error:
            return Point("out of memory" if memory.is_out_of_memory(error) else "failed", error=_first(error))
        return self._timed(entrant, row.pattern, call, first, peak, n)

    def _hopeless(self, row: Row, exponent: float, n: int) -> Point | None:
        """What the last length says of this one: no room, or more time than a call may take."""
        if not row.measured:
            return None
        last, point = list(row.measured.items())[-1]
        if point.seconds is None or point.peak_bytes is None:
            return Point(point.status, error=point.error)
        times = (n / last) ** exponent
        own = self.limits.subquadratic if exponent < 2 else self.limits.call
        limit = self.limits.baseline if row.id in BASELINES else own
        if point.seconds * times > limit:
            return Point("over time", error=f"about {point.seconds * times:.0f} s a call expected")
        free = memory.available()
        if free is not None and point.peak_bytes * times > free:
            return Point("out of memory", error=f"about {point.peak_bytes * times / 2**30:.0f} GiB expected")
        return None

    def _call(self, entrant: Entrant, pattern: str, n: int) -> Call:
        setting = Setting(**{**self.setting.as_dict(), "pattern": pattern})
        return Prepared(entrant if entrant.id in BASELINES else fitting(entrant.id, n), setting).call(n)

    def _timed(self, entrant: Entrant, pattern: str, call: Call, first: float, peak: int, n: int) -> Point:
        beside = {
            b: seconds
            for b in BASELINE_IDS
            if (b, pattern) in self.rows and (seconds := self.rows[b, pattern].measured[n].seconds) is not None
        }
        point = Point("ok", first, peak)
        for b, seconds in beside.items():
            setattr(point, b, first / seconds)
        turns = [b for b, seconds in beside.items() if seconds < self.limits.turn]
        rounds = min(9, int(self.limits.rounds / (first + sum(beside[b] for b in turns))))
        if first > self.limits.turn or (rounds == 0 and not turns):
            return point
        calls = {entrant.id: call, **{b: self._baseline(b, pattern, n) for b in turns}}
        times = timing.interleaved(calls, max(1, rounds), device=self.setting.device)
        own = times[entrant.id]
        point.seconds = own.median
        for b, seconds in beside.items():
            setattr(point, b, own.ratio(times[b]) if b in turns else own.median / seconds)
        return point

    def _baseline(self, id: str, pattern: str, n: int) -> Call:
        """The call of a baseline, warm."""
        if (id, n) not in self._calls:
            self._calls[id, n] = self._call(Entrant(id), pattern, n)
            self._calls[id, n]()
        return self._calls[id, n]

    def _step(self, card: Card) -> float:
        """Seconds of decoding one token after ``decoded`` others."""
        layer, n = self._layer(card.id), self.decoded
        generator = torch.Generator(self.setting.device).manual_seed(0)
        x = torch.randn(1, n + 40, self.setting.dim, generator=generator, **self.setting.factory)
        context = None if any(pattern.endswith("self") for pattern in card.patterns) else x[:, :n]
        with torch.no_grad():
            cache = self._filled(layer, x[:, :n]) if context is None else None
            taken = []
            for i in range(n, n + 40):
                first = {"context": context} if cache is None else {}

                def step(token: Tensor = x[:, i : i + 1], first: dict[str, Any] = first) -> None:
                    nonlocal cache
                    _, cache = layer.step(token, cache, **first)

                taken.append(timing.once(step, self.setting.device))
        return statistics.median(taken[8:])  # the first one may enlarge the cache

    def _layer(self, id: str) -> Mechanism:
        layer = built(fitting(id, 2 * self.decoded), self.setting, dim=self.setting.dim, heads=self.setting.heads)
        assert isinstance(layer, Mechanism)
        return layer.eval()

    def _filled(self, layer: Mechanism, x: Tensor) -> Any:
        """The cache after the tokens of ``x``."""
        if (
            isinstance(layer, AttentionLayer)
            and type(layer)._step is AttentionLayer._step
            and type(layer.core).step is Core.step
        ):
            _, k, v = layer._heads(x, x, How(causal=True))
            return LayerCache(x.shape[1], KVCache.start(k.contiguous(), v.contiguous()))
        if "causal-self" not in layer.card.patterns:  # the first call takes all tokens that read ahead
            return layer.step(x)[1]
        cache, start, size = None, time.perf_counter(), self._at_once(layer, x)
        for part in x.split(size, 1):
            _, cache = layer.step(part, cache)
            if time.perf_counter() - start > self.limits.fill:
                raise CrosslightError(f"a cache of {self.decoded:,} tokens takes more than {self.limits.fill:.0f} s")
        return cache

    def _at_once(self, layer: Mechanism, x: Tensor) -> int:
        """How many tokens a step may take: several, where that gives what it gives one by one."""
        several, alone = None, None
        try:
            for part in x[:, :96].split(32, 1):
                y, several = layer.step(part, several)
                for token in part.split(1, 1):
                    z, alone = layer.step(token, alone)
        except (CrosslightError, RuntimeError, IndexError, ValueError):
            return 1
        close = y.shape == part.shape and torch.allclose(y[:, -1:], z, rtol=1e-3, atol=1e-4)
        return 32 if close and self._size(several) == self._size(alone) else 1

    @staticmethod
    def _size(cache: Any) -> int:
        """Numbers that a cache holds."""
        leaves, total = [cache], 0
        while leaves:
            held = leaves.pop()
            if isinstance(held, Tensor):
                total += held.numel()
            elif dataclasses.is_dataclass(held):
                leaves += vars(held).values()
            elif isinstance(held, (list, tuple)):
                leaves += held
        return total

    def as_dict(self) -> dict[str, Any]:
        order = {card.id: i for i, card in enumerate(registry.find(kind="token"))}
        rows = sorted(self.rows.values(), key=lambda r: (PATTERNS.index(r.pattern), order.get(r.id, -1)))
        return {
            "machine": self.machine,
            "setting": self.setting.as_dict(),
            "rows": [row.as_dict() for row in rows if row.id in BASELINES or row.id in order],
        }


def _first(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def path(root: Path, device: str) -> Path:
    """The file of a device's table."""
    kind = torch.device(device).type
    return root / "bench" / ("tokens.json" if kind == "cpu" else f"tokens.{kind}.json")


def files(root: Path, device: str, table: Table) -> dict[Path, str]:
    """What to write where: the figures, this device's tables in docs/performance.md, and what they say to a reader of
    docs/choosing.md."""
    record, page = table.as_dict(), root / "docs" / "performance.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Performance\n"
    kind = torch.device(device).type
    return {
        path(root, device): json.dumps(record, indent=1) + "\n",
        page: marked.placed(text, f"tokens: {kind}", section(record)),
        **(guide.files(root, record) if kind == "cpu" else {}),
    }


def section(record: Mapping[str, Any]) -> str:
    """The tables of a record, as Markdown."""
    about, rows = record["machine"], record["rows"]
    lengths = [n for n in LENGTHS if any(str(n) in row["measured"] for row in rows)]
    device = record["setting"]["device"]
    command = "crosslight bench --table" + ("" if device == "cpu" else f" --device {device}")
    lines = [
        f"## All rows of kind token on {'a CPU' if device == 'cpu' else 'a GPU'}",
        "",
        f"Taken on {about['date']} with `{command}` on {about['processor']}, {about['threads']} threads, torch "
        f"{about['torch']}: the whole layer, width 512, 8 heads, batch 1, {record['setting']['dtype']}. Each row in "
        "the pattern of the task of its evidence; one that learns its queries in noncausal-cross.",
        "",
        "Time is forward + backward, and beside it the multiple of the time of `nn.Linear` + SDPA in the same pattern, "
        "in the same rounds (of long calls, against its own entry). The process keeps the memory that it frees, and "
        "subnormal numbers are zero, for all alike. `n^` is the growth exponent from 4,096 on. "
        "*Faster from* is the efficiency length of CAB: where the row gets faster than SDPA, and than the softmax "
        "matrix written out. A step is one token decoded after 16,384.",
        "",
        "| row | pattern | "
        + " | ".join(f"{n:,}" for n in lengths)
        + " | n^ | faster than SDPA from | than naive | step |",
        "|---|---|" + "--:|" * (len(lengths) + 4),
    ]
    lines += [_times(row, lengths) for row in rows]
    lines += [
        "",
        "Peak memory of forward + backward beyond the input and the parameters:",
        "",
        "| row | " + " | ".join(f"{n:,}" for n in lengths) + " | n^ |",
        "|---|" + "--:|" * (len(lengths) + 1),
    ]
    lines += [_memories(row, lengths) for row in rows]
    slow = losers(record)
    lines += ["", f"Sub-quadratic rows that are not faster than SDPA at 16,384: {', '.join(slow) or 'none'}."]
    wide = [f"{id} ({times:.1f} at {n:,})" for id, times, n in hungry(record)]
    lines += [
        "",
        "Sub-quadratic rows whose pass holds more than 8 times the bytes of q, k, v and output at the longest length "
        f"measured, in these bytes: {', '.join(wide) or 'none'}.",
    ]
    return "\n".join(lines)


def losers(record: Mapping[str, Any], n: int = 16 * K) -> list[str]:
    """Sub-quadratic rows that SDPA beats at ``n``."""
    found = []
    for row in record["rows"]:
        if row["id"] in BASELINES or registry.card(row["id"]).growth >= 2:
            continue
        ratio = row["measured"][str(n)]["sdpa"]
        if ratio is None or ratio >= 1:
            found.append(row["id"])
    return found


def hungry(record: Mapping[str, Any], limit: float = 8.0) -> list[tuple[str, float, int]]:
    """Sub-quadratic rows that hold more than ``limit`` times the bytes of q, k, v and output: id, times and length."""
    setting, found = record["setting"], []
    token = 4 * setting["dim"] * DTYPES[setting["dtype"]].itemsize
    for row in record["rows"]:
        held = {int(n): p["peak_bytes"] for n, p in row["measured"].items() if p["peak_bytes"] is not None}
        if row["id"] in BASELINES or registry.card(row["id"]).growth >= 2 or not held:
            continue
        n = max(held)
        if held[n] > limit * token * n:
            found.append((row["id"], held[n] / (token * n), n))
    return found


def _name(row: Mapping[str, Any]) -> str:
    return f"*{row['id']}*" if row["id"] in BASELINES else f"[{row['id']}](atlas/{row['id']}.md)"


def _times(row: Mapping[str, Any], lengths: Sequence[int]) -> str:
    cells = []
    for n in lengths:
        point = row["measured"][str(n)]
        ratio = "" if point["sdpa"] is None else f" ({point['sdpa']:.2g}×)"
        cells.append(point["status"] if point["seconds"] is None else f"{_ms(point['seconds'])}{ratio}")
    step = "" if row["step_seconds"] is None else _ms(row["step_seconds"])
    crossings = [row["efficiency_length"][b] or "" for b in BASELINE_IDS]
    return f"| {_name(row)} | {row['pattern']} | {' | '.join([*cells, _power(row, 'time'), *crossings, step])} |"


def _memories(row: Mapping[str, Any], lengths: Sequence[int]) -> str:
    points = [row["measured"][str(n)] for n in lengths]
    cells = [p["status"] if p["peak_bytes"] is None else f"{p['peak_bytes'] / 2**20:,.0f} MiB" for p in points]
    return f"| {_name(row)} | {' | '.join([*cells, _power(row, 'memory')])} |"


def _power(row: Mapping[str, Any], name: str) -> str:
    return "" if row["growth"][name] is None else f"{row['growth'][name]:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
