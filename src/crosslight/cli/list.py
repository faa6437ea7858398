"""`crosslight list` and `crosslight find`: cards as a table or as JSON, from the shipped index."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from crosslight import registry
from crosslight.cards import PATTERNS, Card
from crosslight.cli.console import (
    CostOption,
    DecodeOption,
    GroupOption,
    JsonOption,
    KindOption,
    PatternOption,
    console,
)
from crosslight.errors import expect

STYLES = {"reproduced": "green", "not reproduced": "yellow", "unverified": "dim", "baseline": "cyan"}


def status(id: str) -> str:
    return registry.index().get(id, {}).get("status", "unverified")


def as_json(card: Card) -> dict[str, Any]:
    return card.as_dict() | {"status": status(card.id), "module": registry.index().get(card.id, {}).get("module")}


def table(cards: list[Card], width: int) -> Table:
    """The cards, a line each; a narrow terminal gets fewer columns rather than cut ids."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["id", "kind", "group", "patterns", "cost", "evidence", "title"]
    if width < 130:
        columns.remove("title")
    if width < 90:
        columns.remove("group")
    for name in columns:
        out.add_column(name, no_wrap=name != "title", style="bold" if name == "id" else None)
    for card in cards:
        outcome = status(card.id)
        cells: dict[str, str | Text] = {
            "id": card.id,
            "kind": card.kind,
            "group": card.group,
            "patterns": "".join("●" if p in card.patterns else "·" for p in PATTERNS) if card.patterns else "",
            "cost": card.cost,
            "evidence": Text(outcome, style=STYLES.get(outcome, "")),
            "title": f"{card.title} ({card.year})",
        }
        out.add_row(*(cells[name] for name in columns))
    return out


def _print(cards: list[Card], as_array: bool) -> None:
    if as_array:
        print(json.dumps([as_json(card) for card in cards], indent=1, ensure_ascii=False))
    else:
        screen = console()
        screen.print(table(cards, screen.width))
        screen.print(
            f"\n{len(cards)} of {len(registry.ids())} cards. Patterns: self, causal self, cross, causal cross. "
            "`crosslight show ID` has more.",
            style="dim",
            highlight=False,
        )


def _check(group: str | None, decode: str | None) -> None:
    """What the registry takes as it is: a word that no card has would find nothing, without a reason."""
    for name, word in (("group", group), ("decode", decode)):
        known = sorted({getattr(registry.card(id), name) for id in registry.ids()} - {"", None})
        expect(word is None or word in known, name, repr(word), f"one of {', '.join(known)}")


def list_(
    kind: KindOption = None,
    pattern: PatternOption = None,
    cost: CostOption = None,
    group: GroupOption = None,
    decode: DecodeOption = None,
    json_: JsonOption = False,
) -> None:
    """List the registered systems."""
    _check(group, decode)
    _print(registry.find(kind=kind, pattern=pattern, cost=cost, group=group, decode=decode), json_)


def find(
    words: Annotated[list[str], typer.Argument(help="Words that id, title, summary, group or kind must hold.")],
    kind: KindOption = None,
    pattern: PatternOption = None,
    cost: CostOption = None,
    group: GroupOption = None,
    decode: DecodeOption = None,
    json_: JsonOption = False,
) -> None:
    """List the systems whose card holds every word. Leaves with exit code 1 if there is none."""
    _check(group, decode)
    asked: dict[str, Any] = {"kind": kind, "pattern": pattern, "cost": cost, "group": group, "decode": decode}
    words = " ".join(words).split()
    cards = registry.find(words, **asked)
    if cards or json_:
        _print(cards, json_)
    else:
        alone = ", ".join(f"{word!r} {len(registry.find(word, **asked))}" for word in words)
        print(f"No card holds all of it. Cards that hold one word: {alone}.")
    if not cards:
        raise typer.Exit(1)
