"""Cards: what a registered system says of itself. This module imports no torch, so that listing stays instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from crosslight.errors import expect

Pattern = Literal["noncausal-self", "causal-self", "noncausal-cross", "causal-cross"]
Kind = Literal["token", "map", "fusion", "model", "control", "explain", "training", "bench", "system", "survey"]
Cost = Literal["1", "n", "n log n", "n sqrt n", "n^2", "n^3"]

PATTERNS: tuple[str, ...] = get_args(Pattern)
KINDS: tuple[str, ...] = get_args(Kind)
#: Exponent by which time grows with the number of tokens, as the conformance suite holds it (log factors: 1.2).
GROWTH: dict[str, float] = {"1": 0.0, "n": 1.0, "n log n": 1.2, "n sqrt n": 1.5, "n^2": 2.0, "n^3": 3.0}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One claim of a paper as an experiment that `crosslight verify` runs through `compare`.

    It holds when ``metric`` of the system is at least ``margin`` better than that of ``baseline``, in the mean
    over ``seeds``. "Better" follows the task's metric: higher for an accuracy, lower for a loss. A negative margin
    states "not worse by more than". Of several tasks, separated by commas, ``metric`` "index" is CAB's compositional
    index over them.

    Attributes:
        entrant: the id that enters, where it is not the card's own (a task or an index is shown by what it ranks).
    """

    claim: str
    task: str
    metric: str
    margin: float
    baseline: str = "softmax"
    entrant: str | None = None
    seeds: int = 3
    task_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    baseline_options: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a system is, what it can do and what it costs. Every field is tested, not believed.

    Attributes:
        id: the id of the catalogue; also the file name (``-`` as ``_``), the CLI name and the doc page.
        paper: arXiv number, DOI or address.
        summary: one sentence: what it does that plain multi-head attention does not.
        patterns: attention patterns it has (kind token).
        why_not: why a pattern is missing, in a sentence.
        cost: growth of time with the number of tokens n at the paper's settings.
        mask: "any" boolean mask, "keys" (key padding only) or "none".
        decode: what `step` carries along: "kv" (grows with the length), "state" (constant), or None.
        linear_in_values: whether the output is linear in the values, so that fast path = read(weights).
        small: options under which the conformance suite builds it at width 16 with 2 heads.
        checked: what its output is held equal to (public implementation, published count, exact invariant).
        differs: where paper, released code and catalogue differ, and which is followed.
    """

    id: str
    kind: Kind
    group: str
    title: str
    year: int
    paper: str
    summary: str
    code: str | None = None
    patterns: tuple[Pattern, ...] = ()
    why_not: str = ""
    cost: Cost = "n^2"
    mask: Literal["any", "keys", "none"] = "any"
    decode: Literal["kv", "state"] | None = None
    linear_in_values: bool = True
    small: Mapping[str, Any] = field(default_factory=dict)
    checked: str = ""
    differs: str = ""
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        expect(self.kind in KINDS, "Card.kind", repr(self.kind), f"one of {', '.join(KINDS)}")
        expect(self.cost in GROWTH, "Card.cost", repr(self.cost), f"one of {', '.join(GROWTH)}")
        unknown = set(self.patterns) - set(PATTERNS)
        expect(not unknown, "Card.patterns", sorted(unknown), f"some of {', '.join(PATTERNS)}")

    @property
    def growth(self) -> float:
        """Declared growth exponent of time with n."""
        return GROWTH[self.cost]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Card:
        values = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        if values.get("evidence"):
            values["evidence"] = Evidence(**values["evidence"])
        return cls(**{**values, "patterns": tuple(values.get("patterns", ()))})
