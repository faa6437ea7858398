"""Tasks and entrants whose trials take milliseconds and can be made to fail, for the tests of this folder."""

import os

import torch

from crosslight import registry
from crosslight.attention.base import Core
from crosslight.cards import Card
from crosslight.engines import dense
from crosslight.tasks import Entrant, Size, Task, task
from crosslight.tasks.trunk import Trunk


@task
class Toy(Task):
    """Give back the mean of the tokens."""

    name = "toy"
    pattern = "noncausal-self"
    metric = "error"
    higher_is_better = False
    size = Size(dim=8, heads=2, depth=1)
    steps = 3
    batch_size = 4

    def __init__(self, length: int = 6, poison: bool = False) -> None:
        self.length, self.poison = length, poison

    def batches(self, seed, batch_size):
        draw = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(batch_size, self.length, 8, generator=draw)
            yield {"x": x * float("nan") if self.poison else x}

    def model(self, entrant, size):
        return Trunk(entrant, size, self.length)

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["x"].mean(1, keepdim=True)).square().mean()

    def evaluate(self, model):
        return {"error": self.loss(model, self.example()).item()}

    def example(self):
        return {"x": torch.linspace(-1, 1, self.length * 8).view(1, self.length, 8)}


def card(id: str) -> Card:
    return Card(
        id=id, kind="token", group="toys", title="", year=2026, paper="", summary="", patterns=("noncausal-self",)
    )


@registry.register(card("toy-trouble"))
class Trouble(Core):
    """Softmax attention that fails as it is told."""

    def __init__(self, heads: int, head_dim: int, *, how: str = "") -> None:
        super().__init__(heads, head_dim)
        self.how = how

    def forward(self, q, k, v, *, mask=None, causal=False):
        if self.how == "raises":
            raise RuntimeError("no luck\nsecond line")
        if self.how == "dies":
            os._exit(3)
        y = dense.attend(q, k, v, mask=mask, causal=causal)
        return y * float("nan") if self.how == "diverges" and self.training else y

    def weights(self, q, k, *, mask=None, causal=False):
        return dense.weights(q, k, mask=mask, causal=causal)


def entrant(how: str = "") -> Entrant:
    return Entrant("toy-trouble", {"how": how} if how else {})
