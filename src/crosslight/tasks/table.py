"""The user's own table, .csv or .parquet: forecasting its target over time, or predicting it from the row's columns.

Forecasting follows the layout of the ETT files: a ``date`` column, series in the other columns, one of them the target
(OT there). The target is forecast from its own history and that of all other numeric columns; the last fifth of the
rows is held out. Classification and regression read a row as one token a column; a random fifth is held out.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight.errors import CrosslightError, expect, require
from crosslight.tasks import data
from crosslight.tasks.base import Size, Task, task
from crosslight.tasks.forecast import SeriesForecast
from crosslight.tasks.trunk import Pooled

if TYPE_CHECKING:
    import pandas as pd

GOALS = {"forecast": "table-forecast", "classify": "table-classify", "regress": "table-regress"}
#: Most classes of a column of whole numbers that is taken for categories.
CLASSES = 20


@cache
def read(file: str) -> pd.DataFrame:
    """The table, dates parsed.

    Raises:
        CrosslightError: it cannot be read or has no rows.
    """
    pandas = require("pandas", "compare")
    path, kind = Path(file), Path(file).suffix.lower()
    expect(kind in (".csv", ".parquet"), "table", file, "a .csv or .parquet file")
    try:
        frame = pandas.read_csv(path) if kind == ".csv" else pandas.read_parquet(path)
    except Exception as error:  # parsers raise errors of many kinds
        why = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        raise CrosslightError(f"table: got {file}, expected a {kind} file that can be read ({why})") from error
    expect(len(frame) > 0 and frame.shape[1] > 0, "table", f"{file} without rows", "a table with rows")
    frame.columns = [str(c).strip() for c in frame.columns]
    if frame.index.dtype.kind == "M":
        frame = frame.reset_index(names=frame.index.name or "date")
    for column in frame.columns:
        if frame[column].dtype.kind not in "MbiufcO" or frame[column].dtype.kind == "O":
            frame[column] = _dates(frame[column])
    return frame


def _dates(column: pd.Series) -> pd.Series:
    """A column of text as dates, where all of it is dates."""
    pandas = require("pandas", "compare")
    if not pandas.api.types.is_string_dtype(column) or not column.astype(str).str.contains(r"\d[-/:.]\d").all():
        return column
    try:
        return pandas.to_datetime(column, format="mixed")
    except (ValueError, TypeError):
        return column


def _is_date(column: pd.Series) -> bool:
    return column.dtype.kind == "M" or str(column.dtype).startswith("datetime")


def _is_number(column: pd.Series) -> bool:
    pandas = require("pandas", "compare")
    return pandas.api.types.is_numeric_dtype(column) and not pandas.api.types.is_bool_dtype(column)


def _target(frame: pd.DataFrame, target: str | None) -> pd.Series:
    expect(
        target is not None and target in frame.columns,
        "target",
        repr(target),
        f"a column of the table: {', '.join(frame.columns)}",
    )
    return frame[target]


def _whole(frame: pd.DataFrame, columns: list[str]) -> None:
    for column in columns:
        missing = int(frame[column].isna().sum())
        if _is_number(frame[column]):
            missing += int((frame[column].abs() == float("inf")).sum())
        expect(missing == 0, "table", f"{missing} missing, NaN or infinite values in column {column!r}", "none")


def choose(file: str, target: str | None, goal: str | None = None) -> str:
    """The name of the task for a table: forecast where it has dates, else by what the target holds."""
    expect(goal is None or goal in GOALS, "goal", repr(goal), f"one of {', '.join(GOALS)}")
    frame = read(file)
    column = _target(frame, target)
    if goal is None:
        dates = [c for c in frame.columns if _is_date(frame[c])]
        if dates and _is_number(column):
            goal = "forecast"
        else:
            whole = column.dtype.kind in "iu" and column.nunique() <= CLASSES
            goal = "regress" if _is_number(column) and not whole else "classify"
    return GOALS[goal]


@task
class TableForecast(SeriesForecast):
    """Forecast column ``target`` of ``file`` from its history and from the other numeric columns."""

    name = "table-forecast"

    def __init__(self, file: str, target: str, history: int = 48, horizon: int = 12) -> None:
        super().__init__(history, horizon)
        frame = read(str(file))
        expect(_is_number(_target(frame, target)), "target", f"{target!r}, which holds no numbers", "a numeric column")
        dates = [c for c in frame.columns if _is_date(frame[c])]
        numbers = [target, *(c for c in frame.columns if c != target and _is_number(frame[c]))]
        _whole(frame, [*dates[:1], *numbers])
        if dates:
            frame = frame.sort_values(dates[0], kind="stable")
        # Both parts must hold a window: the training rows whole ones, the held-out rows at least their horizons.
        needed = int(max((history + horizon + 8) / self.share, horizon / (1 - self.share))) + 1
        wanted = f"at least {needed} for history {history} and horizon {horizon}"
        expect(len(frame) >= needed, "table", f"{len(frame)} rows", wanted)
        self._rows = torch.tensor(frame[numbers].to_numpy(dtype="float32", copy=True))
        self._times = frame[dates[0]].astype(str).tolist() if dates else [str(i) for i in range(len(frame))]

    def table(self):
        return self._rows

    def steps_of_time(self):
        return self._times


class Columns(nn.Module):
    """A row as one token a column: a number scales the column's vector, a category has a vector of its own."""

    def __init__(self, sizes: list[int], dim: int) -> None:
        super().__init__()
        self.numbers = [i for i, size in enumerate(sizes) if size == 0]
        self.categories = [i for i, size in enumerate(sizes) if size > 0]
        self.scale = nn.Parameter(torch.randn(len(self.numbers), dim))
        starts = [0, *torch.tensor([sizes[i] for i in self.categories], dtype=torch.long).cumsum(0).tolist()]
        self.starts: Tensor
        self.register_buffer("starts", torch.tensor(starts[:-1], dtype=torch.long), persistent=False)
        self.table = nn.Embedding(starts[-1], dim) if self.categories else None
        order = torch.tensor([*self.numbers, *self.categories])
        self.order: Tensor
        self.register_buffer("order", order.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, self.numbers, None] * self.scale
        if self.table is not None:
            tokens = torch.cat([tokens, self.table(x[:, self.categories].long() + self.starts)], 1)
        return tokens[:, self.order]


class TableRows(Task):
    """Predict column ``target`` of ``file`` from the other columns of its row."""

    pattern = "noncausal-self"
    size = Size(dim=32, heads=4, depth=2)
    steps = 400
    batch_size = 32
    lr = 3e-3

    def __init__(self, file: str, target: str) -> None:
        frame = read(str(file))
        _whole(frame, list(frame.columns))
        _target(frame, target)
        expect(len(frame) >= 50, "table", f"{len(frame)} rows", "at least 50")
        self.columns = [c for c in frame.columns if c != target]
        expect(bool(self.columns), "table", f"no column but {target!r}", "columns to predict it from")
        frame = frame.sample(frac=1.0, random_state=0)
        self.test = len(frame) // 5
        self.y = self._answers(frame[target])
        parts = [self._column(frame[c]) for c in self.columns]
        self.x, self.sizes = torch.stack([x for x, _ in parts], 1), [size for _, size in parts]

    def _answers(self, column: pd.Series) -> Tensor:
        raise NotImplementedError

    def _column(self, column: pd.Series) -> tuple[Tensor, int]:
        """The values, standardised by the training rows, and 0; or codes of categories and their number."""
        if _is_date(column):
            column = column.astype("int64")
        if _is_number(column):
            x = torch.tensor(column.to_numpy(dtype="float64", copy=True))
            seen = x[self.test :]
            return ((x - seen.mean()) / seen.std().clamp(min=1e-9)).float(), 0
        codes, names = require("pandas", "compare").factorize(column, sort=True)
        return torch.tensor(codes, dtype=torch.float32), len(names)

    def batches(self, seed, batch_size):
        x, y = self.x[self.test :], self.y[self.test :]
        for index in data.shuffled(len(x), batch_size, seed):
            yield {"x": x[index], "y": y[index]}

    def _outputs(self) -> int:
        return 1

    def model(self, entrant, size):
        return Pooled(Columns(self.sizes, size.dim), entrant, size, len(self.columns), self._outputs())

    def _held_out(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        return model(self.x[: self.test].to(device)), self.y[: self.test].to(device)

    def example(self):
        return {"x": self.x[:1], "y": self.y[:1]}

    def labels(self, example: dict[str, Tensor]) -> dict[str, Any]:
        return {"rows": self.columns, "columns": self.columns}


@task
class TableClassify(TableRows):
    """Name the category in column ``target`` from the other columns of the row."""

    name = "table-classify"
    metric = "accuracy"

    def _answers(self, column):
        codes, names = require("pandas", "compare").factorize(column, sort=True)
        most = len(column) // 5
        expect(2 <= len(names) <= most, "target", f"{len(names)} classes", f"2 to {most} classes in {len(column)} rows")
        self.classes = len(names)
        return torch.tensor(codes, dtype=torch.long)

    def _outputs(self):
        return self.classes

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def evaluate(self, model):
        logits, y = self._held_out(model)
        return {"accuracy": (logits.argmax(-1) == y).float().mean().item(), "loss": F.cross_entropy(logits, y).item()}


@task
class TableRegress(TableRows):
    """Estimate the number in column ``target``, in units of its standard deviation, from the rest of the row."""

    name = "table-regress"
    metric = "mse"
    higher_is_better = False

    def _answers(self, column):
        expect(_is_number(column), "target", f"{column.name!r}, which holds no numbers", "a numeric column")
        return self._column(column)[0]

    def loss(self, model, batch):
        return F.mse_loss(model(batch["x"]).squeeze(-1), batch["y"])

    def evaluate(self, model):
        y, expected = self._held_out(model)
        error = y.squeeze(-1) - expected
        return {"mse": error.square().mean().item(), "mae": error.abs().mean().item()}
