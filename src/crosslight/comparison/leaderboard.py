"""Leaderboards: mean and spread over seeds for each entrant of a task, with what it costs beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosslight.errors import require

if TYPE_CHECKING:
    import pandas as pd


def leaderboard(trials: pd.DataFrame) -> pd.DataFrame:
    """A row for each task and entrant, the best first within a task.

    Columns: pattern, task, metric, label, id, mean, spread (standard deviation over seeds; NaN with one seed), seeds
    (trials that count), diverged, failed, parameters, flops and memory (bytes) of a training step, step_ms (median).
    Diverged and failed trials count in their columns and nowhere else; an entrant without any other has no mean.
    """
    pandas = require("pandas", "compare")
    rows = []
    for (task, label), group in trials.groupby(["task", "label"], sort=False):
        good = group[group.status == "ok"]
        score = good.score.astype(float)
        first = group.iloc[0] if good.empty else good.iloc[0]
        rows.append(
            {
                "pattern": first.pattern,
                "task": task,
                "metric": first.metric,
                "higher_is_better": first.higher_is_better,
                "label": label,
                "id": first.id,
                "mean": score.mean(),
                "spread": score.std(ddof=1),
                "seeds": len(good),
                "diverged": int((group.status == "diverged").sum()),
                "failed": int((group.status == "failed").sum()),
                **{c: good[c].astype(float).median() for c in ("parameters", "flops", "memory", "step_ms")},
            }
        )
    board = pandas.DataFrame(rows)
    board["_rank"] = board["mean"].where(~board.higher_is_better.astype(bool), -board["mean"])
    board["_task"] = board.task.map({task: i for i, task in enumerate(dict.fromkeys(board.task))})
    board = board.sort_values(["_task", "_rank"], na_position="last").drop(columns=["_task", "_rank"])
    return board.reset_index(drop=True)
