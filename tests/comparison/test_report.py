"""The report: one file, no network, and a page that holds together in a browser."""

import base64
import json
import re
import shutil
import subprocess
import zlib

import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("pandas")

from crosslight import registry
from crosslight.comparison import report
from crosslight.errors import CrosslightError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COSTS = {"parameters": 19_594, "flops": 3.0e8, "memory": 2.5e7, "step_ms": 91.4, "steps": 60, "train_s": 5.4}


def record(task, pattern, id, seed, score, *, options=None, status="ok", error=None, higher=True):
    return {
        "key": f"{task}-{id}-{seed}",
        "task": task,
        "pattern": pattern,
        "id": id,
        "options": options or {},
        "seed": seed,
        "status": status,
        "metric": "accuracy" if higher else "bits_per_byte",
        "score": score,
        "higher_is_better": higher,
        "error": error,
        **COSTS,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Records of two tasks and their weights, as the store keeps them."""
    folder = tmp_path_factory.mktemp("run") / "weights"
    folder.mkdir()
    for id in ("softmax", "mean-pooling", "sigmoid-attention"):
        registry.factory(id)  # the cards are known with or without the shipped index
    diverged = {"options": {"score_bias": -4.0}, "status": "diverged", "error": "the loss is <nan>"}
    records = [
        record("digits", "noncausal-self", "mean-pooling", 0, 0.61),
        record("digits", "noncausal-self", "softmax", 0, 0.94),
        record("digits", "noncausal-self", "softmax", 1, 0.92),
        record("digits", "noncausal-self", "sigmoid-attention", 0, 0.95, options={"score_bias": -4.0}),
        record("digits", "noncausal-self", "sigmoid-attention", 1, None, **diverged),
        record("language", "causal-self", "mean-pooling", 0, 3.46, higher=False),
        record("language", "causal-self", "softmax", 0, 3.41, higher=False),
    ]
    generator = torch.Generator().manual_seed(0)
    for r in records:
        if r["status"] != "ok":
            continue
        maps = [torch.randn(2, 16, 16, generator=generator).softmax(-1) for _ in range(2)]
        if r["id"] == "sigmoid-attention":
            maps[1] = -maps[1]
        image = torch.rand(4, 4, generator=generator) if r["task"] == "digits" else None
        labels = [f"({i // 4}, {i % 4})" for i in range(16)] if r["task"] == "digits" else list("def f(<script>):")
        torch.save({"maps": maps, "rows": labels, "columns": labels, "image": image}, folder / f"{r['key']}.pt")
    return records, folder


@pytest.fixture(scope="module")
def bench():
    def point(entrant, n, seconds):
        return {
            "entrant": entrant,
            "length": n,
            "status": "ok",
            "best": seconds,
            "peak_bytes": 1000 * n,
            "flops": n * n,
        }

    return {
        "setting": {"pattern": "causal-self", "dim": 64, "heads": 4, "batch": 1, "dtype": "float32", "backward": True},
        "machine": {"processor": "a processor", "threads": 2, "torch": "2.13"},
        "measurements": [point(e, n, s * n) for e, s in (("softmax", 1e-5), ("sdpa", 2e-5)) for n in (256, 1024)],
        "summary": [
            {
                "entrant": "softmax",
                "growth": {"time": 1.0, "memory": 1.0, "flops": None},
                "efficiency_length": {"sdpa": {"length": 256, "bound": "at most"}},
            }
        ],
    }


@pytest.fixture(scope="module")
def page(run, bench):
    return report.render(*run, bench=bench)


def test_needs_no_network(page):
    assert not re.search(r"(src|srcset|@import|url\()\s*=?\s*[\"']?(https?:)?//", page)
    assert "https://arxiv.org/abs/1706.03762" in page, "the papers are linked"
    assert set(re.findall(r'<(\w+)[^>]*="https?://', page)) == {"a"}, "something else than a link points outside"
    assert "default-src 'none'" in page
    assert len(page) < 2_000_000


def test_leaderboard_is_ranked_and_holds_sort_values(page):
    board = page[page.index("Leaderboard of digits") : page.index("Leaderboard of language")]
    names = re.findall(r'<th scope="row" data-value="([^"]+)"', board)
    assert names == ["sigmoid-attention(score_bias=-4.0)", "softmax", "mean-pooling"]
    assert '<td class="n best" data-value="0.95">0.950' in board
    assert "1 diverged" in board
    assert re.search(r"0\.930<small> ± 0\.014", board)
    assert 'aria-sort="descending"' in board


def test_lower_is_better_is_ranked_so(page):
    board = page[page.index("Leaderboard of language") :]
    assert re.findall(r'<th scope="row" data-value="([^"]+)"', board)[:2] == ["softmax", "mean-pooling"]
    assert 'aria-sort="ascending"' in board


def test_a_task_says_what_it_is(run):
    frame = report._frame(run[0])
    frame["task"] = frame.task.replace({"digits": "table-forecast"})
    page = report.render(frame)
    assert "Forecast column target of file" in page, "the markup of docstrings is not for readers"
    frame.attrs["about"] = {"table-forecast": "'OT' of <ett>.csv"}
    assert "of &lt;ett&gt;.csv" in report.render(frame)


def test_what_trials_say_is_escaped(page):
    assert "the loss is &lt;nan&gt;" in page
    assert page.count("<script") == 2, "a token named <script> opened one"


def test_maps_survive_packing(run):
    folder = run[1]
    key = "digits-sigmoid-attention-0"
    kept = torch.load(folder / f"{key}.pt", weights_only=True)["maps"][1]
    layer = report._maps(folder, key)["layers"][1]
    data = bytearray(zlib.decompress(base64.b64decode(layer["data"])))
    packed = torch.frombuffer(data, dtype=torch.int8).float()
    packed, scale = packed.view(2, 16, 16), torch.tensor(layer["scale"])[:, None, None]
    unpacked = packed.sign() * (packed / 127) ** 2 * scale
    assert (unpacked - kept).abs().max() < 0.01 * scale.max()


def test_frames_and_files(run, bench, tmp_path):
    from crosslight.comparison.study import as_frame

    records, folder = run
    frame = as_frame(records)
    frame.attrs["out"] = str(folder.parent)
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    path = report.write(frame, tmp_path / "report.html", bench=tmp_path / "bench.json")
    assert path.read_text(encoding="utf-8") == report.render(records, folder, bench=bench)


def test_curves_alone(bench):
    page = report.render([], bench=bench)
    assert "Leaderboards" not in page
    assert "≤ 256" in page


def test_bad_files(tmp_path, run):
    with pytest.raises(CrosslightError, match="path"):
        report.write(run[0], tmp_path / "missing" / "report.html")
    with pytest.raises(CrosslightError, match="bench"):
        report.render([], bench=tmp_path / "nothing.json")


PROBE = """<script>
window.faults = [];
addEventListener("error", (e) => faults.push(String(e.message)));
addEventListener("unhandledrejection", (e) => faults.push(String(e.reason)));
addEventListener("load", () => setTimeout(() => {
  const sorted = document.querySelector("#boards table");
  sorted.tHead.rows[0].cells[0].querySelector("button").click();
  const map = document.querySelector("#sheet canvas");
  const drawn = map && map.getContext("2d").getImageData(0, 0, map.width, map.height).data.buffer;
  const pixels = drawn ? new Set(new Uint32Array(drawn)).size : 0;
  parent.postMessage({
    faults, pixels, room: innerWidth, needed: document.documentElement.scrollWidth,
    maps: document.querySelectorAll("#sheet canvas").length, charts: document.querySelectorAll(".chart svg").length,
    first: sorted.tBodies[0].rows[0].cells[0].dataset.value,
  }, "*");
}, 800));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(page, width, tmp_path):
    (tmp_path / "page.html").write_text(page.replace("<head>", "<head>" + PROBE, 1), encoding="utf-8")
    # A frame, as a headless window has a least width above that of a phone.
    (tmp_path / "host.html").write_text(
        f'<title></title><iframe src="page.html" width="{width}" height="844" style="border:0"></iframe>'
        "<script>addEventListener('message', (e) => { document.title = JSON.stringify(e.data); })</script>"
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --window-size=1600,1000 "
        "--virtual-time-budget=6000 --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), (tmp_path / "host.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    seen = json.loads(title[1])
    assert seen["faults"] == []
    assert seen["room"] in (width, width - 15), "a scroll bar takes 15 pixels at most"
    assert seen["needed"] <= seen["room"], "the page is wider than the screen"
    assert seen["maps"] == 3 * 2 * 2, "every head of every layer of every mechanism"
    assert seen["pixels"] > 20, "the maps are drawn"
    assert seen["charts"] == 2 + 3
    assert seen["first"] == "mean-pooling", "a click on the heading sorts by name"
