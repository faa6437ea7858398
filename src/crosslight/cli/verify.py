"""`crosslight verify`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from crosslight.cli import checkout
from crosslight.cli.console import console
from crosslight.errors import expect


def verify(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Cards to verify.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every card that declares evidence.")] = False,
    changed: Annotated[
        bool, typer.Option("--changed", help="Cards whose code is not that of their last outcome.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the CPU unless given.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core on the CPU, else 1.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the store; its trials are not repeated.")] = Path(
        "crosslight-runs"
    ),
    results: Annotated[
        Path | None, typer.Option(help="File that outcomes are appended to; evidence/results.jsonl unless given.")
    ] = None,
) -> None:
    """Train a row and its baseline as its card declares, over seeds, and record whether the claim holds."""
    asked = [bool(ids), all_, changed]
    expect(sum(asked) == 1, "verify", f"{sum(asked)} of ID, --all and --changed", "exactly one of them")
    from crosslight.comparison import study
    from crosslight.comparison import verify as evidence

    where = study.device_of(device or "cpu")
    file = results or checkout.root() / "evidence" / "results.jsonl"
    chosen = list(dict.fromkeys(ids)) if ids else evidence.with_evidence()
    if changed:
        chosen = evidence.changed(chosen, file, where)
    screen = console()
    outcomes = evidence.verify(
        chosen,
        out=out,
        results=file,
        device=where,
        workers=workers or (study.cores() if where == "cpu" else 1),
        ended=lambda outcome: screen.print(_told(outcome), highlight=False, soft_wrap=True),
    )
    held = sum(outcome["holds"] for outcome in outcomes)
    screen.print(f"{held} of {len(outcomes)} reproduced; recorded in {file}", highlight=False, soft_wrap=True)


def _told(outcome: dict[str, Any]) -> str:
    word = "[green]reproduced[/]" if outcome["holds"] else "[red]not reproduced[/]"
    lines = [f"[bold]{outcome['id']}[/]: {word} · {outcome['claim']}"]
    if "error" in outcome:
        return "\n".join([*lines, f"  {outcome['error']}".replace("[", r"\[")])
    lines.append(
        f"  {outcome['task']} {outcome['metric']}: {_mean(outcome['values'])} against "
        f"{_mean(outcome['baseline_values'])} of {outcome['baseline']}; better by {outcome['difference']:+.4f}, "
        f"the margin is {outcome['margin']:+g}"
    )
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"
