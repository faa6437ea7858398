"""Running trials in this process or in several, and storing each as it ends."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from crosslight import registry, tasks
from crosslight.comparison.store import Store
from crosslight.comparison.trial import Trial, run

Record = dict[str, Any]
#: Called with a trial, the share of it that is done, and its record once it has ended.
Watcher = Callable[[Trial, float, Record | None], None]


def run_all(trials: Sequence[Trial], store: Store, *, workers: int = 1, watcher: Watcher | None = None) -> None:
    """Run the trials that the store lacks. The store holds every trial that ended, whatever stops this."""
    watch = watcher or _unwatched
    missing = list({trial.key: trial for trial in trials if trial.key not in store}.values())
    # Under `accelerate launch` the processes share a trial instead of each running its own.
    workers = min(workers, len(missing)) if int(os.environ.get("WORLD_SIZE", "1")) == 1 else 1
    if workers > 1 and all(map(_importable, missing)):
        _in_processes(missing, store, workers, watch)
        return
    for trial in missing:
        record = run(trial, partial(_share, watch, trial), store.weights(trial.key))
        store.append(record)
        watch(trial, 1.0, record)


def _share(watch: Watcher, trial: Trial, share: float) -> None:
    watch(trial, share, None)


def _unwatched(trial: Trial, share: float, record: Record | None) -> None:
    pass


def _modules(trial: Trial) -> set[str]:
    """The modules that register the task and the entrant, where they are not ours."""
    task = tasks.find(trial.task)
    found = {task.__module__}
    if trial.entrant.id not in task.companions:
        found.add(registry.factory(trial.entrant.id)[0].__module__)
    return {module for module in found if not module.startswith("crosslight.")}


def _importable(trial: Trial) -> bool:
    # A script is imported anew by each worker; a notebook or an interactive session cannot be.
    return "__main__" not in _modules(trial) or hasattr(sys.modules["__main__"], "__file__")


class _Worker:
    """A process that runs one trial after another."""

    def __init__(self, context: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        with _uninterrupted():
            self.process.start()
        theirs.close()
        self.trial: Trial | None = None

    def give(self, trial: Trial, weights: str) -> None:
        self.trial = trial
        self.pipe.send((trial, weights, _modules(trial) - {"__main__"}))

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What starts inside ignores Ctrl-C from its first moment on, where it would print a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_processes(trials: Iterable[Trial], store: Store, workers: int, watch: Watcher) -> None:
    context = multiprocessing.get_context("spawn")
    waiting = list(trials)[::-1]
    team: list[_Worker] = []
    try:
        while waiting or team:
            while waiting and len(team) < workers:
                team.append(_Worker(context))
                _next(team[-1], waiting, store)
            by_pipe = {worker.pipe: worker for worker in team}
            for pipe in wait(list(by_pipe)):
                worker = by_pipe[pipe]
                assert worker.trial is not None
                try:
                    share, record = worker.pipe.recv()
                except (EOFError, ConnectionError):  # the process died: out of memory, a crash in a kernel
                    worker.process.join()
                    error = f"the worker process ended with exit code {worker.process.exitcode}"
                    share, record = 1.0, _lost(worker.trial, error)
                    team.remove(worker)
                if record is not None:
                    store.append(record)
                watch(worker.trial, share, record)
                if record is not None and worker in team and not _next(worker, waiting, store):
                    team.remove(worker)
                    worker.stop()
    finally:
        for worker in team:
            worker.stop()


def _next(worker: _Worker, waiting: list[Trial], store: Store) -> bool:
    if waiting:
        trial = waiting.pop()
        # A worker that has just died is noticed when its pipe is read.
        with contextlib.suppress(ConnectionError):
            worker.give(trial, str(store.weights(trial.key)))
        return True
    return False


def _lost(trial: Trial, error: str) -> Record:
    return trial.record(status="failed", error=error, wall_s=None)


def _work(pipe: Connection) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    from pathlib import Path

    import torch

    torch.set_num_threads(1)
    while True:
        try:
            trial, weights, modules = pipe.recv()
        except EOFError:
            return
        last = time.monotonic()

        def progress(share: float) -> None:
            nonlocal last
            if time.monotonic() - last > 0.2:
                last = time.monotonic()
                pipe.send((share, None))

        try:
            for module in modules:
                importlib.import_module(module)
            record = run(trial, progress, Path(weights))
        except ImportError as error:
            record = _lost(trial, f"ImportError: {error}")
        pipe.send((1.0, record))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
