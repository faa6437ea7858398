"""Progress of a run: one bar for all trials and one for each that is running."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from crosslight.comparison.store import Store
from crosslight.comparison.trial import Trial


class Bars:
    """On a terminal bars, elsewhere a line a trial; both on stderr."""

    def __init__(self, trials: Sequence[Trial], store: Store, shown: bool = True) -> None:
        self.total = len({trial.key for trial in trials})
        self.done = len({trial.key for trial in trials} & {t.key for t in trials if t.key in store})
        self.console = Console(stderr=True, quiet=not shown)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not (shown and self.console.is_terminal),
        )
        self.all = self.bars.add_task("trials", total=self.total, completed=self.done)
        self.running: dict[str, Any] = {}
        self.began = time.monotonic()

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def watch(self, trial: Trial, share: float, record: dict[str, Any] | None) -> None:
        name = f"{trial.task} · {trial.entrant.label} · seed {trial.seed}"
        if trial.key not in self.running:
            self.running[trial.key] = self.bars.add_task(name, total=100)
        self.bars.update(self.running[trial.key], completed=int(100 * share))
        if record is None:
            return
        self.done += 1
        self.bars.remove_task(self.running.pop(trial.key))
        self.bars.update(self.all, completed=self.done)
        outcome = f"{record['metric']} {record['score']:.4f}" if record["status"] == "ok" else record["error"]
        if not self.console.is_terminal or record["status"] != "ok":
            line = f"[{self.done}/{self.total}] {name}: {outcome} ({time.monotonic() - self.began:.0f} s)"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
