"""`crosslight show`: one system with its equations, cost, options and evidence."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from crosslight import registry
from crosslight.cards import PATTERNS, Card, Evidence
from crosslight.cli.console import JsonOption, console
from crosslight.cli.list import STYLES, as_json, status


def address(reference: str) -> str:
    """A link for an arXiv number, a DOI or an address."""
    if reference.startswith("http"):
        return reference
    if reference.startswith("10."):
        return f"https://doi.org/{reference}"
    number = reference.removeprefix("arXiv:").strip()
    return f"https://arxiv.org/abs/{number}" if any(c.isdigit() for c in number) else reference


def _facts(card: Card, entry: dict[str, Any]) -> Table:
    has = ", ".join(p for p in PATTERNS if p in card.patterns)
    facts = {
        "paper": f"{card.title}, {card.year}\n{address(card.paper)}",
        "code": f"https://github.com/{card.code}" if card.code and "://" not in card.code else card.code,
        "kind": f"{card.kind}, {card.group}",
        "patterns": has,
        "not": card.why_not,
        "cost": f"{card.cost} in the number of tokens n",
        "mask": {"any": "any boolean mask", "keys": "key padding", "none": "none"}[card.mask]
        if card.kind == "token"
        else "",
        "decode": {"kv": "keys and values of all tokens so far", "state": "a state of constant size"}.get(
            card.decode or "", ""
        ),
        "presets": ", ".join(entry.get("presets", ())),
        "options": ", ".join(
            name if default is None else f"{name}={default}" for name, default in entry.get("options", {}).items()
        ),
        "checked": card.checked,
        "differs": card.differs,
        "module": entry.get("module", ""),
    }
    out = Table.grid(padding=(0, 2))
    out.add_column(style="dim", no_wrap=True)
    out.add_column()
    for name, value in facts.items():
        if value:
            out.add_row(name, Text(value))
    return out


def _test(evidence: Evidence) -> str:
    against = evidence.baseline + "".join(f" {k}={v}" for k, v in evidence.baseline_options.items())
    bound = f"by at least {evidence.margin:g}" if evidence.margin >= 0 else f"or worse by at most {-evidence.margin:g}"
    return f"{evidence.metric} of task {evidence.task}, better than {against} {bound}, {evidence.seeds} seeds"


def _evidence(card: Card, entry: dict[str, Any]) -> Table:
    evidence, result = card.evidence, entry.get("result") or {}
    assert evidence is not None
    outcome = status(card.id)
    facts: dict[str, str | Text] = {
        "claim": evidence.claim,
        "test": _test(evidence),
        "outcome": Text(outcome, style=STYLES.get(outcome, "")),
    }
    if "values" in result:
        for name, label in (("values", "entrant"), ("baseline_values", "baseline")):
            facts[str(result[label])] = ", ".join(f"{v:.4g}" for v in result[name])
        facts["better by"] = f"{result['difference']:+.4g}"
    if result.get("error"):
        facts["error"] = str(result["error"])
    out = Table.grid(padding=(0, 2))
    out.add_column(style="dim", no_wrap=True)
    out.add_column()
    for name, value in facts.items():
        out.add_row(name, value if isinstance(value, Text) else Text(value))
    return out


def _page(screen: Console, card: Card, entry: dict[str, Any]) -> None:
    screen.print(Text(card.id, style="bold"))
    screen.print(Text(card.summary))
    screen.print()
    screen.print(_facts(card, entry))
    if entry.get("doc"):
        screen.print(Rule("equations", align="left", style="dim"))
        screen.print(Text(entry["doc"]))
    if card.evidence is not None:
        screen.print(Rule("evidence", align="left", style="dim"))
        screen.print(_evidence(card, entry))


def show(
    id: Annotated[str, typer.Argument(help="A registered id, such as 'moba'.")], json_: JsonOption = False
) -> None:
    """Show a system: card, equations, cost, options and evidence."""
    card, entry = registry.card(id), registry.index().get(id, {})
    if json_:
        extra = {name: entry.get(name) for name in ("doc", "options", "presets", "result")}
        print(json.dumps(as_json(card) | extra, indent=1, ensure_ascii=False))
    else:
        _page(console(), card, entry)
