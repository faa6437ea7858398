"""Sweeps, curves and the project's own figures; nothing here asserts a time."""

import json

import pytest
import torch

from crosslight.bench import (
    Crossing,
    Setting,
    calls,
    efficiency_length,
    figures,
    growth,
    parse_mask,
    summarise,
    sweep,
    timing,
)
from crosslight.bench.baselines import BASELINES
from crosslight.bench.sweep import Measurement
from crosslight.engines import masks
from crosslight.errors import CrosslightError, UnknownId
from crosslight.tasks.base import Entrant

SMALL = {"dim": 16, "heads": 2}


def entrants(*ids):
    return [Entrant(id) for id in ids]


def test_growth_is_the_exponent():
    assert growth({n: 3e-6 * n**1.5 for n in (64, 256, 1024)}) == pytest.approx(1.5)
    assert growth({64: 1.0}) is None
    assert growth({}) is None


def test_efficiency_length_is_where_the_curves_cross():
    lengths = (256, 1024, 4096)
    linear, square = {n: 1.0 * n for n in lengths}, {n: n * n / 700 for n in lengths}
    crossing = efficiency_length(linear, square)
    assert crossing is not None
    assert crossing.length == pytest.approx(700)
    assert str(crossing) == "700"
    assert efficiency_length(square, linear) == Crossing(256, "at most")
    assert efficiency_length(linear, {n: n / 2 for n in lengths}) == Crossing(4096, "above")
    assert efficiency_length(linear, {}) is None


def test_rules_for_masks():
    i, j = torch.arange(9).view(-1, 1), torch.arange(9)

    def same(text, mask):
        zero = torch.zeros(1, dtype=torch.long)
        assert torch.equal(parse_mask(text).visible(zero, zero, i, j), mask.visible(zero, zero, i, j))

    same("window:2", masks.window(2))
    same("causal & window(3) | sink:1", masks.causal() & masks.window(3) | masks.sink(1))
    same("~(causal | dilated:2)", ~(masks.causal() | masks.dilated(2)))
    assert parse_mask("") is None


@pytest.mark.parametrize(
    "text", ["window", "window:x", "open(3)", "window:2 +", "1", "window:2; 3", "__import__('os')"]
)
def test_bad_rules_for_masks(text):
    with pytest.raises(CrosslightError, match="mask: got"):
        parse_mask(text)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", ["", "window:3 | sink:1"])
def test_baselines_agree(causal, rule):
    q, k, v = torch.randn(3, 2, 2, 12, 8, dtype=torch.float64)
    mask = parse_mask(rule)
    one, other = (BASELINES[id](q, k, v, mask, causal) for id in ("sdpa", "naive"))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("level", ["layer", "core"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
def test_all_entrants_run_at_every_length(level, backward, pattern):
    setting = Setting(pattern=pattern, level=level, backward=backward, **SMALL)
    found = list(sweep(entrants("softmax", "sdpa", "naive"), [32, 16, 16], setting, rounds=1))
    assert [(m.entrant, m.length) for m in found] == [(e, n) for n in (16, 32) for e in ("softmax", "sdpa", "naive")]
    assert {m.status for m in found} == {"ok"}
    assert all(m.seconds and m.peak_bytes and m.flops for m in found)
    assert set(found[0].ratios) == {"sdpa", "naive"}


def test_maps_and_fusion_blocks_are_measured_too():
    found = list(sweep(entrants("eca", "crossvit", "poly-encoder"), [16], Setting(**SMALL), rounds=1))
    assert {m.entrant: m.status for m in found} == {"eca": "ok", "crossvit": "ok", "poly-encoder": "ok"}


def test_softmax_computes_what_the_baseline_does():
    setting = Setting(pattern="causal-self", backward=True, mask="window:3", level="core", **SMALL)
    ours, theirs = (calls.Prepared(Entrant(id), setting).call(20)() for id in ("softmax", "naive"))
    torch.testing.assert_close(ours, theirs)


def test_what_cannot_run_is_recorded_and_the_rest_goes_on():
    setting = Setting(pattern="causal-self", **SMALL)
    found = list(sweep(entrants("slot-attention", "flex", "softmax"), [16], setting, rounds=1))
    assert {m.entrant: m.status for m in found} == {
        "slot-attention": "unsupported",
        "flex": "unsupported",
        "softmax": "ok",
    }
    assert "causal-self" in next(m.error for m in found if m.id == "slot-attention")


def test_out_of_memory_is_recorded_and_the_rest_goes_on(monkeypatch):
    naive = BASELINES["naive"]

    def hungry(q, k, v, mask, causal):
        return torch.empty(1 << 50) if q.shape[2] > 16 else naive(q, k, v, mask, causal)

    monkeypatch.setitem(BASELINES, "naive", hungry)
    found = list(sweep(entrants("naive", "sdpa"), [16, 32, 64], Setting(level="core", **SMALL), rounds=1))
    assert [m.status for m in found if m.id == "naive"] == ["ok", "out of memory", "out of memory"]
    assert [m.status for m in found if m.id == "sdpa"] == ["ok"] * 3


def test_what_would_take_too_long_is_not_started(monkeypatch):
    monkeypatch.setattr(timing, "once", lambda call, device="cpu": 1.0)
    found = list(sweep(entrants("sdpa"), [16, 32, 64], Setting(**SMALL), limit=3.0, rounds=1, counts=False))
    assert [m.status for m in found] == ["ok", "over time", "over time"]


def test_bad_entrants_and_settings():
    with pytest.raises(UnknownId, match="softmax"):
        list(sweep(entrants("sotfmax"), [16], Setting(**SMALL)))
    with pytest.raises(CrosslightError, match="options of 'softmax': got blocks"):
        list(sweep([Entrant("softmax", {"blocks": 3})], [16], Setting(**SMALL)))
    with pytest.raises(CrosslightError, match="pattern: slot-attention has no causal-self"):
        list(sweep(entrants("slot-attention", "sdpa"), [16], Setting(pattern="causal-self", **SMALL)))
    for wrong in (
        {"pattern": "self"},
        {"dtype": "int8"},
        {"level": "all"},
        {"heads": 0},
        {"dim": 15},
        {"device": "abacus"},
    ):
        with pytest.raises(CrosslightError, match=f"{next(iter(wrong))}: got"):
            Setting(**{**SMALL, **wrong})


def test_turns_are_taken_and_paired():
    order = []
    taken = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "abbaab", "each round starts with another call"
    assert len(taken["a"].rounds) == 3
    slow, fast = timing.Times((2.0, 8.0, 3.0)), timing.Times((1.0, 4.0, 1.0))
    assert slow.ratio(fast) == 2.0
    assert (slow.median, slow.best) == (3.0, 2.0)


def test_summary_reads_growth_and_crossing():
    def point(entrant, n, seconds, ratio):
        return Measurement(entrant, entrant, n, "ok", best=seconds, peak_bytes=8 * n, flops=n**2, ratios=ratio)

    found = [point("moba", n, 1e-6 * n, {"sdpa": 512 / n}) for n in (256, 1024)]
    found += [point("sdpa", n, 1e-9 * n**2, {}) for n in (256, 1024)]
    found.append(Measurement("moba", "moba", 4096, "over time"))
    moba, sdpa = summarise(found, baselines=["sdpa"])
    assert moba.growth == pytest.approx({"time": 1.0, "memory": 1.0, "flops": 2.0})
    assert moba.efficiency_length["sdpa"].length == pytest.approx(512)
    assert sdpa.efficiency_length == {}


def test_figures_are_written_in_place(tmp_path):
    good = figures.Figure("a over b", "at least", 4.0, 5.0)
    bad = figures.Figure("c", "at most", 1.0, None)
    assert (good.holds, bad.holds) == (True, False)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("# Performance\n\nBefore.\n")
    for taken in ([bad], [good, bad]):
        for path, text in figures.files(tmp_path, "cpu", taken).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    text = page.read_text()
    assert text.startswith("# Performance\n\nBefore.\n")
    assert text.count("On a CPU") == 1, "the former part is replaced"
    assert "| a over b | at least 4× | 5× |  |" in text
    assert "| c | at most 1× | - | missed |" in text
    assert "crosslight bench --figures" in text
    record = json.loads((tmp_path / "bench" / "figures.json").read_text())["cpu"]
    assert [f["holds"] for f in record["figures"]] == [True, False]
    assert {"date", "processor", "cores", "torch"} <= set(record["machine"])


def test_a_figure_that_fails_is_recorded(monkeypatch):
    def broken(bench):
        raise CrosslightError("nothing to measure")
        yield

    def sound(bench):
        yield figures.Figure("sound", "at most", 1.0, 0.5)

    monkeypatch.setattr(figures, "ALL", (broken, sound))
    first, second = figures.take()
    assert (first.holds, first.detail) == (False, "nothing to measure")
    assert second.holds
