"""`crosslight bench`: time, memory and FLOPs against length."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from crosslight import registry
from crosslight.cli import checkout
from crosslight.cli.console import console, errors, progress, write_whole
from crosslight.errors import expect, require

if TYPE_CHECKING:
    from crosslight.bench import Measurement, Summary


def parse_length(text: str) -> int:
    """``4096``, ``4k``, ``1m``."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in ("k", "m") else (text, "")
    expect(number.isdigit() and int(number) > 0, "--lengths", repr(text), "numbers such as 512, 4k or 1m")
    return int(number) * {"": 1, "k": 1024, "m": 1024**2}[unit]


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.2g} µs"


def scaled(value: float, unit: str, step: int) -> str:
    """``3.1 MB``, ``12 GFLOP``."""
    prefixes = ("", "k" if step == 1000 else "Ki", *("MGTP" if step == 1000 else ("Mi", "Gi", "Ti", "Pi")))
    power = 0
    while value >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    return f"{value:.3g} {prefixes[power]}{unit}"


def _cell(m: Measurement, name: str) -> str:
    if m.status != "ok":
        return f"[dim]{m.status}[/]"
    if name == "time":
        ratio = m.ratios.get("sdpa")
        return f"{seconds(m.seconds or 0)}" + (f" [dim]×{ratio:.2f}[/]" if ratio is not None else "")
    value = m.peak_bytes if name == "memory" else m.flops
    if value is None:
        return "[dim]-[/]"
    return scaled(value, "B", 1024) if name == "memory" else scaled(value, "FLOP", 1000)


def tables(measurements: Sequence[Measurement], summaries: Sequence[Summary], counts: bool) -> list[Table]:
    """A table each for time, memory and FLOPs: a row an entrant, a column a length."""
    lengths = sorted({m.length for m in measurements})
    cells = {(m.entrant, m.length): m for m in measurements}
    against = list(dict.fromkeys(b for s in summaries for b in s.efficiency_length))
    out = []
    for name in ("time", "memory", "flops") if counts else ("time",):
        title = {"time": "time a call (× sdpa)", "memory": "peak memory beyond the input", "flops": "FLOPs"}[name]
        table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim")
        table.add_column("", no_wrap=True)
        for n in lengths:
            table.add_column(f"{n:,}", justify="right", no_wrap=True)
        table.add_column("n^", justify="right", no_wrap=True)
        for baseline in against if name == "time" else ():
            table.add_column(f"faster than\n{baseline} from", justify="right", no_wrap=True)
        for s in summaries:
            exponent = s.growth[name]
            row = [s.entrant, *(_cell(cells[s.entrant, n], name) if (s.entrant, n) in cells else "" for n in lengths)]
            row.append("" if exponent is None else f"{exponent:.2f}")
            row += [str(s.efficiency_length.get(b) or "") for b in against if name == "time"]
            table.add_row(*row)
        out.append(table)
    return out


def _figures(device: str) -> None:
    from crosslight.bench import figures

    root = checkout.root()
    _taken(figures.take, device, "figures reached", lambda taken: figures.files(root, device, taken))


def _public(device: str, rows: Sequence[str]) -> None:
    from crosslight.bench import public

    root, take = checkout.root(), partial(public.take, rows=rows)
    # Some rows alone are shown, as the page holds all.
    _taken(take, device, "at most as slow", lambda taken: {} if rows else public.files(root, device, taken))


def _taken(
    take: Callable[[str, Callable[[str], None]], Iterator[Any]],
    device: str,
    reached: str,
    files: Callable[[Sequence[Any]], Mapping[Path, str]],
) -> None:
    """Show figures as they come, and write them each time."""
    taken = []
    with progress(counted=False) as shown:
        bar = shown.add_task("")
        for found in take(device, lambda name: shown.update(bar, description=name)):
            taken.append(found)
            shown.console.print(found.line(), highlight=False, markup=False, soft_wrap=True)
            _write(files(taken))
    missed = [found.name for found in taken if not found.holds]
    print(f"{len(taken) - len(missed)} of {len(taken)} {reached}" + "".join(f"\n  not: {m}" for m in missed))


def _table(device: str, ids: Sequence[str]) -> None:
    from crosslight.bench import table

    root = checkout.root()
    record = table.path(root, device)
    rows = table.Table(device, json.loads(record.read_text(encoding="utf-8")) if record.exists() else None)
    with progress(counted=False) as shown:
        bar = shown.add_task("")
        for row in rows.measure(ids, started=lambda id, n: shown.update(bar, description=f"{id} at {n:,}")):
            shown.console.print(row.line(), highlight=False, markup=False, soft_wrap=True)
            _write(table.files(root, device, rows))
    _write(table.files(root, device, rows))  # nothing may have been missing
    print(f"{len(rows.rows)} rows in {record.relative_to(root)}, tables in docs/performance.md")


def _write(files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, text)


def bench(
    entrants: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID[:OPTION=VALUE,…]]…",
            help="What to measure, such as 'moba:block_size=128,top_k=8', or a baseline: sdpa, naive, flex. "
            "All rows of kind token that have the pattern, unless given.",
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Numbers of tokens, such as 512,4k,16k.")] = "512,1k,2k,4k",
    pattern: Annotated[str, typer.Option(help="Attention pattern.")] = "causal-self",
    dim: Annotated[int, typer.Option(help="Width.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    mask: Annotated[str, typer.Option(help="A rule, such as 'window:256 | sink:4'.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    backward: Annotated[bool, typer.Option("--backward/--forward", help="With gradients, or without.")] = True,
    level: Annotated[str, typer.Option(help="'layer', or 'core': between projected heads.")] = "layer",
    against: Annotated[str, typer.Option(help="Baselines to measure beside.")] = "sdpa,naive",
    rounds: Annotated[int, typer.Option(min=1, help="Times each call is timed.")] = 5,
    limit: Annotated[float, typer.Option(min=0, help="Seconds that a call may take.")] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    counts: Annotated[bool, typer.Option("--counts/--no-counts", help="Also memory and FLOPs.")] = True,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures to FILE as they come.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Write a chart to FILE.html.")] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Take the project's own figures and write docs/performance.md.")
    ] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Measure all rows of kind token, or those given, for docs/performance.md; resumes."
        ),
    ] = False,
    public: Annotated[
        bool,
        typer.Option("--public", help="Measure rows beside public implementations, and write docs/performance.md."),
    ] = False,
) -> None:
    """Measure time, memory and FLOPs against length.

    Calls take turns, and ratios are medians over pairs in the same round. "faster than sdpa from" is the efficiency
    length of CAB: the shortest length at which a method is faster than exact attention.
    """
    for path in (json_, chart):
        expect(path is None or path.parent.is_dir(), "file", path, "a file in a folder that exists")
    expect(chart is None or chart.suffix == ".html", "--chart", chart, "a name that ends in .html")
    if chart is not None:
        require("jinja2", "report")
    import torch

    from crosslight.bench.machine import steady

    steady()  # before any other thread of torch starts, which takes the setting over
    if threads is not None:
        torch.set_num_threads(threads)
    if figures:
        _figures(device)
        return
    if table:
        _table(device, entrants or ())
        return
    if public:
        _public(device, entrants or ())
        return
    from crosslight.bench import Setting, record, summarise, sweep
    from crosslight.comparison.defaults import parse

    setting = Setting(pattern, dim, heads, batch, mask, dtype, device, backward, level)  # type: ignore[arg-type]
    baselines = [b.strip() for b in against.split(",") if b.strip()]
    chosen = entrants or [c.id for c in registry.find(kind="token", pattern=pattern)]
    measured = list({e.label: e for text in [*chosen, *baselines] for e in parse(text)}.values())
    sizes = sorted({parse_length(text.strip()) for text in lengths.split(",")})
    done: list[Measurement] = []

    with progress() as shown:
        bar = shown.add_task("", total=len(measured) * len(sizes))
        for m in sweep(
            measured,
            sizes,
            setting,
            rounds=rounds,
            limit=limit,
            baselines=baselines,
            counts=counts,
            started=lambda label, n: shown.update(bar, description=f"{label} at {n:,}"),
        ):
            done.append(m)
            shown.advance(bar)
            if not errors().is_terminal:
                print(f"{m.entrant} at {m.length:,}: {seconds(m.best) if m.best else m.status}", file=sys.stderr)
            if json_ is not None:
                write_whole(json_, json.dumps(record(done, setting, baselines), indent=1) + "\n")
    screen = console()
    place = {e.label: i for i, e in enumerate(measured)}
    done.sort(key=lambda m: (m.length, place[m.entrant]))
    for part in tables(done, summarise(done, baselines), counts):
        screen.print(part, "")
    for text in dict.fromkeys(f"{m.entrant}: {m.status}: {m.error}" for m in done if m.error):
        screen.print(text, style="dim", markup=False, highlight=False)
    if chart is not None:
        from crosslight.comparison import report

        report.write([], chart, bench=record(done, setting, baselines))
        print(f"wrote {chart}")
