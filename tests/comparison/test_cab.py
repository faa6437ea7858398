"""The compositional index."""

import pandas as pd
import pytest

import crosslight
from crosslight.comparison.cab import CARD, index


def board(*rows):
    return pd.DataFrame(rows, columns=["task", "label", "mean", "higher_is_better"])


ROWS = [
    ("digits", "a", 0.9, True),
    ("digits", "b", 0.6, True),
    ("digits", "c", 0.3, True),
    ("language", "a", 2.0, False),
    ("language", "b", 3.0, False),
    ("language", "c", 2.5, False),
]


def test_the_mean_of_signed_z_scores():
    table = index(board(*ROWS)).set_index("label")
    z = 1.5**0.5
    assert table["digits"].to_dict() == pytest.approx({"a": z, "b": 0, "c": -z})
    assert table["language"].to_dict() == pytest.approx({"a": z, "b": -z, "c": 0})
    assert table["index"].to_dict() == pytest.approx({"a": z, "b": -z / 2, "c": -z / 2})
    assert index(board(*ROWS)).label.iloc[0] == "a"


@pytest.mark.parametrize(("slope", "offset"), [(1000.0, 0.0), (0.001, 5.0), (3.0, -40.0)])
def test_invariant_to_rescaling_of_a_metric(slope, offset):
    scaled = [(t, e, slope * x + offset if t == "language" else x, up) for t, e, x, up in ROWS]
    pd.testing.assert_frame_equal(index(board(*ROWS)), index(board(*scaled)))
    turned = [(t, e, -x if t == "language" else x, up if t == "digits" else True) for t, e, x, up in ROWS]
    pd.testing.assert_frame_equal(index(board(*ROWS)), index(board(*turned)))


def test_equal_scores_rank_nobody():
    table = index(board(("t", "a", 0.1 + 0.2, True), ("t", "b", 0.3, True)))
    assert table["index"].tolist() == [0, 0]


def test_a_missing_result_is_left_out_and_counted():
    rows = [*ROWS[:5], ("language", "c", float("nan"), False)]
    table = index(board(*rows)).set_index("label")
    assert table["tasks"].to_dict() == {"a": 2, "b": 2, "c": 1}
    assert table.loc["c", "index"] == table.loc["c", "digits"]
    # Those that are left are normalised among themselves.
    assert table["language"].dropna().to_dict() == pytest.approx({"a": 1, "b": -1})


def test_it_is_a_row():
    assert crosslight.card("cab") == CARD
    pd.testing.assert_frame_equal(crosslight.create("cab", board=board(*ROWS)), index(board(*ROWS)))
