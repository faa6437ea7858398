"""The store and the pool: nothing is lost, nothing is repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_trial import trial
from toys import entrant

from crosslight.comparison.pool import run_all
from crosslight.comparison.store import Store
from crosslight.errors import CrosslightError


def lines(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_a_run_resumes_without_repeating(tmp_path):
    first = [trial(seed=s) for s in range(2)]
    run_all(first, Store(tmp_path))
    before = (tmp_path / "trials.jsonl").read_bytes()
    seen = []
    run_all(
        [*first, trial(seed=2), trial(seed=2)], Store(tmp_path), watcher=lambda t, share, r: seen.append((t.seed, r))
    )
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(before)
    assert [r["seed"] for r in lines(tmp_path)] == [0, 1, 2]
    assert [s for s, r in seen if r] == [2]


def test_failures_do_not_stop_the_rest_and_are_not_repeated(tmp_path):
    trials = [trial(entrant("raises")), trial(entrant("diverges")), trial(entrant())]
    run_all(trials, Store(tmp_path))
    assert [r["status"] for r in lines(tmp_path)] == ["failed", "diverged", "ok"]
    run_all(trials, Store(tmp_path))
    assert len(lines(tmp_path)) == 3


def test_a_line_cut_by_a_kill_is_dropped_and_its_trial_done_again(tmp_path):
    trials = [trial(seed=s) for s in range(2)]
    run_all(trials, Store(tmp_path))
    path = tmp_path / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    run_all(trials, Store(tmp_path))
    assert [r["seed"] for r in lines(tmp_path)] == [0, 1]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_store_that_is_none(tmp_path):
    (tmp_path / "trials.jsonl").write_text("not json\n")
    with pytest.raises(CrosslightError, match="trials.jsonl with line 1 unreadable, expected one JSON object a line"):
        Store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CrosslightError, match="out: got .*file, expected a folder to write to"):
        Store(tmp_path / "file")


def test_workers_share_the_trials_and_survive_a_crash(tmp_path):
    """Two processes; the entrant of one trial ends its process at once."""
    trials = [trial(entrant("dies")), trial(), trial(entrant("raises")), trial(seed=1)]
    run_all(trials, Store(tmp_path), workers=2)
    found = {r["key"]: r for r in lines(tmp_path)}
    assert len(found) == 4
    outcome = [(found[t.key]["status"], found[t.key].get("error")) for t in trials]
    assert outcome == [
        ("failed", "the worker process ended with exit code 3"),
        ("ok", None),
        ("failed", "RuntimeError: no luck"),
        ("ok", None),
    ]
    alone = Store(tmp_path / "alone")
    run_all([trials[1]], alone)
    assert alone[trials[1].key]["score"] == pytest.approx(found[trials[1].key]["score"], rel=1e-4)


SCRIPT = """
import sys; sys.path.insert(0, {here!r})
from test_trial import trial
from crosslight.comparison.pool import run_all
from crosslight.comparison.store import Store
if __name__ == "__main__":
    run_all([trial(seed=s, steps=40) for s in range(40)], Store({out!r}), workers=int(sys.argv[1]))
"""


@pytest.mark.parametrize(("workers", "how"), [(1, signal.SIGINT), (2, signal.SIGKILL)])
def test_killed_at_any_moment(tmp_path, workers, how):
    """A run that is killed leaves whole lines and no processes; the next run does what is missing, once each."""
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent), out=str(out)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(workers)],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A suite that runs in the background ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path = out / "trials.jsonl"
    deadline = time.monotonic() + 90
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(30)
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 2 <= len(kept) < 40
    trials = [trial(seed=s, steps=40) for s in range(40)]
    done = {json.loads(line)["key"] for line in kept}
    assert done <= {t.key for t in trials}
    while _alive(process.pid):  # workers notice that their parent is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    store = Store(out)
    run_all(trials[: len(kept) + 4], store)
    after = lines(out)
    assert after[: len(kept)] == [json.loads(line) for line in kept]
    assert len({r["key"] for r in after}) == len(after)


def _alive(group):
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
