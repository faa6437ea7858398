"""The table of all token rows: what is measured, kept, predicted and written."""

import json

import pytest
import torch

import crosslight
from crosslight import registry
from crosslight.attention.base import How
from crosslight.bench import guide, marked, table
from crosslight.bench.table import Limits, Point, Row, Table
from crosslight.errors import CrosslightError

SMALL = {"lengths": (32, 64), "decoded": 48, "limits": Limits(rounds=0.0)}


def test_a_row_is_measured_beside_the_baselines_of_its_pattern():
    rows = {row.id: row for row in Table(**SMALL).measure(["lightning-attention"])}
    assert list(rows) == ["sdpa", "naive", "lightning-attention"]
    assert {row.pattern for row in rows.values()} == {"causal-self"}
    point = rows["lightning-attention"].measured[64]
    assert point.status == "ok"
    assert min(point.seconds, point.peak_bytes, point.sdpa, point.naive) > 0
    assert rows["lightning-attention"].step_seconds > 0
    assert rows["sdpa"].step_seconds is None
    assert rows["sdpa"].measured[64].sdpa is None


def test_a_second_run_measures_only_what_is_missing_or_changed(monkeypatch):
    first = Table(**SMALL)
    list(first.measure(["mqa", "xcit"]))
    known = json.loads(json.dumps(first.as_dict()))
    kept = [c for c in registry.find(kind="token") if c.id in ("mqa", "xcit", "moba")]
    monkeypatch.setattr(registry, "find", lambda **_: kept)
    second = Table(known=known, **SMALL)
    assert [row.id for row in second.measure()] == ["moba"]
    known["rows"] = [{**row, "source": "old"} if row["id"] == "xcit" else row for row in known["rows"]]
    assert [row.id for row in Table(known=known, **SMALL).measure()] == ["moba", "xcit"]
    assert [row.id for row in Table(known=known, **SMALL).measure(["mqa"])] == ["mqa"]


def test_figures_of_another_machine_are_left_out():
    known = {**Table(**SMALL).as_dict(), "rows": [Row("mqa", "causal-self", "").as_dict()]}
    assert Table(known=known, **SMALL).rows
    known["machine"] = {**known["machine"], "threads": 1 + torch.get_num_threads()}
    assert not Table(known=known, **SMALL).rows


@pytest.mark.parametrize(
    ("limits", "status"), [(Limits(call=0.0, rounds=0.0), "over time"), (Limits(rounds=0.0), "out of memory")]
)
def test_what_cannot_end_is_predicted_from_the_last_length(monkeypatch, limits, status):
    monkeypatch.setattr(table.memory, "available", lambda: 1)
    rows = Table(lengths=(32, 64, 128), limits=limits)
    monkeypatch.setattr(table.memory, "bounded", torch.no_grad)  # a block that bounds nothing
    row = Row("softmax", "causal-self", "", {32: Point("ok", 1.0, 1024)})
    assert rows._hopeless(row, 2.0, 64).status == status
    row.measured[64] = rows._hopeless(row, 2.0, 64)
    assert rows._hopeless(row, 2.0, 128).status == status


@pytest.mark.parametrize("id", ["mqa", "softmax"])
def test_a_filled_cache_is_that_of_the_steps(id):
    layer = crosslight.create(id, dim=32, heads=4, position="rope").double()
    x = torch.randn(1, 24, 32, dtype=torch.float64)
    with torch.no_grad():
        y, _ = layer.step(x[:, 23:], Table(**SMALL)._filled(layer, x[:, :23]))
        assert torch.allclose(y, layer._forward(x, x, How(causal=True))[:, 23:])


def test_an_unknown_id_is_refused():
    with pytest.raises(CrosslightError, match="'moab'"):
        list(Table(**SMALL).measure(["moab"]))


def test_the_page_names_rows_that_sdpa_beats_and_keeps_what_people_wrote():
    rows = Table()
    good = {n: Point("ok", n / 1e6, n * 1000, sdpa=4 * 1024 / n, naive=0.5) for n in table.LENGTHS}
    slow = {**good, 16384: Point("ok", 1.0, 1, sdpa=1.5)}
    rows.rows = {
        (row.id, row.pattern): row
        for row in (
            Row("moba", "causal-self", "", good, 0.002),
            Row("fastmax", "causal-self", "", slow),
            Row("softmax", "causal-self", "", slow),
        )
    }
    record = json.loads(json.dumps(rows.as_dict()))
    assert table.losers(record) == ["fastmax"]
    assert table.hungry(record) == []
    next(r for r in record["rows"] if r["id"] == "moba")["measured"]["65536"]["peak_bytes"] = 9 * 65536 * 512 * 16
    assert table.hungry(record) == [("moba", 9.0, 65536)]
    section = table.section(record)
    assert "| [moba](atlas/moba.md) | causal-self | 1.02 ms (4×) | 4.1 ms (1×) | 16.4 ms (0.25×) |" in section
    assert "| 4,096 | ≤ 1,024 | 2 ms |" in section
    assert "not faster than SDPA at 16,384: fastmax." in section
    page = marked.placed("# Page\n\nBy hand.\n", "tokens: cpu", section)
    again = marked.placed(page + "\nMore by hand.\n", "tokens: cpu", "new")
    assert again.startswith("# Page\n\nBy hand.\n")
    assert "new" in again
    assert "moba" not in again
    assert again.endswith("More by hand.\n")


def test_the_guide_names_what_is_fast_what_is_small_and_what_decodes():
    def points(ratio, size):
        return {n: Point("ok", 0.1 * ratio, size, sdpa=ratio) for n in table.LENGTHS}

    rows = Table()
    rows.rows = {
        (row.id, row.pattern): row
        for row in (
            Row("sdpa", "causal-self", "", {n: Point("ok", 0.1, 100) for n in table.LENGTHS}),
            Row("moba", "causal-self", "", points(0.5, 300), 0.002),
            Row("lightning-attention", "causal-self", "", points(0.25, 50), 0.001),
            Row("mta", "causal-self", "", points(3.0, 200), 0.004),
        )
    }
    text = guide.section(json.loads(json.dumps(rows.as_dict())))
    line = next(line for line in text.splitlines() if line.startswith("| 4,096 |"))
    fast, small = line.split("|")[3:5]
    assert fast.index("lightning-attention") < fast.index("moba")
    assert "mta" not in fast
    assert small.index("lightning-attention](atlas/lightning-attention.md)") < small.index("mta") < small.index("moba")
    assert "(0.5×)" in small
    state = next(line for line in text.splitlines() if line.startswith("| a state of constant size |"))
    assert "lightning-attention" in state
    assert "moba" not in state
    assert "### Noncausal" not in text
