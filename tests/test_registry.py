"""Finding and creating by id: near names, option errors, filters, taken ids, the index, no torch until it is needed."""

import json
import subprocess
import sys

import pytest
from torch import nn

import crosslight
from crosslight import registry
from crosslight.cards import Card
from crosslight.errors import CrosslightError, UnknownId


def card(id: str, **fields) -> Card:
    named = {"kind": "map", "group": "test", "title": "T", "year": 2020, "paper": "none", "summary": "Does nothing."}
    return Card(id=id, **{**named, **fields})


@pytest.fixture
def own(monkeypatch):
    """A registry of the test's own, on top of what is registered."""
    registry.factory("softmax")
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "index", dict)
    return registry._registered


# Unknown ids and wrong options ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ask", [crosslight.card, crosslight.create])
@pytest.mark.parametrize(("wrong", "near"), [("sofmax", "softmax"), ("soft-max", "softmax"), ("SOFTMAX", "softmax")])
def test_an_unknown_id_names_near_ones(ask, wrong, near):
    registry.factory("softmax")
    with pytest.raises(UnknownId, match=f"id: got '{wrong}', expected a registered id such as .*{near}"):
        ask(wrong)


def test_an_id_like_no_other_is_refused_on_one_line():
    with pytest.raises(UnknownId) as error:
        crosslight.create("§§§§")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 16, "block": 3, "tokens": 2}, "options of 'softmax': got block, tokens, expected some of dim, heads"),
        ({"heads": 2}, "options of 'softmax': got heads, expected also dim"),
        ({}, "options of 'softmax': got none, expected also dim"),
        ({"dim": 16, "heads": 3}, "dim: got 16, expected a multiple of heads = 3"),
        ({"dim": 16, "preset": "large"}, "preset: got 'large', expected one of none, it has no presets"),
    ],
)
def test_option_errors_name_the_options(options, message):
    with pytest.raises(CrosslightError) as error:
        crosslight.create("softmax", **options)
    assert str(error.value).startswith(message)


def test_defaults_of_a_row_give_way_to_the_user(own):
    @registry.register(card("one-of-two"), size=2)
    class Sized(nn.Module):
        presets = {"large": {"size": 9, "colour": "red"}}

        def __init__(self, size: int, colour: str = "blue") -> None:
            super().__init__()
            self.size, self.colour = size, colour

    assert registry.create("one-of-two").size == 2
    assert registry.create("one-of-two", size=3).size == 3
    large = registry.create("one-of-two", preset="large", colour="green")
    assert (large.size, large.colour) == (9, "green")
    assert Sized.card.id == "one-of-two"


# Registering ----------------------------------------------------------------------------------------------------------
def test_a_taken_id_cannot_be_registered(own):
    with pytest.raises(CrosslightError, match=r"card.id: got 'softmax', .*taken \(by crosslight.attention.softmax\)"):

        @registry.register(card("softmax"))
        class Other:
            pass

    assert own["softmax"][1].__module__ == "crosslight.attention.softmax"


def test_load_all_registers_every_row_under_its_module():
    registry.load_all()
    for id in registry.ids():
        factory, _ = registry.factory(id)
        assert registry.card(id).id == factory.card.id == id


# Finding --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def four(own):
    own.clear()
    full = ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")
    cards = [
        card("dense-one", kind="token", patterns=full, cost="n^2", decode="kv", summary="Reads all keys."),
        card("linear-one", kind="token", patterns=full[:2], cost="n", decode="state", summary="Keeps a state."),
        card("local-one", kind="token", patterns=full[:1], cost="n log n", summary="Reads near keys.", group="sparse"),
        card("gate", title="A Gate of Channels"),
    ]
    for c in cards:
        own[c.id] = (c, object, {})


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, ["dense-one", "gate", "linear-one", "local-one"]),
        ({"words": "reads KEYS"}, ["dense-one", "local-one"]),
        ({"words": ["one", "state"]}, ["linear-one"]),
        ({"words": "channels"}, ["gate"]),
        ({"words": "no such word"}, []),
        ({"kind": "map"}, ["gate"]),
        ({"group": "sparse"}, ["local-one"]),
        ({"pattern": "causal-self"}, ["dense-one", "linear-one"]),
        ({"pattern": "causal-cross"}, ["dense-one"]),
        ({"kind": "token", "cost": "n"}, ["linear-one"]),
        ({"kind": "token", "cost": "n log n"}, ["linear-one", "local-one"]),
        ({"decode": "state"}, ["linear-one"]),
        ({"words": "one", "pattern": "causal-self", "decode": "kv"}, ["dense-one"]),
    ],
)
def test_find_keeps_what_has_every_property(four, filters, found):
    assert [c.id for c in registry.find(**filters)] == found


@pytest.mark.parametrize("wrong", [{"kind": "tokens"}, {"pattern": "causal"}, {"cost": "n^4"}])
def test_find_refuses_what_no_card_can_have(four, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(CrosslightError, match=rf"^{name}: got '{value.replace('^', chr(92) + '^')}', expected one of "):
        registry.find(**wrong)


# The index ------------------------------------------------------------------------------------------------------------
def test_the_index_answers_as_the_rows_do(tmp_path, monkeypatch):
    entries = registry.build_index()
    path = tmp_path / "index.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    cards = {id: registry.card(id) for id in entries}
    monkeypatch.setattr(registry, "INDEX", path)
    monkeypatch.setattr(registry, "_registered", {})
    registry.index.cache_clear()
    try:
        assert registry.ids() == sorted(cards)
        for id, registered in cards.items():
            # JSON knows no tuples: compared as JSON.
            assert json.dumps(registry.card(id).as_dict()) == json.dumps(registered.as_dict())
    finally:
        monkeypatch.undo()
        registry.index.cache_clear()


def test_results_of_evidence_become_a_status(tmp_path):
    results = tmp_path / "results.jsonl"
    lines = [{"id": "eca", "holds": False, "difference": 0.1}, {"id": "eca", "holds": True, "difference": 0.2}]
    results.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    entries = registry.build_index(results)
    assert (entries["eca"]["status"], entries["eca"]["result"]) == ("reproduced", lines[1])
    assert entries["cbam"]["status"] == "unverified"
    assert entries["softmax"]["status"] == "baseline"


# Lightness ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "use", ["crosslight.find('linear', kind='token')", "crosslight.registry.ids()", "dir(crosslight)"]
)
def test_finding_imports_no_torch(use):
    code = f"import sys, crosslight, crosslight.registry; {use}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    for name in crosslight.__all__:
        assert getattr(crosslight, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        crosslight.no_such_name  # noqa: B018


def test_an_option_of_a_wrong_type_is_named():
    with pytest.raises(CrosslightError, match="options of 'moba': got .*block_size='x'"):
        crosslight.create("moba", dim=16, heads=2, block_size="x")
