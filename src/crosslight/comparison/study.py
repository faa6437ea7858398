"""`crosslight.compare`: entrants x tasks x seeds under one budget, as a data frame with a row a trial."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crosslight import registry, tasks
from crosslight.cards import PATTERNS
from crosslight.comparison import defaults
from crosslight.comparison.pool import run_all
from crosslight.comparison.progress import Bars
from crosslight.comparison.store import Store
from crosslight.comparison.trial import Budget, Trial
from crosslight.errors import CrosslightError, UnsupportedPattern, expect, require
from crosslight.tasks import Entrant, Size, Task

if TYPE_CHECKING:
    import pandas as pd

#: Columns of the frame that `compare` returns; scores of the task beside ``score`` follow as ``score_<name>``.
COLUMNS = (
    "pattern", "task", "id", "label", "seed", "status", "metric", "score", "higher_is_better", "parameters", "flops",
    "step_ms", "memory", "steps", "train_s", "error", "key",
)  # fmt: skip


def compare(
    mechanisms: str | Iterable[str | Entrant] | None = None,
    *,
    tasks: str | Iterable[str] | None = None,
    pattern: str | None = None,
    group: str | None = None,
    seeds: int | Sequence[int] = 2,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    dim: int | None = None,
    heads: int | None = None,
    depth: int | None = None,
    device: str | None = None,
    workers: int = 1,
    out: str | Path = "crosslight-runs",
    table: str | Path | None = None,
    target: str | None = None,
    goal: str | None = None,
    fill: bool = False,
    text: str | Path | None = None,
    task_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train mechanisms on tasks under one budget; mean pooling and softmax stand in every table.

    Args:
        mechanisms: ids, with options as ``"moba:block_size=8,top_k=3"`` or as `Entrant`; the defaults if None.
        tasks: task names; one bundled task a pattern if None, or the user's own where ``table`` or ``text`` is given.
        pattern: only tasks of this attention pattern.
        group: all mechanisms of a group of the catalogue, besides ``mechanisms``.
        seeds: how many, or which.
        steps, seconds: the budget of a trial, the task's own unless given; seconds count training alone.
        batch_size, lr, dim, heads, depth: the task's own unless given.
        device: "cpu", "cuda", ...; a GPU if there is one.
        workers: processes that run trials, with one thread each.
        out: folder of the store. Trials that it holds are not repeated.
        table, target, goal: a CSV or Parquet file, the column to predict, and "forecast", "classify" or "regress"
            (from the columns unless given).
        fill: fill missing values of the table in columns other than the target, which are an error otherwise.
        text: a file on whose bytes to train a language model.
        task_options: options of the tasks; with several tasks, those that a task does not have are an error.
        progress: show bars.

    Returns:
        A row a trial, with the columns `COLUMNS`. ``frame.attrs["notes"]`` says what was skipped and why,
        ``frame.attrs["about"]`` how a table or text was read, ``frame.attrs["out"]`` where the store is and
        ``frame.attrs["entrants"]`` what each label stands for.

    Raises:
        CrosslightError: unknown ids, tasks, patterns or options, or a table or text that does not serve.
    """
    for module in ("pandas", "accelerate"):
        require(module, "compare")
    expect(pattern is None or pattern in PATTERNS, "pattern", repr(pattern), f"one of {', '.join(PATTERNS)}")
    expect(isinstance(workers, int) and workers >= 1, "workers", repr(workers), "a positive int")
    expect(not fill or table is not None, "fill", fill, "a table whose missing values to fill (--table FILE)")
    own = {"fill": True, **(task_options or {})} if fill else task_options or {}
    chosen = _tasks(tasks, pattern, table, target, goal, text, own)
    entrants, asked = _entrants(mechanisms, group)
    numbers = _seeds(seeds)
    budget = {"steps": steps, "seconds": seconds, "batch_size": batch_size, "lr": lr}
    budget |= {"dim": dim, "heads": heads, "depth": depth}
    where = device_of(device)
    notes: list[str] = []
    budgets = {name: Budget.of(task, **budget) for name, (task, _) in chosen.items()}
    fitting = {
        name: [e for e in entrants if _fits(e, task, budgets[name].size, notes)] for name, (task, _) in chosen.items()
    }
    if asked and not any(e in asked for found in fitting.values() for e in found):
        raise UnsupportedPattern(f"with: got {', '.join(e.id for e in asked)}, expected one that fits. {notes[0]}")
    trials = [
        Trial(task=name, task_options=options, entrant=entrant, seed=seed, budget=budgets[name], device=where)
        for seed in numbers
        for name, (_, options) in chosen.items()
        for entrant in fitting[name]
    ]
    store = Store(out)
    with Bars(trials, store, shown=progress) as bars:
        run_all(trials, store, workers=workers, watcher=bars.watch)
    frame = as_frame([store[trial.key] for trial in trials])
    labelled = {trial.entrant.label: trial.entrant for trial in trials}
    about = {name: task.about for name, (task, _) in chosen.items() if hasattr(task, "about")}
    frame.attrs |= {"notes": notes, "out": str(store.folder), "entrants": labelled, "about": about}
    return frame


def as_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Records of trials as a data frame."""
    pandas = require("pandas", "compare")
    rows = []
    for record in records:
        entrant = Entrant(record["id"], record["options"])
        others = {f"score_{name}": value for name, value in record.get("scores", {}).items()}
        rows.append({**{name: record.get(name) for name in COLUMNS}, "label": entrant.label, **others})
    return pandas.DataFrame(rows)


def _tasks(
    names: str | Iterable[str] | None,
    pattern: str | None,
    table: str | Path | None,
    target: str | None,
    goal: str | None,
    text: str | Path | None,
    options: Mapping[str, Any],
) -> dict[str, tuple[Task, dict[str, Any]]]:
    """Name -> the task and its options, for every task that is asked for."""
    wanted: dict[str, dict[str, Any]] = {}
    names = [n for n in names.split(",") if n] if isinstance(names, str) else names
    for name in names or ():
        wanted[name.strip()] = dict(options)
    if table is not None:
        from crosslight.tasks import table as tables

        wanted[tables.choose(str(table), target, goal)] = {"file": str(table), "target": target, **options}
    else:
        expect(target is None, "target", repr(target), "a table to find it in (--table FILE)")
    if text is not None:
        wanted["text"] = {"file": str(text), **options}
    if not wanted:
        wanted = {name: dict(options) for name in defaults.TASKS if pattern in (None, tasks.find(name).pattern)}
    made = {name: (tasks.get(name, **own), own) for name, own in wanted.items()}
    fitting = {name: pair for name, pair in made.items() if pattern in (None, pair[0].pattern)}
    theirs = ", ".join(f"{task.pattern or task.kind} of {name}" for name, (task, _) in made.items())
    expect(bool(fitting), "pattern", repr(pattern), theirs)
    return fitting


def _entrants(
    mechanisms: str | Iterable[str | Entrant] | None, group: str | None
) -> tuple[list[Entrant], list[Entrant]]:
    """All entrants, and those among them that were asked for by name."""
    asked: list[Entrant] = []
    mechanisms = [mechanisms] if isinstance(mechanisms, str) else mechanisms
    for one in mechanisms or ():
        asked += [one] if isinstance(one, Entrant) else defaults.parse(one)
    if group is not None:
        members = [Entrant(card.id) for card in registry.find(group=group)]
        groups = sorted({registry.card(id).group for id in registry.ids()})
        expect(bool(members), "group", repr(group), f"one of {', '.join(groups)}")
        asked += members
    if not asked:
        return [*defaults.BASELINES, *defaults.MECHANISMS], []
    return list(_unique([*defaults.BASELINES, *asked])), [e for e in asked if e not in defaults.BASELINES]


def _unique(entrants: Iterable[Entrant]) -> Iterable[Entrant]:
    return {e.label: e for e in entrants}.values()


def _fits(entrant: Entrant, task: Task, size: Size, notes: list[str]) -> bool:
    """Whether the entrant can enter; a note where it cannot."""
    if entrant.id in task.companions:
        return True
    registry.factory(entrant.id)  # also finds a row that was written after the index
    card = registry.card(entrant.id)
    why = ""
    if card.kind != task.kind:
        why = f"it is of kind {card.kind}, the task of kind {task.kind}"
    elif task.kind == "token" and task.pattern not in card.patterns:
        why = f"it has no {task.pattern} attention. {card.why_not}".strip()
    elif task.kind == "token":
        try:
            registry.create(entrant.id, **{"dim": size.dim, "heads": size.heads, **entrant.options})
        except CrosslightError as error:
            if entrant.options or entrant in defaults.BASELINES:
                raise  # wrong options are the user's to mend, before anything is trained
            why = f"its defaults do not fit the task's model ({error}); give it options"
    if why and entrant not in defaults.BASELINES:
        notes.append(f"{entrant.label} is not in {task.name}: {why}")
    return not why


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, int):
        expect(seeds >= 1, "seeds", seeds, "a positive int")
        return list(range(seeds))
    expect(len(seeds) >= 1 and all(isinstance(s, int) for s in seeds), "seeds", seeds, "a number or a list of ints")
    return list(seeds)


def device_of(device: str | None) -> str:
    """A device that is here; a GPU, if there is one, where none is named."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise CrosslightError(f"device: got {device!r}, expected one that torch has here, such as cpu") from error
    return str(found)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
