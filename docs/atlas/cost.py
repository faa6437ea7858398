"""Time and memory of a row against length, beside the baselines of its pattern, from ``bench/tokens.json``."""

from __future__ import annotations

import json
import math
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from atlas.text import NAMES, joined, seconds, size

TABLE = Path(__file__).parents[2] / "bench" / "tokens.json"
BASELINES = ("sdpa", "naive")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 240, 58, 14, 14, 34

Curve = dict[int, float]


@cache
def _read(path: Path, changed: float) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def table(path: Path) -> dict[str, Any]:
    """What `crosslight bench --table` wrote; without rows where there is no file."""
    return _read(path, path.stat().st_mtime) if path.exists() else {"rows": []}


def section(id: str, bench: dict[str, Any]) -> str:
    rows = [row for row in bench["rows"] if row["id"] == id]
    if not rows:
        return f"Time and memory were not measured. `crosslight bench --table {id}` measures them."
    others = {(row["id"], row["pattern"]): row for row in bench["rows"] if row["id"] in BASELINES}
    return "\n\n".join(
        [*(_row(row, [others.get((b, row["pattern"])) for b in BASELINES]) for row in rows), _setting(bench)]
    )


def _row(row: dict[str, Any], baselines: list[dict[str, Any] | None]) -> str:
    lines = [row, *(b for b in baselines if b and b["id"] != row["id"])]
    names = {b["id"]: b["id"] for b in lines}
    legend = "".join(f'<span class="{_ink(row, id)}"><i></i>{escape(id)}</span>' for id in names)
    options = ", ".join(f"{name}={value!r}" for name, value in (row.get("options") or {}).items())
    charts = "".join(
        chart(title, [(_ink(row, line["id"]), _curve(line, field)) for line in lines], unit)
        for title, field, unit in (("time of a call", "seconds", seconds), ("peak memory", "peak_bytes", size))
    )
    words = NAMES[row["pattern"]].capitalize() + (f", {options}" if options else "")
    return f'<div class="cost"><p>{escape(words)}. {legend}</p>{charts}</div>\n\n{_numbers(row)}\n\n{_said(row)}'


def _ink(row: dict[str, Any], id: str) -> str:
    return "own" if id == row["id"] else id


def _curve(row: dict[str, Any], field: str) -> Curve:
    measured = row["measured"].items()
    return {int(n): p[field] for n, p in measured if p["status"] == "ok" and (p.get(field) or 0) > 0}


def _numbers(row: dict[str, Any]) -> str:
    lines = ["| tokens | time | of sdpa | of naive | memory |", "|--:|--:|--:|--:|--:|"]
    for n, p in sorted(row["measured"].items(), key=lambda item: int(item[0])):
        ok = p["status"] == "ok"
        times = [f"{p[b]:.2g} ×" if ok and p.get(b) else "·" for b in BASELINES]
        memory = size(p["peak_bytes"]) if ok and p.get("peak_bytes") else "·"
        lines.append(
            f"| {int(n):,} | {seconds(p['seconds']) if ok else p['status']} | {' | '.join(times)} | {memory} |"
        )
    return "\n".join(lines)


def _said(row: dict[str, Any]) -> str:
    grows = row.get("growth") or {}
    said = [f"{name} as n^{value:.2f}" for name, value in grows.items() if value is not None]
    text = [f"Grows with the number n of tokens: {joined(said)}."] if said else []
    for baseline, length in (row.get("efficiency_length") or {}).items():
        if length and baseline != row["id"]:
            if length.startswith(">"):
                text.append(f"Not faster than {baseline} up to {length.lstrip('> ')} tokens.")
            else:
                least = " (the shortest measured) or before" if length.startswith("≤") else ""
                text.append(f"Faster than {baseline} from {length.lstrip('≤ ')} tokens{least} on.")
    if row.get("step_seconds"):
        text.append(f"A step of decoding takes {seconds(row['step_seconds'])}.")
    return " ".join(text)


def _setting(bench: dict[str, Any]) -> str:
    setting, machine = bench.get("setting", {}), bench.get("machine", {})
    told = [
        f"{name} {value}" for name, value in setting.items() if value not in ("", None, False) and name != "pattern"
    ]
    about = [str(machine[name]) for name in ("processor", "date") if machine.get(name)]
    threads = [f"{machine['threads']} threads"] if machine.get("threads") else []
    about[1:1] = threads
    return (
        f"Setting: {', '.join(told)}. Measured by `crosslight bench --table` on {', '.join(about) or 'one machine'}; "
        "of sdpa and of naive: the time as a multiple of theirs in the same run, which means more elsewhere than "
        "absolute times."
    )


def chart(title: str, curves: list[tuple[str, Curve]], unit: Any) -> str:
    """Values against length on logarithmic axes as SVG; nothing where nothing was measured."""
    values = [v for _, curve in curves for v in curve.values()]
    if not values:
        return ""
    lengths = sorted({n for _, curve in curves for n in curve})
    x = _axis(lengths[0], lengths[-1], LEFT, WIDTH - RIGHT)
    decades = _decades(min(values), max(values))
    y = _axis(decades[0], decades[-1], HEIGHT - BOTTOM, TOP)
    parts = []
    for d in decades[:: 1 + len(decades) // 6]:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(d):.1f}" y2="{y(d):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(d) + 4:.1f}" text-anchor="end">{unit(d)}</text>')
    for n in lengths:
        label = f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)
        parts.append(f'<text x="{x(n):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{label}</text>')
    for ink, curve in reversed(curves):  # the row itself on top
        points = [(x(n), y(v), f"{n:,} tokens: {unit(v)}") for n, v in sorted(curve.items())]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b, _ in points)
        dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4"><title>{t}</title></circle>' for a, b, t in points)
        parts.append(f'<g class="{ink}"><path d="M{path}"/>{dots}</g>' if points else "")
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title} against the number of tokens">{"".join(parts)}</svg></figure>'
    )


def _axis(low: float, high: float, start: float, end: float) -> Any:
    if low == high:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * math.log(value / low) / math.log(high / low)


def _decades(low: float, high: float) -> list[float]:
    first = math.floor(math.log10(low))
    last = max(math.ceil(math.log10(high)), first + 1)
    return [10.0**e for e in range(first, last + 1)]
