"""Which heads can go? A transformer is trained to look up a value by its key; then half of its heads are removed, in
the order of an entrant of kind explain, or at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight import registry
from crosslight.explain.sixteen_heads import HeadGates, keep_most_important
from crosslight.hosts import sites, steer
from crosslight.tasks.base import Entrant, Size, Task, task
from crosslight.tasks.trunk import Trunk


class Lookup(nn.Module):
    """Tokens are (key, value) pairs; the last has a key alone, and its value is the answer."""

    def __init__(self, entrant: Entrant, size: Size, vocab: int, length: int) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(vocab, size.dim), nn.Embedding(vocab + 1, size.dim)
        self.trunk = Trunk(Entrant("softmax"), size, length)
        self.head = nn.Linear(size.dim, vocab)
        self.entrant = entrant

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        return self.head(self.trunk(self.key(keys) + self.value(values))[:, -1])


@task
class PruneHeads(Task):
    """Accuracy with half of the heads of a trained two-layer transformer removed."""

    name = "prune-heads"
    kind = "explain"
    metric = "accuracy"
    size = Size(dim=64, heads=8, depth=2)
    steps = 400
    batch_size = 64
    lr = 2e-3

    def __init__(self, vocab: int = 24, pairs: int = 8, share: float = 0.5) -> None:
        self.vocab, self.pairs, self.share = vocab, pairs, share

    def draw(self, count: int, g: torch.Generator) -> dict[str, Tensor]:
        keys = torch.rand(count, self.vocab, generator=g).argsort(-1)[:, : self.pairs]
        values = torch.randint(self.vocab, (count, self.pairs), generator=g)
        asked = torch.randint(self.pairs, (count, 1), generator=g)
        none = torch.full((count, 1), self.vocab)
        return {
            "keys": torch.cat([keys, keys.gather(1, asked)], 1),
            "values": torch.cat([values, none], 1),
            "y": values.gather(1, asked).squeeze(1),
        }

    def batches(self, seed, batch_size):
        g = torch.Generator().manual_seed(1 + seed)
        while True:
            yield self.draw(batch_size, g)

    def model(self, entrant: Entrant, size: Size) -> nn.Module:
        return Lookup(entrant, size, self.vocab, self.pairs + 1)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["keys"], batch["values"]), batch["y"])

    def evaluate(self, model):
        device = next(model.parameters()).device
        test = {k: t.to(device) for k, t in self.draw(1000, torch.Generator().manual_seed(0)).items()}

        def accuracy() -> float:
            return (model(test["keys"], test["values"]).argmax(-1) == test["y"]).float().mean().item()

        whole = accuracy()
        if model.entrant.id == "none":
            orders = [self.at_random(model, seed) for seed in range(5)]
        else:
            seen = {k: t.to(device) for k, t in self.draw(256, torch.Generator().manual_seed(2)).items()}
            reading = registry.create(model.entrant.id, **model.entrant.options)(model, [seen], self.loss)
            orders = [keep_most_important(reading, self.share)]
        pruned = []
        for gates in orders:
            with steer(model, HeadGates(gates)):
                pruned.append(accuracy())
        return {"accuracy": sum(pruned) / len(pruned), "whole": whole}

    def at_random(self, model: nn.Module, seed: int) -> dict[str, Tensor]:
        """Gates that keep the share of all heads, chosen at random."""
        found = sites(model)
        total = sum(site.heads for site in found)
        gates = torch.zeros(total)
        gates[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: round(self.share * total)]] = 1
        split = gates.split([site.heads for site in found])
        return {site.name: gate for site, gate in zip(found, split, strict=True)}

    def example(self):
        return self.draw(1, torch.Generator().manual_seed(0))
