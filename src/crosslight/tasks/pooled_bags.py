"""Bags of digits, pooled by the entrant: does a bag hold a 3 or a 9? The data are those of the task digit-bags.

There the objective is what is compared, here the pooling. A row whose paper is a whole bag classifier, with a loss of
its own on what it pools, enters as that network; any other layer reads the instances by one learned query, under the
cross-entropy of the bag.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight import registry
from crosslight.errors import require
from crosslight.tasks.base import Entrant, Size, task
from crosslight.tasks.digit_bags import DigitBags, bags
from crosslight.tasks.digits import load
from crosslight.tasks.trunk import attention


class Pooling(nn.Module):
    """Bags (batch, n, width) -> logits (batch, 2): instances embedded, read by one query, a linear head."""

    def __init__(self, width: int, entrant: Entrant, size: Size) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, size.dim), nn.ReLU())
        self.query = nn.Parameter(torch.randn(1, 1, size.dim))
        self.entrant = attention(entrant, size)
        self.head = nn.Linear(size.dim, 2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.head(self.entrant(self.query.expand(len(x), -1, -1), self.embed(x)).mean(1)),)

    def loss(self, output: tuple[Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target)


@task
class PooledBags(DigitBags):
    """Pool bags of 40 digits of which two, in positive bags, are a 3 or a 9; 60 bags to train on."""

    name = "pooled-bags"
    kind = "token"  # type: ignore[assignment]
    pattern = "noncausal-cross"
    metric = "auc"

    def model(self, entrant, size):
        network = None if entrant.id == "none" else getattr(registry.factory(entrant.id)[0], "network", None)
        if hasattr(network, "loss"):
            options: dict[str, Any] = {"features": 64, "dim": size.dim, **entrant.options}
            return registry.create(entrant.id, preset="tiny", **options)
        return Pooling(64, entrant, size)

    def loss(self, model, batch):
        return model.loss(model(batch["x"]), batch["y"])

    def evaluate(self, model):
        x, y = load()
        x, label, _ = bags(x[:360], y[:360], 400, self.instances, self.positives, 0)
        logits = model(x.to(next(model.parameters()).device))[0].cpu()
        score = logits.softmax(-1)[:, 1]
        return {
            "auc": float(require("sklearn.metrics", "compare").roc_auc_score(label, score)),
            "loss": F.cross_entropy(logits, label).item(),
        }
