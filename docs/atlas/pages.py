"""The pages of the atlas: one a row, and the cheat sheet of all."""

from __future__ import annotations

from typing import Any

from atlas import cost, evidence, weights
from atlas.text import prose
from crosslight.cards import KINDS, PATTERNS

TICK = {True: "●", False: "·"}


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
    gallery = _gallery(entries)
    if gallery:
        lines += ["## One picture, every mechanism", "", gallery, ""]
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


def _gallery(entries: dict[str, dict[str, Any]]) -> str:
    """A map of each row on the same example, as a link to its page."""
    shown = {id: weights.thumbnail(id) for id, e in entries.items() if e["kind"] in weights.KINDS}
    tiles = [
        f'<a href="{id}/"><img src="{id}/{name}" alt="" loading="lazy"><span>{id}</span></a>'
        for id, name in shown.items()
        if name
    ]
    if not tiles:
        return ""
    return (
        "What each layer, untrained, reads of the same digit of 64 pixels: a row is a pixel that asks, a column one "
        "that is read, and bright is much. The page of a row has its heads, its equations and its cost.\n\n"
        f'<div class="gallery">{"".join(tiles)}</div>'
    )


def page(e: dict[str, Any], bench: dict[str, Any]) -> str:
    facts = {
        "kind, group": f"{e['kind']}, {e['group']}",
        "paper": f"{e['title']} ({e['year']}), {link(e['paper'])}",
        "public code": e["code"] or "none named",
        "patterns": ", ".join(e["patterns"]),
        "missing patterns": e["why_not"],
        "cost": f"grows with {e['cost']}" if e["patterns"] else "",
        "mask": e["mask"] if e["patterns"] else "",
        "decoding": {"kv": "keys and values, grows with the length", "state": "a state of constant size"}.get(
            e["decode"] or "", ""
        ),
        "presets": ", ".join(e["presets"]),
    }
    said = {"Checked against": e["checked"], "Differs": e["differs"]}
    sections = {
        "What it reads": weights.section(e["id"]) if e["kind"] in weights.KINDS else "",
        "What it computes": prose(e["doc"]),
        "Cost": cost.section(e["id"], bench) if e["kind"] == "token" else "",
        "Evidence": evidence.section(e),
        "Faithfulness": "\n\n".join(f"{name}: {text}" for name, text in said.items() if text),
    }
    lines = [f"# {e['id']}", "", e["summary"], "", "| | |", "|---|---|"]
    lines += [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items() if value]
    for title, text in sections.items():
        if text:
            lines += ["", f"## {title}", "", text]
    return "\n".join(lines) + "\n"
