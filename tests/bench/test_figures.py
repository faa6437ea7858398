"""The figures: every part measures what it says, here at toy lengths, and is written beside other devices."""

import json

import pytest

from crosslight.bench import figures
from crosslight.bench.figures import Figure


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(figures, "K", 16)
    monkeypatch.setattr(figures, "SIZES", {"dim": 16, "heads": 2})
    bench = figures._Bench("cpu")
    times = bench.times
    monkeypatch.setattr(bench, "times", lambda seconds=0, **calls: times(0, **calls))
    return bench


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (figures.softmax, ["softmax over nn.Linear + SDPA, noncausal-self, 16, forward"]),
        (figures.moba, ["dense causal SDPA over moba (block 128, top 8)"]),
        (figures.lightning, ["dense causal SDPA over lightning-attention", "growth exponent of lightning-attention"]),
    ],
)
def test_a_part_takes_its_figures(bench, part, names):
    found = list(part(bench))
    assert all(figure.value > 0 for figure in found)
    for name, figure in zip(names, found, strict=False):
        assert figure.name.startswith(name)


def test_extra_memory_is_of_every_sub_quadratic_row(bench, monkeypatch):
    cards = [
        card for card in figures.registry.find(kind="token") if card.id in ("fastmax", "shvit", "efficient-attention")
    ]
    monkeypatch.setattr(figures.registry, "find", lambda **which: cards)
    found = list(figures.extra_memory(bench))
    # shvit is n^2; the others are measured forward, and forward + backward.
    assert [figure.name.split(" at ")[0] for figure in found] == [
        f"extra memory of {id}" for id in ("efficient-attention", "fastmax") for _ in range(2)
    ]
    for forward, both in zip(found[::2], found[1::2], strict=True):
        assert 0 < forward.value < both.value
        assert forward.detail.endswith("between heads")


def test_every_sub_quadratic_row_has_its_extra_memory(bench, monkeypatch):
    monkeypatch.setattr(figures, "K", 4)
    monkeypatch.setattr(figures, "SIZES", {"dim": 512, "heads": 8})
    bench = figures._Bench("cpu")
    monkeypatch.setattr(figures.memory, "peak", lambda call, device: len([call()]))
    found = list(figures.extra_memory(bench))
    assert len(found) >= 80
    assert {figure.name: figure.detail for figure in found if figure.value is None} == {}


def test_figures_of_another_device_stay(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "docs").mkdir()
    record = tmp_path / "bench" / "figures.json"
    record.write_text(json.dumps({"cuda": {"machine": {}, "figures": []}}))
    taken = [Figure("a", "at most", 1, 0.5), Figure("b", "at least", 1, 0.5)]
    written = figures.files(tmp_path, "cpu", taken)
    known = json.loads(written[record])
    assert set(known) == {"cuda", "cpu"}
    assert [figure["holds"] for figure in known["cpu"]["figures"]] == [True, False]
    page = written[tmp_path / "docs" / "performance.md"]
    assert "| a | at most 1× | 0.5× |  |" in page
    assert "| b | at least 1× | 0.5× | missed |" in page
