"""Writes the atlas when the site is built: a page for every row and the cheat sheet of all."""

from __future__ import annotations

from typing import Any

from atlas import cost, pages, weights
from mkdocs.structure.files import File, Files

from crosslight import registry


def on_files(files: Files, config: Any) -> Files:
    entries, bench = registry.index(), cost.table(cost.TABLE)
    content: dict[str, str | bytes] = {"index.md": pages.cheat_sheet(entries), **weights.shared()}
    for id, entry in entries.items():
        content[f"{id}.md"] = pages.page(entry, bench)
        if entry["kind"] in weights.KINDS:
            content |= {f"{id}/{name}": image for name, image in weights.files(id).items()}
    for path, text in content.items():
        files.append(File.generated(config, f"atlas/{path}", content=text))
    return files
