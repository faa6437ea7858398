"""Rows beside public implementations: pairs are what they say, outputs are compared, failures are lines."""

import json

import pytest
import torch
from torch import nn

from crosslight import registry
from crosslight.bench import public
from crosslight.bench.public import Compared, Pair, Side


def made(name: str) -> Pair:
    return next(p for p in public.PAIRS if name in p.name)


def test_every_pair_names_a_row_and_no_name_comes_twice():
    assert {p.row for p in public.PAIRS} <= set(registry.ids())
    assert len({p.name for p in public.PAIRS}) == len(public.PAIRS)


def test_a_pair_is_measured_with_equal_outputs():
    pytest.importorskip("timm")
    found = public.measure(made("eca over timm EcaModule, (8, 2048"), seconds=0)
    assert found.equal
    assert found.value > 0
    assert found.target == 1


@pytest.mark.parametrize(
    "name", ["xcit over timm XCA, (4", "davit over timm ChannelAttention, (16", "twins over timm Loc"]
)
def test_weights_map_over(name):
    pytest.importorskip("timm")
    ours, theirs, as_ours = made(name).build()
    torch.testing.assert_close(ours.forward(ours.x), as_ours(theirs.forward(theirs.x)), atol=1e-4, rtol=1e-3)


def pair_of(ours: nn.Module, theirs: nn.Module) -> Pair:
    x = torch.randn(2, 4, requires_grad=True)
    return Pair(
        "softmax",
        "a linear map",
        "(2, 4)",
        "nowhere",
        lambda: (Side(ours, x, ours), Side(theirs, x, theirs), public._same),
    )


def test_a_call_gives_gradients_of_parameters_and_input():
    side = pair_of(nn.Linear(4, 3), nn.Linear(4, 3)).build()[0]
    assert [g.shape for g in side()] == [(3, 4), (3,), (2, 4)]


def test_other_work_and_a_missing_package_are_lines(monkeypatch):
    def missing():
        public._package("no_such_package_of_attention", "no-such-package")

    pairs = [pair_of(nn.Linear(4, 3), nn.Linear(4, 3)), Pair("mqa", "none", "()", "nowhere", missing)]
    monkeypatch.setattr(public, "PAIRS", pairs)
    differs, absent = public.take(seconds=0)
    assert differs.value is absent.value is None
    assert not differs.holds
    assert "outputs differ" in differs.detail
    assert absent.detail == "no_such_package_of_attention is not installed: pip install no-such-package"
    assert [c.row for c in public.take(rows=["mqa"], seconds=0)] == ["mqa"]


def test_parameters_are_shared_out_and_left_out():
    ours = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 2)})
    theirs = nn.ModuleDict({"qk": nn.Linear(4, 6), "more": nn.Linear(1, 1)})
    public._load(ours, theirs, {"qk": "q k", "more": ""})
    assert torch.equal(torch.cat([ours["q"].weight, ours["k"].weight]), theirs["qk"].weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        public._load(ours, theirs, {"qk": "", "more": ""})


def test_the_page_keeps_what_else_is_there(tmp_path):
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text("# Performance\n\nOther text.\n")
    taken = [
        Compared("a over b", "at most", 1.0, 1.25, "×", "", "a", "b", "(1, 2)", "the paper", True),
        Compared("c over d", "at most", 1.0, None, "×", "d is not installed: pip install d", "c", "d", "(3)", "x"),
    ]
    for _ in range(2):  # the second time replaces the first
        for path, text in public.files(tmp_path, "cpu", taken).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    text = page.read_text()
    assert text.startswith("# Performance\n\nOther text.\n")
    assert text.count("<!-- public: cpu -->") == 1
    assert "| a | b | (1, 2) | the paper | 1.25× | missed |" in text
    assert "| c | d | (3) | x | - | d is not installed: pip install d |" in text
    held = json.loads((tmp_path / "bench" / "public.json").read_text())["cpu"]["figures"]
    assert [f["value"] for f in held] == [1.25, None]
