"""What `crosslight compare` runs where the user says nothing."""

from __future__ import annotations

from crosslight.errors import expect
from crosslight.tasks import Entrant

#: One task a pattern.
TASKS = ("digits", "language", "forecast", "spelling")

#: They stand in every table: what is not attention, and what everybody uses.
BASELINES = (Entrant("mean-pooling"), Entrant("softmax"))

#: Options fit the 48 to 128 tokens of the bundled tasks: one block of 512 would be full attention there.
MECHANISMS = (
    Entrant("sigmoid-attention"),
    Entrant("agent-attention", {"agents": 16}),
    Entrant("efficient-attention"),
    Entrant("lightning-attention"),
    Entrant("moba", {"block_size": 8, "top_k": 3}),
)


def parse(text: str) -> list[Entrant]:
    """Entrants as the command line writes them: ``softmax,moba:block_size=8,top_k=3``.

    A part with ``=`` and without ``:`` is one more option of the entrant before it.
    """
    found: list[tuple[str, dict[str, object]]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        id, colon, option = part.partition(":")
        if colon or "=" not in part:
            found.append((id.strip(), {}))
        else:
            option = part
            expect(bool(found), "with", repr(part), "an id before its options, such as moba:block_size=8,top_k=3")
        if option:
            name, equals, value = option.partition("=")
            expect(bool(equals), "with", repr(part), "options as name=value, such as moba:block_size=8,top_k=3")
            found[-1][1][name.strip()] = _value(value.strip())
    return [Entrant(id, options) for id, options in found]


def _value(text: str) -> object:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
