"""`crosslight compare` and `crosslight verify` as a user calls them."""

import subprocess
import sys

import pytest


def crosslight(*arguments, cwd):
    code = "import torch; torch.set_num_threads(1); from crosslight.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    done = crosslight(
        "compare", "--with", "mqa,slot-attention", "--task", "digits,copy", "--steps", "2", "--seeds", "1",
        "--workers", "1", "--dim", "16", "--heads", "2", "--depth", "1", cwd=folder,
    )  # fmt: skip
    return folder, done


def test_leaderboards_an_index_notes_and_a_report(first):
    folder, done = first
    assert done.returncode == 0, done.stderr
    for text in ("noncausal-self · digits", "causal-cross · copy", "mean-pooling", "mqa", "compositional index"):
        assert text in done.stdout
    assert "note: slot-attention is not in digits" in done.stdout
    assert (folder / "report.html").stat().st_size > 10_000
    assert len((folder / "crosslight-runs" / "trials.jsonl").read_text().splitlines()) == 6


def test_a_table_says_how_it_was_read(tmp_path):
    rows = "".join(f"{i % 7};{i % 2};row {i}\n" for i in range(60))
    (tmp_path / "own.csv").write_text("a;b;name\n" + rows)
    done = crosslight(
        "compare", "--table", "own.csv", "--target", "b", "--with", "softmax", "--steps", "1", "--seeds", "1",
        "--workers", "1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'b' of own.csv from the 1 other column of its row" in done.stdout
    assert "'name' is left out (text with 60 different values)" in done.stdout
    assert "of own.csv from" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--with", "sofmax"), "error: id: got 'sofmax', expected a registered id such as softmax"),
        (("compare", "--table", "no.csv", "--target", "x"), "error: table: got no.csv, expected"),
        (("compare", "--text", "no.txt"), "error: text: got no.txt, expected"),
        (("compare", "--text", "own.bin"), "error: text: got own.bin, with a NUL byte at 3, expected a text file"),
        (("compare", "--device", "warp"), "error: device: got 'warp', expected"),
        (("verify",), "error: verify: got 0 of ID, --all and --changed, expected exactly one of them"),
        (("verify", "mean-pooling"), "error: id: got 'mean-pooling', expected a card that declares evidence"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "own.bin").write_bytes(b"\x7fEL" + bytes(4000))
    done = crosslight(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
