"""Numbers and names in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import dedent

NAMES = {
    "noncausal-self": "self-attention",
    "causal-self": "causal self-attention",
    "noncausal-cross": "cross-attention",
    "causal-cross": "causal cross-attention",
}


def short(value: float, digits: int = 2) -> str:
    """``0.32``, ``−1.5``, ``0``."""
    return f"{value:.{digits}g}".replace("-", "−")


def score(value: float) -> str:
    """Three figures: ``0.793``, ``1.00``, ``−0.0350``."""
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value / 1e-6:.3g} µs"


def size(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} B"


def joined(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def prose(doc: str) -> str:
    """A docstring as Markdown: its indented parts, the equations, as text blocks, and the rest as it is written."""
    parts: list[tuple[bool, str]] = []
    for paragraph in re.split(r"\n{2,}", doc.strip("\n")):
        indented = paragraph.startswith("    ")
        if indented and parts and parts[-1][0]:  # equations with an empty line between
            paragraph = f"{parts.pop()[1]}\n\n{paragraph}"
        parts.append((indented, paragraph))
    return "\n\n".join(f"```text\n{dedent(p)}\n```" if indented else _plain(p) for indented, p in parts)


def _plain(paragraph: str) -> str:
    """No sign is markup but backticks."""
    pieces = re.split(r"(``.+?``|`[^`]+`)", paragraph, flags=re.DOTALL)
    signs = re.compile(r"[\\*_\[\]<>#&{}]|^[-+]", re.MULTILINE)
    return "".join(p if p.startswith("`") else signs.sub(lambda found: f"&#{ord(found[0])};", p) for p in pieces)
