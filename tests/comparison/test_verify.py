"""Evidence: what is run, how it is judged, what is recorded."""

import dataclasses
import json

import pytest
from toys import entrant  # noqa: F401 - registers the task and the entrant

from crosslight import registry
from crosslight.cards import Evidence
from crosslight.comparison.verify import Plan, changed, registered, verify
from crosslight.errors import CrosslightError


@pytest.fixture
def claim(monkeypatch):
    """Let the toy card declare this evidence."""

    def declare(**fields):
        card, make, defaults = registry._registered["toy-trouble"]
        defaulted = {
            "claim": "c",
            "task": "toy",
            "metric": "error",
            "margin": -10.0,
            "seeds": 2,
            "budget": {"steps": 2},
        }
        changed_card = dataclasses.replace(card, evidence=Evidence(**{**defaulted, **fields}))
        monkeypatch.setitem(registry._registered, "toy-trouble", (changed_card, make, defaults))

    return declare


def run(tmp_path, results=None):
    (outcome,) = verify(["toy-trouble"], out=tmp_path, results=results, progress=False)
    return outcome


def test_a_claim_within_and_beyond_its_margin(tmp_path, claim):
    claim(margin=-10.0)
    outcome = run(tmp_path)
    ours, theirs = outcome["values"], outcome["baseline_values"]
    assert len(ours) == len(theirs) == 2
    # The metric is an error, so better is lower.
    assert outcome["difference"] == pytest.approx(sum(theirs) / 2 - sum(ours) / 2)
    assert outcome["holds"] is True
    claim(margin=10.0)
    assert run(tmp_path)["holds"] is False


def test_each_outcome_is_appended(tmp_path, claim):
    results = tmp_path / "results.jsonl"
    claim()
    first = run(tmp_path, results)
    claim(options={"how": "diverges"})
    second = run(tmp_path, results)
    assert [json.loads(line) for line in results.read_text().splitlines()] == [first, second]
    assert second["holds"] is False
    assert "toy toy-trouble seed 0: the loss is nan" in second["error"]
    assert first["versions"]["torch"]


def test_a_metric_that_the_task_lacks_fails_the_claim(tmp_path, claim):
    claim(metric="accuracy")
    assert "no metric 'accuracy', only error" in run(tmp_path)["error"]


def test_an_index_over_several_tasks(tmp_path, claim):
    claim(task="toy,copy", metric="index", entrant="softmax", baseline="mean-pooling", margin=-3.0)
    outcome = run(tmp_path)
    assert outcome["entrant"] == "softmax"
    for ours, theirs in zip(outcome["values"], outcome["baseline_values"], strict=True):
        assert ours == -theirs
        assert ours in (-1, 0, 1)


def test_changed_rows_are_those_whose_code_is_not_that_of_the_last_outcome(tmp_path, claim, monkeypatch):
    results = tmp_path / "results.jsonl"
    claim()
    assert changed(["toy-trouble"], results) == ["toy-trouble"]
    run(tmp_path, results)
    assert changed(["toy-trouble"], results) == []
    monkeypatch.setattr(registry, "source", lambda name: "edited")
    assert changed(["toy-trouble"], results) == ["toy-trouble"]


def test_a_card_without_evidence_and_a_baseline_that_is_the_entrant(claim):
    with pytest.raises(CrosslightError, match="id: got 'mean-pooling', expected a card that declares evidence"):
        Plan(registered("mean-pooling"), "cpu")
    claim(baseline="toy-trouble")
    with pytest.raises(CrosslightError, match="evidence of 'toy-trouble': got toy-trouble, expected another baseline"):
        Plan(registered("toy-trouble"), "cpu")
