"""Running the evidence of cards: an entrant against a baseline on a task, judged by a margin.

The trials go through the store of `crosslight compare`, so that a baseline which two rows share is trained once and a
run that was stopped resumes. Each outcome is one JSON line.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import crosslight
from crosslight import registry, tasks
from crosslight.cards import Card, Evidence
from crosslight.comparison import cab, study
from crosslight.comparison.leaderboard import leaderboard
from crosslight.comparison.pool import run_all
from crosslight.comparison.progress import Bars
from crosslight.comparison.store import Store
from crosslight.comparison.trial import Budget, Trial, digest
from crosslight.errors import expect
from crosslight.tasks import Entrant

Outcome = dict[str, Any]


class Plan:
    """The trials of one card's evidence and how they are judged."""

    def __init__(self, card: Card, device: str) -> None:
        expect(card.evidence is not None, "id", repr(card.id), "a card that declares evidence")
        assert card.evidence is not None
        self.card, self.evidence = card, card.evidence
        e: Evidence = self.evidence
        self.tasks = e.task.split(",")
        self.entrant = Entrant(e.entrant or card.id, dict(e.options))
        self.baseline = Entrant(e.baseline, dict(e.baseline_options))
        expect(self.entrant != self.baseline, f"evidence of {card.id!r}", self.entrant.label, "another baseline")
        self.higher_is_better = len(self.tasks) > 1 or tasks.find(e.task).higher_is_better
        self.trials = {
            entrant.label: [self._trial(task, entrant, seed, device) for task in self.tasks for seed in range(e.seeds)]
            for entrant in (self.entrant, self.baseline)
        }

    def _trial(self, name: str, entrant: Entrant, seed: int, device: str) -> Trial:
        options = dict(self.evidence.task_options)
        budget = Budget.of(tasks.get(name, **options), **self.evidence.budget)
        return Trial(task=name, task_options=options, entrant=entrant, seed=seed, budget=budget, device=device)

    @property
    def all(self) -> list[Trial]:
        return [trial for trials in self.trials.values() for trial in trials]

    @property
    def source(self) -> str:
        """Changes with the code of the row, of its entrant or of its task."""
        return digest(
            [registry.source_of(self.card.id), *(trial.decides()["code"] for trial in self.all[: len(self.tasks)])]
        )

    def judge(self, store: Store) -> Outcome:
        """Compare the means over seeds; any trial without a score fails the claim."""
        e = self.evidence
        records = {label: [store[trial.key] for trial in trials] for label, trials in self.trials.items()}
        lost = [r for found in records.values() for r in found if r["status"] != "ok" or not self._has_score(r)]
        outcome: Outcome = {
            "id": self.card.id,
            "holds": False,
            "claim": e.claim,
            "task": e.task,
            "metric": e.metric,
            "entrant": self.entrant.label,
            "baseline": self.baseline.label,
            "difference": 0.0,
            "margin": e.margin,
        }
        if lost:
            first = lost[0]
            why = first.get("error") or f"no metric {e.metric!r}, only {', '.join(first.get('scores', {}))}"
            outcome["error"] = f"{first['task']} {first['id']} seed {first['seed']}: {why}"
        else:
            ours, theirs = (self._values(records)[label] for label in (self.entrant.label, self.baseline.label))
            difference = (1 if self.higher_is_better else -1) * (statistics.mean(ours) - statistics.mean(theirs))
            outcome |= {
                "holds": difference >= e.margin,
                "difference": difference,
                "values": ours,
                "baseline_values": theirs,
            }
        return outcome | {
            "seeds": e.seeds,
            "source": self.source,
            "seconds": round(sum(r["wall_s"] or 0.0 for found in records.values() for r in found), 1),
            "versions": {
                "crosslight": crosslight.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def _has_score(self, record: Mapping[str, Any]) -> bool:
        return len(self.tasks) > 1 or self.evidence.metric in record["scores"]

    def _values(self, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
        """A value for each seed of each entrant: the metric, or the index over several tasks."""
        if len(self.tasks) == 1:
            return {label: [r["scores"][self.evidence.metric] for r in found] for label, found in records.items()}
        values: dict[str, list[float]] = {label: [] for label in records}
        for seed in range(self.evidence.seeds):
            of_seed = [r for found in records.values() for r in found if r["seed"] == seed]
            index = cab.index(leaderboard(study.as_frame(of_seed))).set_index("label")["index"]
            for label, found in values.items():
                found.append(float(index[label]))
        return values


def verify(
    ids: Iterable[str],
    *,
    out: str | Path = "crosslight-runs",
    results: Path | None = None,
    device: str = "cpu",
    workers: int = 1,
    progress: bool = True,
    ended: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run the evidence of cards.

    Args:
        ids: cards that declare evidence.
        out: folder of the store.
        results: file that each outcome is appended to.
        ended: called with each outcome as its last trial ends.

    Raises:
        CrosslightError: an unknown id, or a card without evidence.
    """
    plans = [Plan(registered(id), device) for id in ids]
    store = Store(out)
    outcomes: dict[str, Outcome] = {}

    def judge_complete() -> None:
        for plan in plans:
            if plan.card.id not in outcomes and all(trial.key in store for trial in plan.all):
                outcome = outcomes[plan.card.id] = plan.judge(store)
                if results is not None:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(outcome) + "\n")
                if ended is not None:
                    ended(outcome)

    trials = [trial for plan in plans for trial in plan.all]
    judge_complete()
    with Bars(trials, store, shown=progress) as bars:

        def watch(trial: Trial, share: float, record: dict[str, Any] | None) -> None:
            bars.watch(trial, share, record)
            if record is not None:
                judge_complete()

        run_all(trials, store, workers=workers, watcher=watch)
    return [outcomes[plan.card.id] for plan in plans]


def registered(id: str) -> Card:
    """The card as the code declares it now; the index may be older."""
    registry.factory(id)
    return registry.card(id)


def changed(ids: Iterable[str], results: Path, device: str = "cpu") -> list[str]:
    """Those whose code is not the code of their last outcome."""
    last: dict[str, str] = {}
    if results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            outcome = json.loads(line)
            last[outcome["id"]] = outcome.get("source", "")
    return [id for id in ids if Plan(registered(id), device).source != last.get(id)]


def with_evidence() -> list[str]:
    """Every id whose card declares evidence."""
    registry.load_all()
    return [id for id in registry.ids() if registered(id).evidence is not None]
