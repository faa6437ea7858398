"""The user's own table, .csv or .parquet: forecasting its target over time, or predicting it from the row's columns.

Forecasting follows the layout of the ETT files: a ``date`` column, series in the other columns, one of them the target
(OT there). The target is forecast from its own history and that of all other numeric columns; the last fifth of the
rows is held out. Classification and regression read a row as one token a column; a random fifth is held out.

A missing value is an error. With ``fill``, one in a column other than the target is filled: a series goes on with its
last value, a number of a row becomes the mean of the training rows, and a missing category is one of its own.
"""

from __future__ import annotations

import warnings
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
        frame = _csv(path) if kind == ".csv" else pandas.read_parquet(path)
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


def _csv(path: Path) -> pd.DataFrame:
    """A file with commas, or with semicolons or tabs, as spreadsheets write it where the comma is a decimal point."""
    pandas = require("pandas", "compare")
    frame = pandas.read_csv(path)
    header = str(frame.columns[0])
    separator = next((s for s in ";\t" if s in header), None)
    if frame.shape[1] > 1 or separator is None:
        return frame
    ways = [pandas.read_csv(path, sep=separator, decimal=decimal) for decimal in ".,"]
    return max(ways, key=lambda way: way.select_dtypes("number").shape[1])


def _dates(column: pd.Series) -> pd.Series:
    """A column of text as dates, where all of it that is not missing is dates."""
    pandas = require("pandas", "compare")
    text = column.dropna()
    if not len(text) or not pandas.api.types.is_string_dtype(text) or not text.str.contains(r"\d[-/:.]\d").all():
        return column
    # One form for all first: read one by one, 02.03. and 13.03. would be days of two months.
    for way in ({}, {"dayfirst": True}, {"format": "mixed"}):
        try:
            with warnings.catch_warnings(action="ignore"):  # where pandas knows no form, it tells
                return pandas.to_datetime(column, **way)
        except (ValueError, TypeError):
            continue
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


def _finite(column: pd.Series) -> pd.Series:
    """The column, infinite numbers as missing ones."""
    return column.mask(column.abs() == float("inf")) if _is_number(column) else column


def _whole(frame: pd.DataFrame, columns: list[str], advice: str) -> None:
    for column in columns:
        missing = int(_finite(frame[column]).isna().sum())
        got = f"{missing} missing, NaN or infinite values in column {column!r}"
        expect(missing == 0, "table", got, f"none ({advice})")


#: What to do about missing values, of the target and of other columns.
_LEAVE_OUT, _FILL = "leave their rows out", "`--fill`, or the task option fill, fills them"


def _useless(column: pd.Series) -> str:
    """Why a column is left out: it is empty, or text that hardly repeats, such as a name or a date in no known form."""
    if _finite(column).isna().all():
        return "empty"
    different = column.nunique()
    if not _is_number(column) and not _is_date(column) and different > max(CLASSES, len(column) // 2):
        return f"text with {different} different values"
    return ""


def _says(left_out: dict[str, str], filled: int) -> str:
    parts = [f"{filled} missing values are filled"] if filled else []
    parts += [f"{name!r} is left out ({why})" for name, why in left_out.items()]
    return "".join(f"; {part}" for part in parts)


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

    def __init__(self, file: str, target: str, history: int = 48, horizon: int = 12, fill: bool = False) -> None:
        super().__init__(history, horizon)
        frame = read(str(file))
        expect(_is_number(_target(frame, target)), "target", f"{target!r}, which holds no numbers", "a numeric column")
        dates = [c for c in frame.columns if _is_date(frame[c])]
        _whole(frame, [*dates[:1], target], _LEAVE_OUT)
        left_out = {c: why for c in frame.columns if (why := _useless(frame[c]))}
        numbers = [target, *(c for c in frame.columns if c != target and c not in left_out and _is_number(frame[c]))]
        if not fill:
            _whole(frame, numbers, _FILL)
        if dates:
            frame = frame.sort_values(dates[0], kind="stable")
        series = frame[numbers].apply(_finite)
        holes = int(series.isna().to_numpy().sum())
        series = series.ffill().fillna(series[: int(len(frame) * self.share)].mean()).fillna(0.0)
        # Both parts must hold a window: the training rows whole ones, the held-out rows at least their horizons.
        needed = int(max((history + horizon + 8) / self.share, horizon / (1 - self.share))) + 1
        wanted = f"at least {needed} for history {history} and horizon {horizon}"
        expect(len(frame) >= needed, "table", f"{len(frame)} rows", wanted)
        self._rows = torch.tensor(series.to_numpy(dtype="float32", copy=True))
        self._times = _short(frame[dates[0]]) if dates else [str(i) for i in range(len(frame))]
        self.about = (
            f"{target!r} of {Path(file).name}: {horizon} steps from {history} before them, of {len(numbers)} series; "
            f"the last fifth of {len(frame)} rows is held out, errors are in standard deviations of {target!r}"
            + _says(left_out, holes)
        )

    def table(self):
        return self._rows

    def steps_of_time(self):
        return self._times


def _short(times: pd.Series) -> list[str]:
    """Times without what all of them share: days where none has an hour, else no year and no seconds."""
    plain = times.dt.strftime("%H:%M:%S")
    form = "%Y-%m-%d" if (plain == plain.iloc[0]).all() else "%m-%d %H:%M"
    if plain.str.slice(6).nunique() > 1:
        form = "%d %H:%M:%S"
    return times.dt.strftime(form).tolist()


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

    def __init__(self, file: str, target: str, fill: bool = False) -> None:
        frame = read(str(file))
        _target(frame, target)
        _whole(frame, [target], _LEAVE_OUT)
        expect(len(frame) >= 50, "table", f"{len(frame)} rows", "at least 50")
        others = {c: _useless(frame[c]) for c in frame.columns if c != target}
        self.columns = [c for c, why in others.items() if not why]
        expect(bool(self.columns), "table", f"no column of use but {target!r}", "columns to predict it from")
        if not fill:
            _whole(frame, self.columns, _FILL)
        frame = frame.sample(frac=1.0, random_state=0)
        holes = int(frame[self.columns].apply(_finite).isna().to_numpy().sum())
        self.about = (
            f"{target!r} of {Path(file).name} from the {len(self.columns)} other "
            f"column{'s' * (len(self.columns) > 1)} of its row; "
            f"a fifth of {len(frame)} rows is held out" + _says({c: why for c, why in others.items() if why}, holes)
        )
        self.test = len(frame) // 5
        self.y = self._answers(frame[target])
        parts = [self._column(frame[c]) for c in self.columns]
        self.x, self.sizes = torch.stack([x for x, _ in parts], 1), [size for _, size in parts]

    def _answers(self, column: pd.Series) -> Tensor:
        raise NotImplementedError

    def _column(self, column: pd.Series) -> tuple[Tensor, int]:
        """The values, standardised by the training rows, and 0; or codes of categories and their number."""
        if _is_date(column):
            column = column.astype("int64").where(column.notna())
        if _is_number(column):
            x = torch.tensor(_finite(column).to_numpy(dtype="float64", na_value=float("nan"), copy=True))
            seen = x[self.test :][~x[self.test :].isnan()]
            return ((x - seen.mean()) / seen.std().clamp(min=1e-9)).nan_to_num(0.0).float(), 0
        codes, names = require("pandas", "compare").factorize(column, sort=True, use_na_sentinel=False)
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
