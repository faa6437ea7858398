"""The report of a comparison: one HTML file that needs no network.

The page is a Jinja template with its style and script beside it (``templates/``). Attention maps travel inside as
bytes on a square-root scale, compressed; the page colours them.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crosslight
from crosslight import registry
from crosslight.errors import CrosslightError, UnknownId, expect, require

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

Records = Sequence[Mapping[str, Any]]

#: Order of the patterns on the page.
PATTERNS = {
    "noncausal-self": "self-attention",
    "causal-self": "causal self-attention",
    "noncausal-cross": "cross-attention",
    "causal-cross": "causal cross-attention",
}


def write(
    trials: pd.DataFrame | Records,
    path: str | Path,
    weights_dir: str | Path | None = None,
    *,
    bench: Mapping[str, Any] | str | Path | None = None,
) -> Path:
    """Write the report of the trials.

    Args:
        trials: the frame that `crosslight.compare` returns, or records of its store; may be empty.
        path: the HTML file.
        weights_dir: folder with ``<trial key>.pt``; the one of the frame's own store unless given.
        bench: what ``crosslight bench --json`` wrote, as a file or as its content, for the curves against length.

    Returns:
        The path.

    Raises:
        MissingExtra: jinja2 is not installed.
        CrosslightError: a file that cannot be read or written.
    """
    path = Path(path)
    page = render(trials, weights_dir, bench=bench)
    try:
        part = path.with_name(f".{path.name}.part")
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise CrosslightError(f"path: got {path}, expected a file that can be written ({error.strerror})") from error
    return path


def render(
    trials: pd.DataFrame | Records,
    weights_dir: str | Path | None = None,
    *,
    bench: Mapping[str, Any] | str | Path | None = None,
) -> str:
    """The page as text; see `write`."""
    jinja2 = require("jinja2", "report")
    if weights_dir is None:
        out = getattr(trials, "attrs", {}).get("out")
        weights_dir = None if out is None else Path(out) / "weights"
    tasks = _tasks(trials, None if weights_dir is None else Path(weights_dir)) if len(trials) else []
    curves = _curves(bench)
    # Baselines keep the same two inks on every page; the others take the palette in order.
    names = list(
        dict.fromkeys([r["label"] for t in tasks for r in t["rows"]] + [m["entrant"] for m in curves["points"]])
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crosslight.comparison"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"amount": amount, "bytes": in_bytes, "milliseconds": milliseconds, "score": score}
    return environment.get_template("report.html").render(
        tasks=tasks,
        index=_index(trials) if len(tasks) > 1 else [],
        problems=_problems(trials) if len(trials) else [],
        notes=list(getattr(trials, "attrs", {}).get("notes", [])),
        cards=[_card(id) for id in dict.fromkeys(r["id"] for t in tasks for r in t["rows"])],
        inks=_inks(names),
        bench=curves,
        date=datetime.date.today().strftime("%-d %B %Y") if os.name != "nt" else datetime.date.today().isoformat(),
        version=crosslight.__version__,
        data={
            "tasks": [_for_script(t) for t in tasks],
            "bench": curves,
            "inks": _inks(names),
        },
    )


def _frame(trials: Any) -> Any:
    from crosslight.comparison.study import as_frame

    return trials if hasattr(trials, "groupby") else as_frame(trials)


def _tasks(trials: Any, weights: Path | None) -> list[dict[str, Any]]:
    """Each task with its leaderboard and, where they were kept, what its entrants attend to."""
    from crosslight.comparison.leaderboard import leaderboard

    frame = _frame(trials)
    board = leaderboard(frame)
    order = {pattern: i for i, pattern in enumerate(PATTERNS)}
    found = []
    for name in dict.fromkeys(board.task):
        rows = [
            _row(row, frame[(frame.task == name) & (frame.label == row["label"])], weights)
            for row in board[board.task == name].to_dict("records")
        ]
        first = board[board.task == name].iloc[0]
        means = [r["mean"] for r in rows if r["mean"] is not None]
        found.append(
            {
                "name": str(name),
                "pattern": first.pattern if isinstance(first.pattern, str) else None,
                "title": PATTERNS.get(first.pattern, str(name)),
                "about": getattr(trials, "attrs", {}).get("about", {}).get(name) or _about(str(name)),
                "metric": str(first.metric).replace("_", " "),
                "higher": bool(first.higher_is_better) if first.higher_is_better is not None else True,
                "rows": rows,
                "range": _range([s for r in rows for s in r["scores"]]),
                "best": means[0] if means else None,
                "seeds": max((r["seeds"] for r in rows), default=0),
            }
        )
    return sorted(found, key=lambda t: order.get(t["pattern"] or "", len(order)))


def _row(row: dict[str, Any], trials: Any, weights: Path | None) -> dict[str, Any]:
    good = trials[trials.status == "ok"]
    maps = next((m for key in good.key for m in [_maps(weights, key)] if m), None)
    return {
        "id": row["id"],
        "label": row["label"],
        "options": row["label"].removeprefix(row["id"]).strip("()"),
        "baseline": _group(row["id"]) == "baseline",
        "mean": _number(row["mean"]),
        "spread": _number(row["spread"]),
        "scores": [s for s in map(_number, good.score) if s is not None],
        "maps": maps,
        **{name: int(row[name]) for name in ("seeds", "diverged", "failed")},
        **{name: _number(row[name]) for name in ("parameters", "flops", "memory", "step_ms")},
    }


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _range(scores: Sequence[float]) -> tuple[float, float]:
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    pad = 0.06 * (high - low) or 1.0
    return low - pad, high + pad


def _about(task: str) -> str:
    from crosslight import tasks

    try:
        doc = tasks.find(task).__doc__ or ""
    except CrosslightError:  # a task of another process, whose module is not at hand
        return ""
    return " ".join(doc.strip().partition("\n\n")[0].replace("``", "").split())


def _group(id: str) -> str:
    try:
        return registry.card(id).group
    except UnknownId:
        return ""


def _card(id: str) -> dict[str, Any]:
    """What the page says of a system, with the address of its paper."""
    try:
        card = registry.card(id)
    except UnknownId:
        return {"id": id, "title": "", "year": "", "cost": "", "summary": "", "link": None}
    link = card.paper
    if not link.startswith("http"):
        link = f"https://doi.org/{link}" if link.startswith("10.") else f"https://arxiv.org/abs/{link}"
    known = card.paper[:1].isdigit() or card.paper.startswith("http")
    return {
        "id": id,
        "title": card.title,
        "year": card.year,
        "cost": card.cost,
        "summary": card.summary,
        "link": link if known else None,
    }


def _index(trials: Any) -> list[dict[str, Any]]:
    """CAB's compositional index, the best first."""
    from crosslight.comparison import cab
    from crosslight.comparison.leaderboard import leaderboard

    rows = cab.index(leaderboard(_frame(trials))).to_dict("records")
    return [{**{k: r[k] for k in ("label", "tasks")}, "index": _number(r["index"])} for r in rows]


def _problems(trials: Any) -> list[dict[str, Any]]:
    frame = _frame(trials)
    return frame[frame.status != "ok"][["status", "task", "label", "seed", "error"]].to_dict("records")


def _inks(names: Sequence[str]) -> dict[str, int]:
    """Name -> which ink of the palette draws it on every chart; 0 and 1 are the baselines'."""
    fixed = {"softmax": 0, "sdpa": 0, "mean-pooling": 1, "naive": 1}
    others = [n for n in names if n not in fixed]
    return {**{n: fixed[n] for n in names if n in fixed}, **{n: 2 + i % 10 for i, n in enumerate(others)}}


def _for_script(task: Mapping[str, Any]) -> dict[str, Any]:
    wanted = (
        "id",
        "label",
        "options",
        "baseline",
        "mean",
        "spread",
        "parameters",
        "flops",
        "memory",
        "step_ms",
        "maps",
    )
    return {
        **{k: task[k] for k in ("name", "title", "metric", "higher")},
        "rows": [{k: row[k] for k in wanted} for row in task["rows"]],
    }


# Attention maps ----------------------------------------------------------------------------------------------------
def _maps(folder: Path | None, key: str) -> dict[str, Any] | None:
    """The kept weights of one trial, packed for the page; None where there are none."""
    path = None if folder is None else folder / f"{key}.pt"
    if path is None or not path.exists():
        return None
    import torch

    kept = torch.load(path, map_location="cpu", weights_only=True)
    layers = [_layer(m) for m in kept["maps"] if m.dim() == 3 and m.numel()]
    if not layers:
        return None
    image = kept.get("image")
    return {
        "layers": layers,
        "rows": [str(t) for t in kept["rows"]],
        "columns": [str(t) for t in kept["columns"]],
        "image": None if image is None else _image(image),
    }


def _layer(maps: Tensor) -> dict[str, Any]:
    """(heads, n, m) as signed bytes b with weight = sign(b) (b / 127)^2 scale, a scale a head, and compressed."""
    maps = maps.float().nan_to_num()
    scale = maps.abs().amax((1, 2)).clamp_min(1e-12)
    packed = (maps.sign() * (maps.abs() / scale[:, None, None]).sqrt() * 127).round().char()
    heads, n, m = maps.shape
    data = base64.b64encode(zlib.compress(bytes(packed.view(-1).byte().tolist()), 9)).decode()
    return {"heads": heads, "n": n, "m": m, "scale": [float(f"{s:.4g}") for s in scale.tolist()], "data": data}


def _image(image: Tensor) -> list[list[int]]:
    """(height, width), or with channels before or after, as grey values from 0 to 255."""
    image = image.float().squeeze()
    if image.dim() == 3:
        image = image.mean(0 if image.shape[0] <= 4 else -1)
    image = image - image.min()
    return (255 * image / image.max().clamp_min(1e-12)).round().int().tolist()


# Curves against length ---------------------------------------------------------------------------------------------
def _curves(bench: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """Points and summary of what `crosslight bench` measured, and its setting in words."""
    empty: dict[str, Any] = {"points": [], "summary": [], "setting": "", "machine": ""}
    if bench is None:
        return empty
    if isinstance(bench, str | Path):
        try:
            bench = json.loads(Path(bench).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CrosslightError(
                f"bench: got {bench}, expected a file of `crosslight bench --json` ({error})"
            ) from error
    assert isinstance(bench, Mapping)
    expect("measurements" in bench, "bench", ", ".join(bench), "what `crosslight bench --json` wrote")
    fields = ("entrant", "length", "status", "best", "peak_bytes", "flops")
    s, about = bench.get("setting", {}), bench.get("machine", {})
    setting = (
        f"{s.get('pattern')}, width {s.get('dim')}, {s.get('heads')} heads, batch {s.get('batch')}, {s.get('dtype')}, "
        f"{'forward + backward' if s.get('backward') else 'forward'}, "
        f"{'layer with projections' if s.get('level') == 'layer' else 'between heads'}"
        + (f", mask {s['mask']}" if s.get("mask") else "")
    )
    return {
        "points": [{k: m.get(k) for k in fields} for m in bench["measurements"]],
        "summary": [_growth(row) for row in bench.get("summary", ())],
        "setting": setting,
        "machine": f"{about.get('processor')}, {about.get('threads')} threads, torch {about.get('torch')}",
    }


def _growth(row: Mapping[str, Any]) -> dict[str, Any]:
    signs = {"at": "", "at most": "≤ ", "above": "> "}
    crossings = {k: f"{signs[c['bound']]}{c['length']:,.0f}" if c else "" for k, c in row["efficiency_length"].items()}
    return {"entrant": row["entrant"], "growth": row["growth"], "crossings": crossings}


# Numbers in words --------------------------------------------------------------------------------------------------
def amount(value: float | None) -> str:
    """``19.6 k``."""
    if value is None:
        return "–"
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g}"


def in_bytes(value: float | None) -> str:
    return "–" if value is None else f"{amount(value)}B"


def milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"


def score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
