"""The user's own table and text."""

import numpy as np
import pandas as pd
import pytest
import torch

from crosslight import tasks
from crosslight.errors import CrosslightError
from crosslight.tasks import Entrant, Size, table
from crosslight.tasks.table import choose


@pytest.fixture
def ett(tmp_path):
    """The layout of the ETT files, with the rows shuffled."""
    t = np.arange(300)
    frame = pd.DataFrame(
        {"date": pd.date_range("2016-07-01", periods=300, freq="h").astype(str), "HUFL": np.sin(t), "OT": t * 1.0}
    )
    path = tmp_path / "ett.csv"
    frame.sample(frac=1, random_state=0).to_csv(path, index=False)
    return path


@pytest.fixture
def rows(tmp_path):
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "size": draw.normal(50, 9, 200),
            "colour": draw.choice(["red", "green", "blue"], 200),
            "day": pd.date_range("2024-01-01", periods=200),
            "kind": draw.choice(["a", "b"], 200),
            "grade": draw.integers(0, 5, 200),
        }
    )
    path = tmp_path / "rows.parquet"
    frame.to_parquet(path)
    return path


def try_out(task):
    torch.manual_seed(0)
    model = task.model(Entrant("softmax"), Size(dim=8, heads=2, depth=1))
    task.loss(model, next(task.batches(0, 8))).backward()
    with torch.no_grad():
        scores = task.evaluate(model)
    assert np.isfinite(scores[task.metric])
    return model


def test_forecast_reads_dates_in_order_and_the_target_first(ett):
    assert choose(str(ett), "OT") == "table-forecast"
    task = tasks.get("table-forecast", file=str(ett), target="OT", history=24, horizon=6)
    table = task.table()
    assert torch.equal(table[:, 0], torch.arange(300.0))
    assert table.shape == (300, 2)
    assert task.steps_of_time()[0].startswith("07-01")
    batch = next(task.batches(0, 4))
    assert batch["history"].shape == (4, 24, 2)
    assert batch["future"].shape == (4, 6)
    # A straight line goes on by one step of the standardised series.
    step = 1 / table[:240, 0].std()
    torch.testing.assert_close(batch["future"][:, 0] - batch["history"][:, -1, 0], step.expand(4), rtol=1e-3, atol=1e-4)
    try_out(task)


def test_classification_reads_columns_as_tokens(rows):
    assert choose(str(rows), "colour", "classify") == "table-classify"
    task = tasks.get("table-classify", file=str(rows), target="kind")
    assert task.columns == ["size", "colour", "day", "grade"]
    assert task.classes == 2
    model = try_out(task)
    tokens = model.embed(task.x[:3])
    assert tokens.shape == (3, 4, 8)
    changed = task.x[:3].clone()
    changed[:, 1] = (changed[:, 1] + 1) % 3
    moved = (model.embed(changed) - tokens).abs().sum((0, 2)) > 0
    assert moved.tolist() == [False, True, False, False]


def test_regression_where_asked_or_where_a_number_has_no_dates(rows, tmp_path):
    plain = tmp_path / "plain.csv"
    pd.read_parquet(rows).drop(columns="day").to_csv(plain, index=False)
    assert choose(str(plain), "size") == "table-regress"
    assert choose(str(plain), "grade") == "table-classify"
    assert choose(str(plain), "kind") == "table-classify"
    task = tasks.get("table-regress", file=str(plain), target="size")
    assert abs(task.y[task.test :].mean()) < 1e-5
    try_out(task)


def test_held_out_rows_are_not_trained_on(rows):
    task = tasks.get("table-classify", file=str(rows), target="kind")
    batches = task.batches(0, 32)
    seen = {row[0].item() for _ in range(10) for row in next(batches)["x"]}
    assert not seen & {row[0].item() for row in task.x[: task.test]}


def write(path, text):
    path.write_text(text)
    return str(path)


def test_tables_that_do_not_serve(ett, rows, tmp_path):
    short = tmp_path / "short.csv"
    pd.read_csv(ett).head(60).to_csv(short, index=False)
    holes = tmp_path / "holes.csv"
    pd.read_csv(ett).assign(OT=lambda f: f.OT.where(f.OT != 5)).to_csv(holes, index=False)
    cases = [
        ("forecast", tmp_path / "none.csv", "OT", r"table: got .*none.csv, expected a .csv file that can be read"),
        ("forecast", write(tmp_path / "empty.csv", ""), "OT", "table: got .*empty.csv, expected"),
        ("forecast", write(tmp_path / "head.csv", "date,OT\n"), "OT", "table: got .*head.csv without rows"),
        ("forecast", write(tmp_path / "bad.parquet", "no"), "OT", "table: got .*bad.parquet, expected a .parquet file"),
        ("forecast", write(tmp_path / "a.txt", "date,OT\n"), "OT", "expected a .csv or .parquet file"),
        ("forecast", ett, "XY", "target: got 'XY', expected a column of the table: date, HUFL, OT"),
        ("forecast", ett, "date", "target: got 'date', which holds no numbers, expected a numeric column"),
        ("forecast", short, "OT", "table: got 60 rows, expected at least 86 for history 48 and horizon 12"),
        ("forecast", holes, "OT", "table: got 1 missing, NaN or infinite values in column 'OT'"),
        ("classify", holes, "OT", "table: got 1 missing"),
        ("classify", ett, "OT", "target: got 300 classes, expected 2 to 60 classes"),
        ("regress", rows, "kind", "target: got 'kind', which holds no numbers"),
    ]
    for goal, file, target, message in cases:
        with pytest.raises(CrosslightError, match=message) as error:
            tasks.get(choose(str(file), target, goal), file=str(file), target=target)
        assert "\n" not in str(error.value)
    with pytest.raises(CrosslightError, match="goal: got 'guess', expected one of forecast"):
        choose(str(ett), "OT", "guess")


def test_missing_values_are_filled_except_in_the_target(ett, rows, tmp_path):
    frame = pd.read_csv(ett).sort_values("date")
    frame.loc[frame.index[[0, 1, 7]], "HUFL"] = np.nan
    frame.loc[frame.index[9], "HUFL"] = np.inf
    frame["date of purchase"] = [f"in week {i}" for i in range(len(frame))]
    frame["nothing"] = np.nan
    holes = tmp_path / "holes.csv"
    frame.to_csv(holes, index=False)
    with pytest.raises(CrosslightError, match="table: got 4 missing, NaN or infinite values in column 'HUFL'"):
        tasks.get("table-forecast", file=str(holes), target="OT", history=24, horizon=6)
    task = tasks.get("table-forecast", file=str(holes), target="OT", history=24, horizon=6, fill=True)
    assert task.table().shape == (300, 2)
    assert task.table()[7, 1] == task.table()[6, 1]
    assert task.table()[9, 1] == task.table()[8, 1]
    torch.testing.assert_close(
        task.table()[:2, 1], torch.tensor(frame.HUFL[:240].mask(np.isinf).mean()).expand(2).float()
    )
    assert "4 missing values are filled" in task.about
    assert "'nothing' is left out (empty)" in task.about
    try_out(task)

    draw = np.random.default_rng(1)
    frame = pd.read_parquet(rows)
    for column in ("size", "colour", "day", "grade"):
        frame[column] = frame[column].mask(draw.random(200) < 0.1)
    frame["name"] = [f"person {i}" for i in range(200)]
    holes = tmp_path / "rows.csv"
    frame.to_csv(holes, index=False)
    with pytest.raises(CrosslightError, match=r"values in column 'size', expected none \(`--fill`"):
        tasks.get("table-classify", file=str(holes), target="kind")
    task = tasks.get("table-classify", file=str(holes), target="kind", fill=True)
    assert task.columns == ["size", "colour", "day", "grade"]
    assert "'name' is left out (text with 200 different values)" in task.about
    assert torch.isfinite(task.x).all()
    assert task.sizes[1] == 4, "a missing colour is a colour of its own"
    assert abs(task.x[task.test :, 0].mean()) < 1e-5
    try_out(task)


def test_separators_of_spreadsheets(tmp_path):
    for name, text in {
        "semicolons": "a;b\n" + "1.5;2\n" * 60,
        "commas": "a;b\n" + "1,5;2\n" * 60,
        "tabs": "a\tb\n" + "1.5\t2\n" * 60,
    }.items():
        frame = table.read(write(tmp_path / f"{name}.csv", text))
        assert frame.iloc[0].tolist() == [1.5, 2], name
        assert list(frame.columns) == ["a", "b"]


def test_days_before_months(tmp_path):
    days = pd.date_range("2016-07-01", periods=200)
    file = write(tmp_path / "de.csv", "date,OT\n" + "".join(f"{d:%d.%m.%Y},{i}\n" for i, d in enumerate(days)))
    assert table.read(file).date.tolist() == days.tolist()
    task = tasks.get("table-forecast", file=file, target="OT")
    assert torch.equal(task.table()[:, 0], torch.arange(200.0))


def test_times_are_short(ett, rows):
    assert tasks.get("table-forecast", file=str(ett), target="OT").steps_of_time()[1] == "07-01 01:00"
    days = tasks.get("table-forecast", file=str(rows), target="size").steps_of_time()
    assert days[1] == "2024-01-02"


def test_text(tmp_path):
    file = write(tmp_path / "own.txt", "to be or not to be, " * 300)
    task = tasks.get("text", file=file, length=32)
    train, test = task.texts()
    assert bytes(torch.cat([train, test]).tolist()).decode() == "to be or not to be, " * 300
    try_out(task)
    with pytest.raises(CrosslightError, match="text: got .*nothing.txt, expected a file that can be read"):
        tasks.get("text", file=str(tmp_path / "nothing.txt"))
    with pytest.raises(CrosslightError, match="text: got .* of 0 bytes, expected at least"):
        tasks.get("text", file=write(tmp_path / "zero.txt", ""))
    with pytest.raises(CrosslightError, match="text: got .* of 2 bytes, expected at least"):
        tasks.get("text", file=write(tmp_path / "short.txt", "ab"))
