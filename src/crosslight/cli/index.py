"""`crosslight index`: the index of cards, from which `list`, `find` and `show` answer without importing torch."""

from __future__ import annotations

import json
from pathlib import Path

from crosslight import registry
from crosslight.cli import checkout
from crosslight.cli.console import write_whole


def write(evidence: Path | None, to: Path) -> int:
    """Write the index of all registered cards in one step; returns how many there are."""
    entries = registry.build_index(evidence)
    write_whole(to, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    registry.index.cache_clear()
    return len(entries)


def index() -> None:
    """Rebuild the index of cards, after a card was added or changed (for contributors)."""
    count = write(checkout.root() / "evidence" / "results.jsonl", registry.INDEX)
    print(f"{count} cards in {registry.INDEX.name}")
