"""Cards: what they refuse, that they survive JSON, and that every registered one keeps the rule for finding things."""

import functools
import inspect
import json
import sys
from pathlib import Path

import pytest

from crosslight import registry, tasks
from crosslight.cards import GROWTH, Card, Evidence
from crosslight.errors import CrosslightError

TESTS = Path(__file__).parent


def card(**fields) -> Card:
    named = {"id": "x", "kind": "token", "group": "g", "title": "T", "year": 2020, "paper": "none", "summary": "S."}
    return Card(**{**named, **fields})


@pytest.mark.parametrize(
    ("fields", "argument"),
    [({"kind": "tokens"}, "Card.kind"), ({"cost": "n^4"}, "Card.cost"), ({"patterns": ("causal",)}, "Card.patterns")],
)
def test_what_a_card_cannot_say_is_refused(fields, argument):
    with pytest.raises(CrosslightError, match=f"{argument}: got .*, expected "):
        card(**fields)


def test_growth_is_that_of_the_cost():
    assert card(cost="n sqrt n").growth == 1.5
    assert sorted(GROWTH.values()) == list(GROWTH.values())


def test_a_card_survives_json():
    evidence = Evidence(claim="c", task="t", metric="m", margin=0.1, options={"a": 1}, seeds=5)
    before = card(patterns=("causal-self", "noncausal-cross"), decode="kv", small={"block": 4}, evidence=evidence)
    after = Card.from_dict(json.loads(json.dumps(before.as_dict())))
    assert after == before
    assert after.evidence == evidence


def test_a_card_from_a_newer_index_still_reads():
    assert Card.from_dict(card().as_dict() | {"no_such_field": 1, "module": "m"}) == card()


# Every registered card ------------------------------------------------------------------------------------------------
@functools.cache
def rows() -> list[Card]:
    registry.load_all()
    # Other tests register cards of their own in the same process.
    ours = [id for id in registry.ids() if registry.factory(id)[0].__module__.startswith("crosslight.")]
    return [registry.card(id) for id in ours]


each = pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)


@each
def test_id_module_and_test_file_have_one_name(row):
    module = registry.factory(row.id)[0].__module__
    room, _, name = module.removeprefix("crosslight.").rpartition(".")
    assert name == row.id.replace("-", "_")
    file = TESTS.joinpath(*room.split("."), f"test_{name}.py")
    assert file.exists() or (TESTS / room.split(".")[0] / f"test_{name}.py").exists(), f"no {file.relative_to(TESTS)}"


@each
def test_the_docstring_is_a_page(row):
    doc = inspect.getdoc(sys.modules[registry.factory(row.id)[0].__module__]) or ""
    assert len(doc) > 300
    if row.paper[:4].isdigit():
        assert row.paper in doc, "the docstring does not name the paper"


@each
def test_the_card_says_what_it_must(row):
    assert row.summary.endswith(".")
    assert "\n" not in row.summary
    assert row.checked or row.kind in ("bench", "system", "survey"), "nothing says what its output is held equal to"
    if row.kind == "token":
        assert row.patterns
        assert len(row.patterns) == 4 or row.why_not, "patterns are missing and why_not does not say why"


@each
def test_its_evidence_can_be_run(row):
    if row.evidence is None:
        return
    for name in row.evidence.task.split(","):
        task = tasks.get(name, **row.evidence.task_options)
        assert row.evidence.baseline in (*task.companions, *registry.ids())
    for id, options in ((row.id, row.evidence.options), (row.evidence.baseline, row.evidence.baseline_options)):
        if id in registry.ids():
            known = registry.options(registry.factory(id)[0])
            assert set(options) <= set(known), f"{id} takes {', '.join(known)}"


def test_the_shipped_index_is_current():
    results = TESTS.parent / "evidence" / "results.jsonl"
    registry.index.cache_clear()
    assert registry.index() == registry.build_index(results), "run `crosslight index`"
