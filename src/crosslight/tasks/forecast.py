"""Forecasting the sea surface temperature of the tropical Pacific from its history and from atmospheric CO2.

Both monthly series ship with statsmodels (El Niño 1950-2010, Mauna Loa CO2 1958-2001): 526 months in common. The last
fifth of the months is held out. Each series of a window is centred on the mean of its history and everything is in
units of the training months' standard deviation.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight.errors import expect, require
from crosslight.tasks import data
from crosslight.tasks.base import Size, Task, task
from crosslight.tasks.trunk import Reader


class SeriesForecast(Task):
    """``horizon`` query tokens read a history of time steps, each step one token with the values of all series.

    Subclasses give the table, (time, series) with the target as its first column.
    """

    pattern = "noncausal-cross"
    metric = "mae"
    higher_is_better = False
    size = Size(dim=32, heads=4, depth=2)
    steps = 300
    batch_size = 32
    lr = 3e-3
    share: ClassVar[float] = 0.8

    def __init__(self, history: int = 48, horizon: int = 12) -> None:
        for name, value in {"history": history, "horizon": horizon}.items():
            expect(isinstance(value, int) and value >= 1, name, repr(value), "a positive int")
        self.history, self.horizon = history, horizon

    def table(self) -> Tensor:
        raise NotImplementedError

    def steps_of_time(self) -> list[str]:
        return [str(i) for i in range(len(self.table()))]

    def _split(self) -> tuple[Tensor, int]:
        """The standardised table and the first held-out row."""
        table = self.table()
        cut = int(len(table) * self.share)
        deviation = table[:cut].std(0).clamp(min=1e-6)
        return (table - table[:cut].mean(0)) / deviation, cut

    def _windows(self, rows: Tensor, starts: Tensor) -> dict[str, Tensor]:
        offsets = torch.arange(self.history + self.horizon)
        window = rows[starts[:, None] + offsets]
        past = window[:, : self.history]
        level = past.mean(1, keepdim=True)
        return {
            "history": past - level,
            "future": (window - level)[:, self.history :, 0],
        }

    def batches(self, seed, batch_size):
        rows, cut = self._split()
        for starts in data.drawn(cut - self.history - self.horizon + 1, batch_size, seed):
            yield self._windows(rows, starts)

    def _held_out(self) -> dict[str, Tensor]:
        """Every window whose horizon lies in the held-out rows; its history may reach back."""
        rows, cut = self._split()
        first, last = cut - self.history, len(rows) - self.history - self.horizon
        count = min(512, last - first + 1)
        return self._windows(rows, first + torch.arange(count) * ((last - first) // max(count - 1, 1)))

    def model(self, entrant, size):
        embed = nn.Linear(self.table().shape[1], size.dim)
        return Reader(embed, entrant, size, self.history, self.horizon, 1)

    def loss(self, model, batch):
        return F.mse_loss(model(batch["history"]).squeeze(-1), batch["future"])

    def evaluate(self, model):
        device = next(model.parameters()).device
        window = self._held_out()
        error = model(window["history"].to(device)).squeeze(-1) - window["future"].to(device)
        return {"mae": error.abs().mean().item(), "mse": error.square().mean().item()}

    def example(self):
        return {name: t[:1] for name, t in self._held_out().items()}

    def labels(self, example):
        _, cut = self._split()
        times = self.steps_of_time()
        return {"rows": times[cut : cut + self.horizon], "columns": times[cut - self.history : cut]}


@cache
def pacific() -> tuple[Tensor, list[str]]:
    """(526, 2): monthly sea surface temperature and CO2, and the months."""
    datasets = require("statsmodels.datasets", "compare")
    pandas = require("pandas", "compare")
    warmth = datasets.elnino.load_pandas().data.set_index("YEAR").stack()
    months = [pandas.Timestamp(f"{int(year)} {month}") for year, month in warmth.index]
    sea = pandas.Series(warmth.to_numpy(), index=pandas.DatetimeIndex(months))
    air = datasets.co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    both = pandas.concat([sea, air], axis=1, join="inner").dropna()
    return torch.tensor(both.to_numpy(), dtype=torch.float32), [f"{time:%Y-%m}" for time in both.index]


@task
class Forecast(SeriesForecast):
    """A year of sea surface temperature from four years of it and of CO2."""

    name = "forecast"

    def table(self):
        return pacific()[0]

    def steps_of_time(self):
        return pacific()[1]
