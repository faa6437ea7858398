"""Which attention to use, read off the measured table; `crosslight bench --table` writes it into docs/choosing.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosslight import registry
from crosslight.bench import marked
from crosslight.bench.baselines import BASELINES

#: How many rows an answer names.
NAMED = 6
TITLES = {
    "causal-self": "Causal self-attention: language, series",
    "noncausal-self": "Noncausal self-attention: images, sets, encoders",
    "noncausal-cross": "Noncausal cross-attention: a few queries, or one stream on another",
    "causal-cross": "Causal cross-attention: a decoder reading its source",
}

Row = Mapping[str, Any]


def files(root: Path, record: Mapping[str, Any]) -> dict[Path, str]:
    page = root / "docs" / "choosing.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Choosing a mechanism\n"
    return {page: marked.placed(text, "measured", section(record))}


def section(record: Mapping[str, Any]) -> str:
    """The answers, as Markdown."""
    about = record["machine"]
    lines = [
        "## What the measurements say",
        "",
        f"Read off the [table of all rows](performance.md), taken on {about['date']} on {about['processor']}, "
        f"{about['threads']} threads; written by `crosslight bench --table`. In brackets the time, or the memory, as a "
        "multiple of `nn.Linear` + SDPA in the same pattern and at the same length; forward + backward, width 512, "
        "8 heads. A row in bold has evidence that reproduced. Each row stands under the one pattern that it was "
        "measured in. Fast is not good: [compare quality on your data](comparing.md).",
    ]
    for pattern, title in TITLES.items():
        rows = [r for r in record["rows"] if r["pattern"] == pattern and not _is_baseline(r["id"])]
        base = next((r for r in record["rows"] if r["pattern"] == pattern and r["id"] == "sdpa"), None)
        if rows and base is not None:
            lines += ["", f"### {title}", "", *_by_length(rows, base)]
    decoding = [r for r in record["rows"] if r["step_seconds"] is not None and not _is_baseline(r["id"])]
    if decoding:
        lines += ["", "### Decoding after 16,384 tokens", "", *_decoding(decoding)]
    return "\n".join(lines)


def _is_baseline(id: str) -> bool:
    return id in BASELINES or registry.card(id).group == "baseline"


def _by_length(rows: Sequence[Row], base: Row) -> list[str]:
    lines = ["| tokens | SDPA | faster, the fastest first | least memory |", "|--:|--:|---|---|"]
    for n, point in base["measured"].items():
        fast = sorted(
            (p["sdpa"], r["id"]) for r in rows if (p := r["measured"][n])["sdpa"] is not None and p["sdpa"] < 1
        )
        held = sorted((p["peak_bytes"], r["id"]) for r in rows if (p := r["measured"][n])["peak_bytes"] is not None)
        if not fast and point["seconds"] is None:  # no baseline at this length: the times alone
            timed = sorted((p["seconds"], r["id"]) for r in rows if (p := r["measured"][n])["seconds"] is not None)
            quick = ", ".join(f"{_name(id)} ({s:.3g} s)" for s, id in timed[:NAMED])
        else:
            quick = ", ".join(f"{_name(id)} ({ratio:.2g}×)" for ratio, id in fast[:NAMED])
            quick += f" and {len(fast) - NAMED} more" if len(fast) > NAMED else ""
        own = point["peak_bytes"]
        small = ", ".join(f"{_name(id)} ({_share(size, own)})" for size, id in held[:NAMED])
        taken = point["status"] if point["seconds"] is None else f"{point['seconds']:.3g} s"
        lines.append(f"| {int(n):,} | {taken} | {quick or 'none'} | {small} |")
    return lines


def _share(size: int, own: int | None) -> str:
    return f"{size / 2**20:,.0f} MiB" if own is None else f"{size / own:.2g}×"


def _decoding(rows: Sequence[Row]) -> list[str]:
    lines = ["| carries | rows, the fastest first | time a token |", "|---|---|--:|"]
    for kind, what in (("state", "a state of constant size"), ("kv", "keys and values")):
        found = sorted((r["step_seconds"], r["id"]) for r in rows if registry.card(r["id"]).decode == kind)
        named = found[: 2 * NAMED]
        if named:
            ids = ", ".join(_name(id) for _, id in named)
            lines.append(f"| {what} | {ids} | {1e3 * named[0][0]:.2g} to {1e3 * named[-1][0]:.2g} ms |")
    return lines


def _name(id: str) -> str:
    link = f"[{id}](atlas/{id}.md)"
    return f"**{link}**" if registry.index()[id]["status"] == "reproduced" else link
