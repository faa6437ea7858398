"""`crosslight compare`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from crosslight import registry
from crosslight.cards import PATTERNS
from crosslight.cli.console import PatternOption, console, progress
from crosslight.errors import require

if TYPE_CHECKING:
    import pandas as pd

    from crosslight.bench import Measurement

#: Tokens at which the report measures time and memory.
LENGTHS = (256, 1024, 4096)


def compare(
    with_: Annotated[
        str | None,
        typer.Option("--with", metavar="IDS", help="Mechanisms, with options as moba:block_size=8,top_k=3."),
    ] = None,
    group: Annotated[str | None, typer.Option(help="All mechanisms of a group of the catalogue.")] = None,
    pattern: PatternOption = None,
    task: Annotated[str | None, typer.Option(metavar="NAMES", help="Tasks, such as digits,copy.")] = None,
    table: Annotated[Path | None, typer.Option(help="Your own table, .csv or .parquet.")] = None,
    target: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column of the table to predict.")] = None,
    goal: Annotated[
        str | None, typer.Option(help="forecast, classify or regress; from the table unless given.")
    ] = None,
    fill: Annotated[
        bool, typer.Option("--fill", help="Fill missing values of the table, except the target's; else an error.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="Your own text, for a language model.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trials of each mechanism on each task.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Training steps of a trial.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Training time of a trial, instead of steps.")] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core on the CPU, else 1.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the store; its trials are not repeated.")] = Path(
        "crosslight-runs"
    ),
    report: Annotated[Path, typer.Option(help="The report, one HTML file.")] = Path("report.html"),
) -> None:
    """Train mechanisms on tasks under one budget, print a leaderboard a pattern and write a report.

    Without arguments: the default mechanisms on one bundled task for each attention pattern.
    """
    from crosslight import comparison
    from crosslight.comparison import cab, study
    from crosslight.comparison import report as page

    require("jinja2", "report")  # before training, not after it
    where = study.device_of(device)
    frame = comparison.compare(
        with_,
        tasks=task,
        pattern=pattern,
        group=group,
        seeds=seeds,
        steps=steps,
        seconds=seconds,
        batch_size=batch_size,
        lr=lr,
        dim=dim,
        heads=heads,
        depth=depth,
        device=where,
        workers=workers or (study.cores() if where == "cpu" else 1),
        out=out,
        table=table,
        target=target,
        goal=goal,
        fill=fill,
        text=text,
    )
    if os.environ.get("RANK", "0") != "0":  # of the processes of `accelerate launch` one tells
        return
    board = comparison.leaderboard(frame)
    screen = console()
    for name in dict.fromkeys(board.task):
        screen.print(_leaderboard(board[board.task == name]))
        if how := frame.attrs["about"].get(name):
            screen.print(how, style="dim", highlight=False, markup=False)
    if board.task.nunique() > 1:
        screen.print(_index(cab.index(board)))
    for note in frame.attrs["notes"]:
        screen.print(f"note: {note}", style="dim", highlight=False, markup=False)
    for row in frame[frame.status != "ok"].itertuples():
        screen.print(f"{row.status}: {row.task} {row.label} seed {row.seed}: {row.error}", style="red", markup=False)
    page.write(frame, report, bench=_curves(frame, where, dim, heads))
    screen.print(f"wrote {report}", highlight=False)


def _curves(frame: pd.DataFrame, device: str, dim: int | None, heads: int | None) -> dict[str, Any] | None:
    """Time and memory against length of the layers that were compared, in the pattern that most of them entered."""
    from crosslight.bench import Setting, record, sweep
    from crosslight.tasks.base import Entrant, Size

    layers = frame[frame.pattern.isin(PATTERNS) & (frame.status == "ok")].drop_duplicates(["pattern", "label"])
    if layers.empty:
        return None
    pattern = layers.pattern.value_counts().index[0]
    entrants = [frame.attrs["entrants"][label] for label in layers.label[layers.pattern == pattern]]
    entrants = [e for e in entrants if registry.card(e.id).kind == "token"]
    if not entrants:
        return None
    setting = Setting(pattern, dim or Size.dim, heads or Size.heads, device=device)
    done: list[Measurement] = []
    with progress() as shown:
        bar = shown.add_task("against length", total=len(LENGTHS) * (len(entrants) + 1))
        for m in sweep([*entrants, Entrant("sdpa")], LENGTHS, setting, rounds=3, limit=2.0, baselines=["sdpa"]):
            done.append(m)
            shown.advance(bar)
    return record(done, setting, ["sdpa"])


def _leaderboard(board: pd.DataFrame) -> Table:
    first = board.iloc[0]
    way = "higher is better" if first.higher_is_better else "lower is better"
    table = Table(title=f"{first.pattern or first.task} · {first.task} · {first.metric}, {way}", title_justify="left")
    for name in ("", "mechanism"):
        table.add_column(name)
    for name in (first.metric, "parameters", "FLOPs a step", "time a step", "peak memory"):
        table.add_column(str(name), justify="right")
    for rank, row in enumerate(board.itertuples(), start=1):
        table.add_row(
            str(rank),
            row.label,
            _score(row),
            _count(row.parameters),
            _count(row.flops),
            "" if math.isnan(row.step_ms) else f"{row.step_ms:.1f} ms",
            "" if math.isnan(row.memory) else f"{row.memory / 1e6:.1f} MB",
        )
    return table


def _score(row: Any) -> str:
    text = "" if math.isnan(row.mean) else f"{row.mean:.4f}"
    text += "" if math.isnan(row.spread) else f" ± {row.spread:.4f}"
    lost = [f"{n} {word}" for n, word in ((row.diverged, "diverged"), (row.failed, "failed")) if n]
    return " ".join([text, *([f"({', '.join(lost)})"] if lost else [])]).strip()


def _count(number: float) -> str:
    if math.isnan(number):
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f}"


def _index(index: pd.DataFrame) -> Table:
    table = Table(title="CAB's compositional index: mean z-score over tasks, higher is better", title_justify="left")
    names = [c for c in index.columns if c not in ("label", "index", "tasks")]
    for name in ("mechanism", "index", "tasks", *names):
        table.add_column(name, justify="left" if name == "mechanism" else "right")
    for _, row in index.iterrows():
        z = ["" if math.isnan(row[name]) else f"{row[name]:+.2f}" for name in names]
        table.add_row(row.label, f"{row['index']:+.3f}", f"{row.tasks} of {len(names)}", *z)
    return table
