"""Parts of a page that a command writes: between two comments, anything else is left alone."""

from __future__ import annotations


def placed(text: str, name: str, part: str) -> str:
    """The page with ``part`` in the place of what stood under ``name``, or at its end."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    block = f"{start}\n{part}\n{end}"
    if start in text and end in text:
        return text[: text.index(start)] + block + text[text.index(end) + len(end) :]
    return f"{text.rstrip()}\n\n{block}\n"
