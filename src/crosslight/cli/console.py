"""What the commands share: consoles, the options that choose cards, files that are never half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from crosslight.cards import GROWTH, KINDS, PATTERNS

KindOption = Annotated[str | None, typer.Option("--kind", help=f"One of {', '.join(KINDS)}.")]
PatternOption = Annotated[str | None, typer.Option("--pattern", help=f"One of {', '.join(PATTERNS)}.")]
CostOption = Annotated[str | None, typer.Option("--cost", help=f"At most this growth: {', '.join(GROWTH)}.")]
GroupOption = Annotated[str | None, typer.Option("--group", help="A group of the catalogue, such as 'linear'.")]
DecodeOption = Annotated[
    str | None, typer.Option("--decode", help="What decoding carries along: kv, or a state of constant size: state.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def console() -> Console:
    """The terminal; a pipe has no width of its own and gets enough for whole tables."""
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, 160))


def errors() -> Console:
    """Where progress goes, so that a pipe gets results only."""
    return Console(stderr=True)


def progress(*, counted: bool = True) -> Progress:
    """A bar on a terminal's stderr, nothing in a pipe; without a count only what is under way, and since when."""
    counts = (BarColumn(), MofNCompleteColumn()) if counted else ()
    columns = (TextColumn("{task.description}"), *counts, TimeElapsedColumn())
    return Progress(*columns, console=errors(), transient=True, disable=not errors().is_terminal)


def write_whole(path: Path, text: str) -> None:
    """Write in one step, so that neither a reader nor a kill finds half a file."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # a temporary file is private
    os.replace(file.name, path)
