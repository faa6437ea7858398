"""One trial: what decides it, what it records, how it fails."""

import dataclasses

import pytest
import torch
from toys import Toy, entrant

from crosslight import registry
from crosslight.comparison.trial import Budget, Trial, run
from crosslight.errors import CrosslightError
from crosslight.tasks import Entrant


def trial(who=None, seed=0, options=None, **budget):
    task = Toy(**(options or {}))
    return Trial(
        task="toy",
        task_options=options or {},
        entrant=who or Entrant("softmax"),
        seed=seed,
        budget=Budget.of(task, **budget),
        device="cpu",
    )


def test_the_same_trial_twice_gives_the_same_scores():
    a, b = run(trial()), run(trial())
    timings = {"wall_s", "step_ms", "train_s"}
    assert {k: v for k, v in a.items() if k not in timings} == {k: v for k, v in b.items() if k not in timings}
    assert a["status"] == "ok"
    assert a["score"] == a["scores"]["error"]
    assert a["steps"] == 3
    assert a["score"] != run(trial(seed=1))["score"]


def test_the_key_changes_with_everything_that_decides(monkeypatch):
    base = trial()
    others = [
        trial(seed=1),
        trial(steps=4),
        trial(lr=0.5),
        trial(batch_size=2),
        trial(dim=16),
        trial(seconds=1.0),
        trial(options={"length": 5}),
        trial(Entrant("softmax", {"kv_heads": 1})),
        trial(Entrant("mean-pooling")),
        dataclasses.replace(base, device="cuda:0"),
    ]
    keys = [t.key for t in [base, *others]]
    assert len(set(keys)) == len(keys)
    assert trial().key == base.key
    assert dataclasses.replace(base, device="cuda:0").key == dataclasses.replace(base, device="cuda:1").key
    monkeypatch.setattr("crosslight.__version__", "9.9")
    assert trial().key != base.key


def test_the_key_changes_with_the_content_of_the_users_file(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("one")
    budget = trial().budget
    keys = []
    for text in ("one", "two", "one"):
        file.write_text(text)
        asked = Trial(
            task="text",
            task_options={"file": str(file)},
            entrant=Entrant("softmax"),
            seed=0,
            budget=budget,
            device="cpu",
        )
        keys.append(asked.key)
    assert keys[0] == keys[2] != keys[1]


def test_a_task_on_another_task_changes_with_the_code_of_both(monkeypatch):
    def code(task):
        return dataclasses.replace(trial(), task=task).decides()["code"]

    monkeypatch.setattr(registry, "source", lambda name: name)
    own, under = "crosslight.tasks.language_stack", "crosslight.tasks.language"
    assert code("language-stack")[1:] == [own, "crosslight.tasks.trunk", under]
    # A base in the task's own file is hashed with it, and Task itself decides nothing.
    assert code("language")[1:] == [under, "crosslight.tasks.trunk"]
    assert code("toy")[1:] == ["toys", "crosslight.tasks.trunk"]


def test_the_key_changes_with_the_code_of_the_entrant(monkeypatch):
    before = trial().key
    monkeypatch.setattr(registry, "source", lambda name: "edited" if name.endswith("softmax") else "same")
    edited = trial().key
    monkeypatch.setattr(registry, "source", lambda name: "same")
    assert len({before, edited, trial().key}) == 3


def test_failures_are_recorded_and_not_raised():
    failed = run(trial(entrant("raises")))
    assert (failed["status"], failed["error"]) == ("failed", "RuntimeError: no luck")
    assert failed["metric"] == "error"
    diverged = run(trial(entrant("diverges")))
    assert (diverged["status"], diverged["error"]) == ("diverged", "the loss is nan at step 1")
    assert "score" not in diverged
    poisoned = run(trial(options={"poison": True}))
    assert poisoned["status"] == "failed"
    assert "x: got 192 values that are NaN or infinite, expected finite numbers" in poisoned["error"]


def test_seconds_bound_the_training():
    record = run(trial(seconds=0.05))
    assert record["steps"] > 3
    assert record["train_s"] < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected a positive"),
        ({"warmup": 3}, "budget: got warmup, expected some of steps"),
    ],
)
def test_bad_budgets(changes, message):
    with pytest.raises(CrosslightError, match=message):
        Budget.of(Toy(), **changes)


def test_weights_are_kept_for_the_report(tmp_path):
    path = tmp_path / "weights" / "k.pt"
    run(trial(), weights=path)
    kept = torch.load(path, weights_only=True)
    assert [m.shape for m in kept["maps"]] == [(2, 6, 6)]
    torch.testing.assert_close(kept["maps"][0].sum(-1), torch.ones(2, 6))
    assert kept["rows"] == kept["columns"] == ["0", "1", "2", "3", "4", "5"]
    assert list(path.parent.iterdir()) == [path]


def test_measuring_leaves_no_trace():
    """Training is the same with and without the measurements of cost."""
    from crosslight.comparison import trial as module

    measured = run(trial())
    assert measured["flops"] > 0
    original = module._cost
    try:
        module._cost = lambda *_: {}
        plain = run(trial())
    finally:
        module._cost = original
    assert plain["score"] == measured["score"]


def test_flops_of_attention_are_counted():
    record = run(trial(dim=8, batch_size=4))
    n, d, tokens = 6, 8, 24
    products = 2 * tokens * d * d * (4 + 2 * 2)  # four projections, an MLP of ratio 2
    attention = 2 * 2 * 4 * n * n * d
    assert record["flops"] == pytest.approx(3 * products + 3.5 * attention, rel=0.1)
