"""`crosslight.compare` and what is made of its frame."""

import math

import pandas as pd
import pytest
from toys import entrant

import crosslight
from crosslight.comparison import leaderboard
from crosslight.comparison.defaults import MECHANISMS, TASKS, parse
from crosslight.comparison.study import COLUMNS
from crosslight.errors import CrosslightError, UnknownId, UnsupportedPattern
from crosslight.tasks import Entrant


def compare(tmp_path, *args, **options):
    return crosslight.compare(*args, out=tmp_path / "runs", progress=False, **{"steps": 2, "tasks": "toy", **options})


def test_a_row_a_trial_with_the_baselines_in_it(tmp_path):
    frame = compare(tmp_path, ["softmax:kv_heads=1"], seeds=2)
    assert set(COLUMNS) <= set(frame.columns)
    assert frame.label.unique().tolist() == ["mean-pooling", "softmax", "softmax(kv_heads=1)"]
    assert len(frame) == 6
    assert (frame.status == "ok").all()
    assert frame[["parameters", "flops", "memory", "step_ms"]].gt(0).all().all()
    assert frame.score.equals(frame.score_error)
    again = compare(tmp_path, ["softmax:kv_heads=1"], seeds=2)
    pd.testing.assert_frame_equal(frame, again)  # also the times: nothing was trained anew


def test_all_entrants_get_the_same_budget(tmp_path):
    compare(tmp_path, [entrant()], seeds=1, steps=5, dim=16, depth=2, lr=0.01, batch_size=3)
    import json

    records = [json.loads(line) for line in (tmp_path / "runs" / "trials.jsonl").read_text().splitlines()]
    budgets = {json.dumps(r["budget"], sort_keys=True) for r in records}
    assert len(budgets) == 1
    assert json.loads(budgets.pop()) == {
        "steps": 5, "seconds": None, "batch_size": 3, "lr": 0.01, "size": {"dim": 16, "heads": 2, "depth": 2}
    }  # fmt: skip


def test_a_mechanism_without_the_pattern_is_skipped_with_a_note(tmp_path):
    frame = compare(tmp_path, "slot-attention,mqa", tasks=["toy"], seeds=1)
    assert frame.id.tolist() == ["mean-pooling", "softmax", "mqa"]
    (note,) = frame.attrs["notes"]
    assert note.startswith("slot-attention is not in toy: it has no noncausal-self attention")
    with pytest.raises(UnsupportedPattern, match="with: got slot-attention, expected one that fits"):
        compare(tmp_path, "slot-attention")


def test_a_task_of_another_kind_takes_entrants_of_that_kind_and_none(tmp_path):
    frame = compare(tmp_path, ["none", "softmax"], seeds=1)
    assert "none" in set(frame.id)
    with pytest.raises(UnsupportedPattern, match="eca is not in toy: it is of kind map, the task of kind token"):
        compare(tmp_path, ["eca"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mechanisms": "sofmax"}, UnknownId, "id: got 'sofmax', expected a registered id such as softmax"),
        ({"mechanisms": "softmax:rank=3"}, CrosslightError, "options of 'softmax': got rank"),
        ({"pattern": "causal"}, CrosslightError, "pattern: got 'causal', expected one of noncausal-self"),
        ({"pattern": "causal-self"}, CrosslightError, "pattern: got 'causal-self', expected noncausal-self of toy"),
        ({"tasks": "toys"}, CrosslightError, "task: got 'toys', expected one of .*digits"),
        ({"group": "x"}, CrosslightError, "group: got 'x', expected one of .*toys"),
        ({"seeds": 0}, CrosslightError, "seeds: got 0, expected a positive int"),
        ({"seeds": []}, CrosslightError, "seeds: got "),
        ({"workers": 0}, CrosslightError, "workers: got 0"),
        ({"steps": -1}, CrosslightError, "steps: got -1"),
        ({"device": "gpu"}, CrosslightError, "device: got 'gpu'"),
        ({"target": "OT"}, CrosslightError, "target: got 'OT', expected a table"),
        (
            {"dim": 10, "heads": 4},
            CrosslightError,
            "dim.*: got 10, expected a multiple|heads: got 4, expected a divisor",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        compare(tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs" / "trials.jsonl").exists()


def test_entrants_as_text():
    assert parse("softmax, moba:block_size=8,top_k=3,mega") == [
        Entrant("softmax"),
        Entrant("moba", {"block_size": 8, "top_k": 3}),
        Entrant("mega"),
    ]
    assert parse("a:x=0.5,flag=true,name=rope,no=none")[0].options == {
        "x": 0.5,
        "flag": True,
        "name": "rope",
        "no": None,
    }
    for bad in ("x=3", "moba:8"):
        with pytest.raises(CrosslightError, match="with: got"):
            parse(bad)


def test_defaults_cover_the_four_patterns_and_exist():
    from crosslight import tasks

    patterns = {tasks.find(name).pattern for name in TASKS}
    assert patterns == {"noncausal-self", "causal-self", "noncausal-cross", "causal-cross"}
    for one in MECHANISMS:
        crosslight.create(one.id, dim=32, heads=4, **one.options)
    for pattern in patterns:
        assert sum(pattern in crosslight.card(one.id).patterns for one in MECHANISMS) >= 2


def trials(rows):
    columns = {"pattern": "p", "metric": "m", "error": None, "parameters": 1, "flops": 1, "memory": 1, "step_ms": 1.0}
    names = ("task", "id", "seed", "status", "score", "higher_is_better")
    return pd.DataFrame([{**columns, **dict(zip(names, row, strict=True)), "label": row[1]} for row in rows])


def test_leaderboard_means_spread_and_losses():
    board = leaderboard(
        trials(
            [
                ("low", "a", 0, "ok", 3.0, False),
                ("low", "a", 1, "ok", 1.0, False),
                ("low", "b", 0, "ok", 1.0, False),
                ("low", "b", 1, "diverged", None, False),
                ("low", "c", 0, "failed", None, False),
                ("high", "a", 0, "ok", 0.2, True),
                ("high", "b", 0, "ok", 0.9, True),
            ]
        )
    )
    assert board[["task", "label"]].agg(" ".join, axis=1).tolist() == ["low b", "low a", "low c", "high b", "high a"]
    b, a, c = (board.iloc[i] for i in range(3))
    assert (a["mean"], a.spread, a.seeds) == (2.0, pytest.approx(2**0.5), 2)
    assert (b["mean"], b.seeds, b.diverged, b.failed) == (1.0, 1, 1, 0)
    assert math.isnan(b.spread)
    assert math.isnan(c["mean"])
    assert c.failed == 1


def test_leaderboard_of_a_diverged_first_trial_keeps_its_costs():
    board = leaderboard(trials([("t", "a", 0, "diverged", None, True), ("t", "a", 1, "ok", 0.5, True)]))
    assert board["mean"].tolist() == [0.5]


def test_a_row_whose_defaults_do_not_fit_is_left_out_with_a_note(tmp_path):
    frame = compare(tmp_path, "get-event-transformer,sigmoid-attention", tasks="digits", seeds=1, steps=1)
    assert "get-event-transformer" not in set(frame.id)
    (note,) = frame.attrs["notes"]
    assert "groups: got 12" in note
    with pytest.raises(CrosslightError, match="groups: got 5"):
        compare(tmp_path, "get-event-transformer:groups=5", tasks="digits", steps=1)
