"""The suite itself: what is right passes, and for every check there is something broken on which it fails."""

import pytest
import torch
from broken_others import OTHERS, SOUND
from broken_token import CARD, TOKEN, OtherWeights, Plain, SeesTheFuture

from crosslight import testing
from crosslight.errors import CrosslightError
from crosslight.testing import suite

BROKEN = {"token": TOKEN, **OTHERS}


@pytest.mark.parametrize("system", [Plain, *SOUND], ids=lambda s: s.__name__)
def test_what_is_right_passes(system):
    report = testing.check(system)
    assert report
    assert all(outcome.result == "passed" for outcome in report if outcome.check != "published_sizes")


@pytest.mark.parametrize(
    ("check", "system"),
    [
        pytest.param(check, system, id=f"{kind}-{check}-{system.__name__}")
        for kind, table in BROKEN.items()
        for check, systems in table.items()
        for system in systems
    ],
)
def test_what_is_broken_fails(check, system):
    with pytest.raises(testing.ConformanceError, match=f"^{system.card.id}: {check}: ") as error:
        testing.check(system, only=check)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["token", "map", "fusion", "model", "control", "explain", "training"])
def test_every_check_has_something_on_which_it_fails(kind):
    assert set(BROKEN[kind]) == set(suite._of(kind))


def test_a_report_names_every_check_and_why_one_was_skipped():
    class Exempt(Plain):
        exempt = {"compiles": "hashes in Python"}

    report = testing.check(Exempt, only=["compiles", "batch_is_independent"])
    assert str(report) == "skipped  compiles: hashes in Python\npassed   batch_is_independent"
    assert not testing.check(Exempt, skip=[name for name, _ in testing.checks(CARD)])


def test_errors_say_one_line_a_check_and_name_the_pattern():
    with pytest.raises(testing.ConformanceError) as error:
        testing.check(SeesTheFuture, only=["causal_does_not_leak", "fast_path_equals_weights"])
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["fast_path_equals_weights", "causal_does_not_leak"]
    assert "[causal-self]" in lines[1]
    assert "[noncausal-self]" not in lines[1]


def test_an_instance_is_held_as_it_is_and_left_alone():
    layer = Plain.build(24, 3)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    report = testing.check(layer, skip=["compiles", "gradients_are_exact"])
    assert {o.check for o in report if o.result == "skipped"} == {
        "context_has_its_own_width",
        "uneven_heads_are_refused",
        "heads_may_be_grouped",
        "published_sizes",
    }
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    with pytest.raises(testing.ConformanceError):
        testing.check(OtherWeights.build(24, 3), only="fast_path_equals_weights")


def test_options_go_to_the_constructor():
    make = testing.Maker(Plain, {"kv_heads": 1})
    assert make().kv_heads == 1
    assert make(kv_heads=2).kv_heads == 2
    assert make(dtype=None).q.weight.dtype == torch.float32


def test_wrong_subjects_and_names_are_refused():
    with pytest.raises(CrosslightError, match="subject: got"):
        testing.check(torch.nn.Linear)
    with pytest.raises(CrosslightError, match="no_such_check, expected checks of kind token: shapes_at_any_length"):
        testing.check(Plain, only="no_such_check")
