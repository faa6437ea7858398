"""Bags of digits (multiple instance learning): does a bag hold a 3 or a 9? Few bags, few positive instances each.

The instances are the 8 x 8 digits that scikit-learn ships. Both 3 and 9 make a bag positive, so that a pooling which
settles on one of them misses the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight import registry
from crosslight.errors import require
from crosslight.objectives.aem import AttentionEntropyMaximization
from crosslight.tasks.base import Entrant, Size, Task, task
from crosslight.tasks.digits import load

POSITIVE = (3, 9)


class GatedPooling(nn.Module):
    """ABMIL (Ilse et al. 2018, arXiv 1802.04712): s_i = w^T (tanh(V h_i) * sigmoid(U h_i)), a = softmax(s),
    logits = W sum_i a_i h_i."""

    def __init__(self, width: int, dim: int, objective: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, dim), nn.ReLU())
        self.value, self.gate, self.score = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 1)
        self.head = nn.Linear(dim, 2)
        self.objective = objective

    def forward(self, bags: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, n, width) -> logits (batch, 2), attention (batch, n)."""
        h = self.embed(bags)
        a = self.score(self.value(h).tanh() * self.gate(h).sigmoid()).squeeze(-1).softmax(-1)
        return self.head((a.unsqueeze(1) @ h).squeeze(1)), a


def bags(x: Tensor, y: Tensor, count: int, size: int, positives: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bags (count, size, 64), whether each is positive (every second is), and which instances are (count, size)."""
    g = torch.Generator().manual_seed(seed)
    hit = torch.isin(y, torch.tensor(POSITIVE))
    plain, wanted = (~hit).nonzero().squeeze(1), hit.nonzero().squeeze(1)
    index = plain[torch.randint(len(plain), (count, size), generator=g)]
    label = torch.arange(count) % 2
    where = torch.zeros(count, size, dtype=torch.bool)
    where[label == 1, :positives] = True
    index[where] = wanted[torch.randint(len(wanted), (int(where.sum()),), generator=g)]
    return x[index], label, where


@task
class DigitBags(Task):
    """Classify bags of 40 digits of which two, in positive bags, are a 3 or a 9; 60 bags to train on."""

    name = "digit-bags"
    kind = "training"
    metric = "auc"
    size = Size(dim=32, heads=1, depth=1)
    steps = 800  # until the bags are fitted: the term guards against what comes with that
    batch_size = 20
    lr = 2e-3

    def __init__(self, count: int = 60, instances: int = 40, positives: int = 2) -> None:
        self.count, self.instances, self.positives = count, instances, positives

    def batches(self, seed, batch_size):
        x, y = load()
        x, label, _ = bags(x[360:], y[360:], self.count, self.instances, self.positives, 1 + seed)
        g = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(self.count, generator=g).split(batch_size):
                yield {"x": x[index], "y": label[index]}

    def model(self, entrant: Entrant, size: Size) -> nn.Module:
        plain = AttentionEntropyMaximization(weight=0)
        objective = plain if entrant.id == "none" else registry.create(entrant.id, **entrant.options)
        return GatedPooling(64, size.dim, objective)

    def loss(self, model, batch):
        logits, attention = model(batch["x"])
        return model.objective(logits, batch["y"], attention)

    def evaluate(self, model):
        x, y = load()
        x, label, where = bags(x[:360], y[:360], 400, self.instances, self.positives, 0)
        device = next(model.parameters()).device
        logits, attention = (t.cpu() for t in model(x.to(device)))
        score = logits.softmax(-1)[:, 1]
        top = torch.zeros_like(where).scatter(1, attention.topk(self.positives, -1).indices, True)
        return {
            "auc": float(require("sklearn.metrics", "compare").roc_auc_score(label, score)),
            "instance_recall": (top & where)[label == 1].float().sum(-1).div(self.positives).mean().item(),
            "loss": F.cross_entropy(logits, label).item(),
        }

    def example(self):
        x, y = load()
        x, label, _ = bags(x[:360], y[:360], 2, self.instances, self.positives, 0)
        return {"x": x[1:], "y": label[1:]}
