"""Writes the atlas when the site is built: a page for every row and the cheat sheet of all, from the cards alone."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

from crosslight import registry
from crosslight.cards import KINDS, PATTERNS

TICK = {True: "●", False: "·"}


def on_files(files: Files, config: Any) -> Files:
    entries = registry.index()
    pages = {"atlas/index.md": cheat_sheet(entries)} | {f"atlas/{id}.md": page(e) for id, e in entries.items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def link(paper: str) -> str:
    if not paper:
        return "none"
    if paper.startswith("http"):
        return f"[paper]({paper})"
    if paper[:4].isdigit() and "." in paper[:5]:
        return f"[arXiv {paper}](https://arxiv.org/abs/{paper})"
    return paper


def cheat_sheet(entries: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Atlas of rows",
        "",
        f"{len(entries)} registered systems. Made from their cards; every column is tested or measured.",
        "",
    ]
    for kind in KINDS:
        rows = [e for e in entries.values() if e["kind"] == kind]
        if not rows:
            continue
        lines += [f"## {kind}", ""]
        if any(e["patterns"] for e in rows):
            lines.append("| id | " + " | ".join(p.replace("-", " ") for p in PATTERNS))
            lines[-1] += " | cost | mask | decode | evidence |"
            lines.append("|---|" + ":-:|" * len(PATTERNS) + "---|---|---|---|")
            lines += [
                f"| [{e['id']}]({e['id']}.md) | "
                + " | ".join(TICK[p in e["patterns"]] for p in PATTERNS)
                + f" | {e['cost']} | {e['mask']} | {e['decode'] or '·'} | {e['status']} |"
                for e in rows
            ]
        else:
            lines += ["| id | year | what it does | evidence |", "|---|---|---|---|"]
            lines += [f"| [{e['id']}]({e['id']}.md) | {e['year']} | {e['summary']} | {e['status']} |" for e in rows]
        lines.append("")
    return "\n".join(lines)


def page(e: dict[str, Any]) -> str:
    facts = {
        "kind, group": f"{e['kind']}, {e['group']}",
        "paper": f"{e['title']} ({e['year']}), {link(e['paper'])}",
        "public code": e["code"] or "none named",
        "patterns": ", ".join(e["patterns"]),
        "not": e["why_not"],
        "cost": f"grows with {e['cost']}" if e["patterns"] else "",
        "mask": e["mask"] if e["patterns"] else "",
        "decoding": {"kv": "keys and values, grows with the length", "state": "a state of constant size"}.get(
            e["decode"] or "", ""
        ),
        "presets": ", ".join(e["presets"]),
        "checked against": e["checked"],
        "differs": e["differs"],
    }
    lines = [f"# {e['id']}", "", e["summary"], "", "| | |", "|---|---|"]
    lines += [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items() if value]
    lines += ["", "## What it computes", "", "```text", e["doc"], "```", "", "## Evidence", ""]
    evidence, result = e["evidence"], e["result"]
    if not evidence:
        lines.append("No learning claim; what it is checked against is named above.")
    else:
        lines += [
            f"Claim: {evidence['claim']}",
            "",
            f"Task `{evidence['task']}`, {evidence['metric']}, against `{evidence['baseline']}` with a margin of "
            f"{evidence['margin']}, {evidence['seeds']} seeds. Status: **{e['status']}**.",
        ]
        if result:
            lines += ["", f"Measured difference: {result['difference']:.4g} (better is positive)."]
        lines += ["", f"Run it again: `crosslight verify {e['id']}`."]
    return "\n".join(lines) + "\n"
