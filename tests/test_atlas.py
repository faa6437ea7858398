"""The atlas pages of the docs: pictures of `weights`, cost curves and evidence, as `docs/hooks.py` makes them."""

from __future__ import annotations

import importlib
import json
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from crosslight import registry

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(DOCS))
    yield
    sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def atlas(on_path):
    names = ("colours", "cost", "evidence", "example", "pages", "text", "weights")
    return SimpleNamespace(**{name: importlib.import_module(f"atlas.{name}") for name in names})


def pixels(file: bytes) -> torch.Tensor:
    """(height, width, 3) of an indexed PNG file."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(file):
        (length,) = struct.unpack(">I", file[at : at + 4])
        name, data = file[at + 4 : at + 8], file[at + 8 : at + 8 + length]
        assert struct.unpack(">I", file[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + data)
        chunks[name] = data
        at += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, width + 1)
    assert not lines[:, 0].any(), "no line is filtered"
    return torch.frombuffer(bytearray(chunks[b"PLTE"]), dtype=torch.uint8).view(-1, 3)[lines[:, 1:].long()]


def test_the_example_is_the_digit_it_claims_to_be(atlas):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    assert digits.target[3] == 3
    assert torch.equal(atlas.example.digit() * 16, torch.tensor(digits.images[3]).float())


def test_brightness_is_the_size_of_a_weight_and_hue_its_sign(atlas):
    drawn = pixels(atlas.colours.picture(torch.tensor([[0.0, 0.02, 0.1, 0.4, -0.4]]))).float()[0]
    light = drawn.sum(-1)
    assert (light[:4].diff() > 60).all(), "small weights show too"
    assert drawn[3, 0] > drawn[3, 2], "a positive weight is warm"
    assert drawn[4, 2] > drawn[4, 0], "a negative one is cool"
    even = pixels(atlas.colours.picture(torch.full((4, 4), 0.25)))
    assert (even == even[0, 0]).all(), "what reads everything alike has no pattern"
    nearly = pixels(atlas.colours.picture(torch.linspace(0.25, 0.28, 81)[None])).float()[0].sum(-1)
    assert (nearly[::20].diff() > 60).all(), "small differences are drawn"


def test_the_picture_is_what_weights_gives(atlas):
    files = atlas.weights.files("moba")
    layer_sizes = {"dim": 32, "heads": 4, "block_size": 4, "top_k": 2}
    torch.manual_seed(0)
    layer = registry.create("moba", **layer_sizes).eval()
    weights = layer.weights(atlas.example.tokens(), causal=True)[0].detach()
    ground = torch.tensor(list(atlas.colours.palette()[3 * atlas.colours.LEVELS :][:3]))
    for i in range(4):
        dark = (pixels(files[f"causal-self-{i}.png"]) == ground).all(-1)
        assert dark[weights[i] == 0].all(), "what is not read is dark"
        assert not dark[weights[i] > 0.02].any()
    reads = pixels(files["causal-self-reads-1.png"])
    assert reads.shape == (8, 8, 3)
    assert (reads.view(64, 3)[atlas.example.QUERY + 1 :] == ground).all(), "a causal query reads no later pixel"
    page = atlas.weights.section("moba")
    assert 'create("moba", dim=32, heads=4, block_size=4, top_k=2)' in page
    assert all(f'src="{name}"' in page for name in files), "every picture is shown"


@pytest.mark.parametrize(
    ("id", "names", "words"),
    [
        ("hymba", {"causal-self.png"}, "matrix 18 of"),
        ("slot-attention", {"noncausal-cross.png", "noncausal-cross-query-6.png"}, "What each query reads"),
        ("cog-attention", {"noncausal-self.png", "causal-self.png"}, "negative weights"),
        ("fused-neighborhood-attention", {"noncausal-self-3.png"}, "What one pixel reads, causal"),
    ],
)
def test_rows_of_other_shapes(atlas, id, names, words):
    files, section = atlas.weights.files(id), atlas.weights.section(id)
    assert names <= set(files)
    assert words in section
    assert sum(map(len, files.values())) < 120_000
    causal = "causal-self" in registry.index()[id]["patterns"]
    assert ("causal-self.png" in files) == causal
    ElementTree.fromstring(
        f"<p>{section[section.index('<div') : section.rindex('</div>') + 6]}</p>".replace('loading="lazy">', "/>")
    )


def test_a_row_without_a_matrix_says_so(atlas, monkeypatch):
    def none(id):
        raise NotImplementedError("Its state is mixed in the frequency domain.")

    monkeypatch.setattr(atlas.example, "looks", none)
    assert "frequency domain" in atlas.weights.section("no-matrix")
    assert atlas.weights.files("no-matrix") == {}


def measured(id: str, seconds: dict[int, float], **more) -> dict:
    points = {
        str(n): {"status": "ok", "seconds": s, "peak_bytes": 4000 * n, "sdpa": s / (1e-9 * n * n), "naive": None}
        for n, s in seconds.items()
    }
    return {"id": id, "pattern": "causal-self", "measured": points, "growth": {}, "efficiency_length": {}, **more}


def bench() -> dict:
    row = measured(
        "moba",
        {1024: 0.004, 4096: 0.012, 16384: 0.05},
        growth={"time": 1.03, "memory": None},
        efficiency_length={"sdpa": "3,300", "naive": "> 16,384"},
        step_seconds=0.0005,
    )
    row["measured"]["65536"] = {"status": "over time", "seconds": None, "peak_bytes": None, "error": "about 80 s"}
    return {
        "machine": {"processor": "A processor", "threads": 2},
        "setting": {"dim": 512, "heads": 8, "mask": "", "pattern": "causal-self"},
        "rows": [row, measured("sdpa", {n: 1e-9 * n * n for n in (1024, 4096, 16384, 65536)})],
    }


def test_cost_is_drawn_against_the_baseline(atlas, tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(bench()))
    section = atlas.cost.section("moba", atlas.cost.table(path))
    svgs = [ElementTree.fromstring(part.split("</svg>")[0] + "</svg>") for part in split_svg(section)]
    assert len(svgs) == 2, "time and memory"
    points = {
        g.get("class"): [(float(c.get("cx")), float(c.get("cy"))) for c in g.iter("circle")] for g in svgs[0].iter("g")
    }
    assert len(points["own"]) == 3
    assert len(points["sdpa"]) == 4
    assert points["own"][0][1] < points["sdpa"][0][1], "slower at 1,024: higher up"
    assert points["own"][2][1] > points["sdpa"][2][1], "faster at 16,384"
    assert "| 65,536 | over time | · | · | · |" in section
    assert "| 16,384 | 50 ms | 0.19 × | · | 65.5 MB |" in section
    assert "time as n^1.03." in section
    assert "Faster than sdpa from 3,300 tokens on. Not faster than naive up to 16,384 tokens." in section
    assert "dim 512, heads 8. Measured" in section


def split_svg(text: str) -> list[str]:
    return [f"<svg{part}" for part in text.split("<svg")[1:]]


def test_what_was_not_measured_is_said(atlas, tmp_path):
    missing = atlas.cost.table(tmp_path / "none.json")
    for table in (missing, bench()):
        assert "not measured" in atlas.cost.section("lightning-attention", table)


def test_evidence_shows_every_seed_and_what_was_needed(atlas):
    result = {
        "entrant": "a(top=<4>)",
        "baseline": "b",
        "metric": "bits_per_byte",
        "margin": -0.1,
        "difference": -0.2,
        "values": [2.4, 2.6, 2.5],
        "baseline_values": [2.3, 2.2, 2.4],
    }
    ours, theirs = (
        ElementTree.fromstring(part.split("</svg>")[0] + "</svg>") for part in split_svg(atlas.evidence.strip(result))
    )
    dots = [float(c.get("cx").rstrip("%")) for c in ours.iter("circle")]
    goal = float(next(line for line in ours.iter("line") if line.get("class") == "goal").get("x1").rstrip("%"))
    assert len(dots) == len(list(theirs.iter("circle"))) == 3
    # A loss: the goal, 2.3 + 0.1, is on the first dot and the mean lies beyond it.
    assert goal == pytest.approx(dots[0], abs=0.02)
    assert sorted(dots) == [dots[0], dots[2], dots[1]]
    entry = {
        "id": "a",
        "result": result,
        "status": "not reproduced",
        "evidence": {
            "claim": "It is as good.",
            "task": "language",
            "metric": "bits_per_byte",
            "margin": -0.1,
            "seeds": 3,
        },
    }
    text = atlas.evidence.section(entry)
    assert "**Not reproduced**: worse than `b` by 0.200, 0.1 worse is allowed." in text
    assert "2.40, 2.60 and 2.50" in text
    assert "lower is better" in text
    assert "**Unverified**" in atlas.evidence.section(entry | {"result": None, "status": "unverified"})
    failed = entry | {"result": {"error": "digits a seed 0: out of memory"}}
    assert "a trial failed" in atlas.evidence.section(failed)
    assert "out of memory" in atlas.evidence.section(failed)
    assert "No learning claim" in atlas.evidence.section(entry | {"evidence": None})


def test_pages_hold_together_in_mkdocs(atlas, monkeypatch):
    pytest.importorskip("mkdocs")
    config = importlib.import_module("mkdocs.config").load_config(str(DOCS.parent / "mkdocs.yml"))
    hooks = importlib.import_module("hooks")
    ids = ("cbam", "moba", "softmax")
    entries = {id: registry.index()[id] for id in ids}
    monkeypatch.setattr(registry, "index", lambda: entries)
    files = importlib.import_module("mkdocs.structure.files").Files([])
    config.plugins._current_plugin = "hooks"
    made = {f.src_uri: f for f in hooks.on_files(files, config)}
    assert {"atlas/index.md", "atlas/digit.png", "atlas/moba.md", "atlas/moba/causal-self.png"} <= set(made)
    assert "moba/noncausal-self.png" in made["atlas/index.md"].content_string
    page = made["atlas/moba.md"].content_string
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["## What it reads", "## What it computes", "## Cost", "## Evidence", "## Faithfulness"]
    assert "```text\nkbar_b = mean" in page
    assert "## What it reads" not in made["atlas/cbam.md"].content_string


def test_a_docstring_is_prose_around_its_equations(atlas):
    text = atlas.text.prose("One * two, see ``a_b``.\n\n    y = x * w\n\n    z = [y]\n\n- not a list <b>.\n")
    assert text == "One &#42; two, see ``a_b``.\n\n```text\ny = x * w\n\nz = [y]\n```\n\n&#45; not a list &#60;b&#62;."
