"""A series driven by two others a day earlier: y_t = tanh(a_{t-24}) + 0.5 b_{t-24} + a daily wave + noise.

a and b are first-order autoregressions that cannot be foreseen, but the next 24 steps of y depend on what they have
already done. A forecaster that sees y alone can learn the wave and no more. The error is in units of y's variance.
"none" is one linear map from the past of y to its future.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.tasks.base import Batch, Entrant, Size, Task, task

if TYPE_CHECKING:
    from jaxtyping import Float

DAY = 24


class _Linear(nn.Module):
    def __init__(self, past: int, horizon: int) -> None:
        super().__init__()
        self.map = nn.Linear(past, horizon)

    def forward(self, series: Tensor, exogenous: Tensor | None = None) -> Tensor:
        last = series[:, -1:]
        return self.map((series - last).squeeze(2)).unsqueeze(2) + last


class _Forecaster(nn.Module):
    """The entrant, which is shown the exogenous series if it was built for some."""

    def __init__(self, entrant: Entrant, size: Size, past: int) -> None:
        super().__init__()
        options = {
            "seq_len": past,
            "horizon": DAY,
            "patch_len": DAY // 2,
            "exogenous_len": past,
            "dim": size.dim,
            "heads": size.heads,
            "depth": size.depth,
            "hidden": 2 * size.dim,
            "dropout": 0.0,
            **entrant.options,
        }
        self.reads = options["exogenous_len"] is not None
        self.entrant = _Linear(past, DAY) if entrant.id == "none" else registry.create(entrant.id, **options)

    def forward(
        self, series: Float[Tensor, "batch past 1"], exogenous: Float[Tensor, "batch past 2"]
    ) -> Float[Tensor, "batch horizon 1"]:
        return self.entrant(series, exogenous if self.reads else None)


@task
class DrivenSeries(Task):
    """Forecast a day of an electricity-price-like series that follows two other series."""

    name = "driven-series"
    kind = "model"
    metric = "mse"
    higher_is_better = False
    size = Size(dim=32, heads=4, depth=2)
    steps = 600
    batch_size = 32
    lr = 2e-3

    def __init__(self, past: int = 48) -> None:
        self.past = past

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        length = self.past + DAY
        shocks = torch.randn(count, length + DAY, 2, generator=generator)
        drivers, rho = [shocks[:, 0]], 0.9
        for t in range(1, length + DAY):
            drivers.append(rho * drivers[-1] + math.sqrt(1 - rho**2) * shocks[:, t])
        exogenous = torch.stack(drivers, 1)
        phase = torch.rand(count, 1, generator=generator) * DAY
        wave = torch.sin(2 * math.pi * (torch.arange(length) + phase) / DAY)
        y = torch.tanh(exogenous[:, :length, 0]) + 0.5 * exogenous[:, :length, 1] + 0.5 * wave
        y = (y + 0.1 * torch.randn(count, length, generator=generator)).unsqueeze(2)
        # Step t of y follows step t of the drivers' earlier record; the model sees their latest one.
        return {"series": y[:, : self.past], "exogenous": exogenous[:, DAY:length], "y": y[:, self.past :]}

    def batches(self, seed, batch_size):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._draw(batch_size, generator)

    def model(self, entrant, size):
        return _Forecaster(entrant, size, self.past)

    def loss(self, model, batch):
        return F.mse_loss(model(batch["series"], batch["exogenous"]), batch["y"])

    def evaluate(self, model):
        device = next(model.parameters()).device
        batch = {name: t.to(device) for name, t in self._draw(500, torch.Generator().manual_seed(1_000_003)).items()}
        error = F.mse_loss(model(batch["series"], batch["exogenous"]), batch["y"])
        return {"mse": (error / batch["y"].var()).item()}

    def example(self):
        return self._draw(1, torch.Generator().manual_seed(1_000_003))
