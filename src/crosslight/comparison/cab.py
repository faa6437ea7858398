"""CAB's compositional index: one figure for an entrant over tasks whose metrics have different units.

Zhang et al., "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling", 2022, arXiv 2210.07661. CAB sorts
attention by two questions: do query and key come from one sequence (self or cross), and is the future hidden (causal
or not)? The four patterns are those of `crosslight compare`, which runs one task for each.

    z_t(e) = s_t (x_t(e) - mean_e x_t) / std_e x_t      s_t = 1 where higher is better, -1 where lower is
    CI(e)  = mean_t z_t(e)

x_t(e) is the mean over seeds of entrant e's metric on task t; mean and standard deviation (of the population) run over
the entrants of the task. The index does not change when a metric is rescaled by a positive slope and an offset. Where
all entrants are equal, z is 0. An entrant without a result on a task (its trials diverged or failed, or it lacks the
pattern) is left out there: its index is over the tasks it has, ``tasks`` says how many, and it stands below those that
have more, because indices over different tasks do not compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosslight.cards import Card, Evidence
from crosslight.errors import require
from crosslight.registry import register

if TYPE_CHECKING:
    import pandas as pd

CARD = Card(
    id="cab",
    kind="bench",
    group="bench",
    title="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
    year=2022,
    paper="2210.07661",
    code="Shark-NLP/CAB",
    summary="Ranks attention over four patterns by the mean of metrics that are z-normalised per task.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    mask="none",
    checked="the definition on a small table, and invariance to rescaling any metric by a positive slope",
    differs=(
        "The paper's seven tasks train for days. The four here train in minutes and keep its patterns; causal cross is "
        "a decoder that sees all of its context, where the paper's causal cross streams the context."
    ),
    evidence=Evidence(
        claim="Over the four patterns, attention has a higher compositional index than mean pooling",
        task="digits,language,forecast,spelling",
        metric="index",
        margin=1.0,
        entrant="softmax",
        baseline="mean-pooling",
    ),
)


@register(CARD)
def index(board: pd.DataFrame) -> pd.DataFrame:
    """The compositional index of each entrant of a leaderboard, the best first.

    Args:
        board: with columns task, label, mean and higher_is_better, as `crosslight.comparison.leaderboard` makes it.

    Returns:
        columns label, index, tasks (how many the index is over) and one column of z a task.
    """
    pandas = require("pandas", "compare")
    columns = {}
    for task, rows in board.groupby("task", sort=False):
        x = rows.set_index("label")["mean"].astype(float)
        sign = 1.0 if bool(rows.higher_is_better.iloc[0]) else -1.0
        spread = x.std(ddof=0)
        # Differences in the last bits are no ranking.
        columns[task] = sign * (x - x.mean()) / spread if spread > 1e-12 * max(1.0, x.abs().max()) else x * 0.0
    z = pandas.DataFrame(columns)
    table = pandas.DataFrame({"index": z.mean(axis=1), "tasks": z.notna().sum(axis=1)}).join(z)
    table["_rank"] = (-table["index"]).round(12)  # equals stay in the board's order
    table = table.sort_values(["tasks", "_rank"], ascending=[False, True], kind="stable").drop(columns="_rank")
    return table.rename_axis("label").reset_index()
