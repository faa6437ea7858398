"""The command line, `crosslight`. Its modules import no torch: a command loads what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from crosslight import __version__
from crosslight.cli.bench import bench
from crosslight.cli.compare import compare
from crosslight.cli.index import index
from crosslight.cli.list import find, list_
from crosslight.cli.new import new
from crosslight.cli.show import show
from crosslight.cli.verify import verify
from crosslight.errors import CrosslightError

app = typer.Typer(
    name="crosslight",
    help="Published attention mechanisms behind one contract: find, read, measure and compare them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"crosslight {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


app.command("list")(list_)
app.command("find")(find)
app.command("show")(show)
app.command("compare")(compare)
app.command("verify")(verify)
app.command("bench")(bench)
app.command("new")(new)
app.command("index")(index)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    try:
        app()
    except CrosslightError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
