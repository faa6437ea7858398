"""The outcome of a row's claim: a value for every seed of entrant and baseline, and what was needed."""

from __future__ import annotations

from html import escape
from typing import Any

from atlas.text import joined, score, short


def section(entry: dict[str, Any]) -> str:
    evidence, result = entry["evidence"], entry["result"]
    if not evidence:
        return "No learning claim; what it is checked against is named below."
    lines = [
        f"Claim: {evidence['claim']}",
        "",
        f"Task `{evidence['task']}`, {evidence['metric'].replace('_', ' ')}, {evidence['seeds']} seeds; "
        f"{_needed(evidence['margin'])}.",
        "",
    ]
    if not result:
        lines.append(f"**Unverified**: this has not been run yet. `crosslight verify {entry['id']}` runs it.")
    elif not result.get("values"):
        lines.append(f"**Not reproduced**: a trial failed. `{result.get('error', 'no reason was kept')}`")
    else:
        lines += [f"**{entry['status'].capitalize()}**: {_outcome(result)}.", "", strip(result), "", _numbers(result)]
    if result:
        lines += ["", f"Run it again: `crosslight verify {entry['id']}`."]
    return "\n".join(lines)


def _needed(margin: float) -> str:
    if margin > 0:
        return f"it must be better than the baseline by {short(margin)}"
    return f"it may be worse than the baseline by {short(-margin)}" if margin else "it must not be worse"


def _outcome(result: dict[str, Any]) -> str:
    difference, margin = result["difference"], result["margin"]
    found = f"{'better' if difference >= 0 else 'worse'} than `{result['baseline']}` by {score(abs(difference))}"
    if margin > 0:
        return f"{found}, {short(margin)} is needed"
    return f"{found}, {short(-margin)} worse is allowed" if margin else found


def _numbers(result: dict[str, Any]) -> str:
    rows = [(result["entrant"], result["values"]), (result["baseline"], result["baseline_values"])]
    lines = ["| | every seed | mean |", "|---|---|--:|"]
    lines += [f"| `{name}` | {joined([score(v) for v in vs])} | {score(_mean(vs))} |" for name, vs in rows]
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def strip(result: dict[str, Any]) -> str:
    """Dots for the seeds, a stroke for each mean, and a dashed line at what the entrant's mean has to reach."""
    ours, theirs = result["values"], result["baseline_values"]
    # The difference is positive where the entrant is better; the metric itself may be a loss.
    sign = -1 if (_mean(ours) - _mean(theirs)) * result["difference"] < 0 else 1
    goal = _mean(theirs) + sign * result["margin"]
    low, high = min(*ours, *theirs, goal), max(*ours, *theirs, goal)
    pad = 0.08 * (high - low) or 0.5

    def at(value: float) -> str:
        return f"{100 * (value - low + pad) / (high - low + 2 * pad):.2f}%"

    def line(values: list[float], own: str) -> str:
        mean, dashes = at(_mean(values)), at(goal)
        dots = "".join(f'<circle cx="{at(v)}" cy="50%" r="5"><title>{score(v)}</title></circle>' for v in values)
        return (
            f'<svg class="{own}" role="img" aria-label="{escape(joined([score(v) for v in values]))}">'
            f'<line class="base" x1="0" x2="100%" y1="50%" y2="50%"/>'
            f'<line class="goal" x1="{dashes}" x2="{dashes}" y1="0" y2="100%"/>'
            f'<line class="mean" x1="{mean}" x2="{mean}" y1="15%" y2="85%"/>{dots}</svg>'
        )

    better = "higher is better" if sign > 0 else "lower is better"
    return (
        '<div class="seeds">'
        f"<span>{escape(result['entrant'])}</span>{line(ours, 'entrant')}"
        f"<span>{escape(result['baseline'])}</span>{line(theirs, 'baseline')}"
        f'<span></span><p class="ends"><span>{score(low)}</span><span>{escape(result["metric"].replace("_", " "))}, '
        f"{better}</span><span>{score(high)}</span></p>"
        f'<span></span><p class="note">A dot is a seed, the stroke a mean; the dashed line, at {score(goal)}, is '
        "what the mean of the row must reach.</p></div>"
    )
