"""A sink among the image tokens: a decoder is trained to answer what colour a shape has; at test time one empty cell
gets massive activations and draws a share of every text token's attention. An entrant of kind control may mend it."""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight import registry
from crosslight.hosts import Call, steer
from crosslight.tasks.base import Entrant, Size, Task, task
from crosslight.tasks.trunk import Trunk

CELLS = 16


class Captioner(nn.Module):
    """16 image cells (a shape and a colour, or empty), then the asked shape; the answer is read at the last token."""

    def __init__(self, entrant: Entrant, size: Size, shapes: int, colours: int) -> None:
        super().__init__()
        self.entrant = entrant
        self.shape, self.colour = nn.Embedding(shapes + 1, size.dim), nn.Embedding(colours + 1, size.dim)
        self.word = nn.Embedding(shapes, size.dim)
        self.trunk = Trunk(Entrant("softmax"), size, CELLS + 1, causal=True)
        self.head = nn.Linear(size.dim, colours)

    def forward(self, shapes: Tensor, colours: Tensor, asked: Tensor, sink: Tensor | None = None) -> Tensor:
        image = self.shape(shapes) + self.colour(colours)
        if sink is not None:  # massive activations in two fixed dimensions, as in large language models
            massive = torch.zeros_like(image)
            massive[torch.arange(len(sink)), sink, :2] = 100.0
            image = image + massive
        x = torch.cat([image, self.word(asked)[:, None]], 1)
        return self.head(self.trunk(x)[:, -1])


class Draw:
    """A rule: a sink takes a share of the attention of every token after the image."""

    def __init__(self, sink: Tensor, share: float) -> None:
        self.sink, self.share = sink, share

    def __call__(self, weights: Tensor, call: Call) -> Tensor:
        drawn = F.one_hot(self.sink, weights.shape[-1]).to(weights)[:, None, None]
        moved = (1 - self.share) * weights[:, :, CELLS:] + self.share * drawn
        return torch.cat([weights[:, :, :CELLS], moved], 2)


@task
class PlantedSink(Task):
    """Accuracy of answers about an image with a planted sink, with and without a rule."""

    name = "planted-sink"
    kind = "control"
    metric = "accuracy"
    size = Size(dim=48, heads=4, depth=2)
    steps = 600
    batch_size = 64
    lr = 2e-3

    def __init__(self, shapes: int = 12, colours: int = 32, objects: int = 10, share: float = 0.45) -> None:
        self.shapes, self.colours, self.objects, self.share = shapes, colours, objects, share

    def draw(self, count: int, g: torch.Generator) -> dict[str, Tensor]:
        shapes = torch.rand(count, self.shapes, generator=g).argsort(-1)[:, : self.objects]
        colours = torch.randint(self.colours, (count, self.objects), generator=g)
        cells = torch.rand(count, CELLS, generator=g).argsort(-1)
        asked = torch.randint(self.objects, (count, 1), generator=g)
        full = torch.full((count, CELLS), 0)
        return {
            "shapes": (full + self.shapes).scatter(1, cells[:, : self.objects], shapes),
            "colours": (full + self.colours).scatter(1, cells[:, : self.objects], colours),
            "asked": shapes.gather(1, asked).squeeze(1),
            "sink": cells[:, -1],
            "y": colours.gather(1, asked).squeeze(1),
        }

    def batches(self, seed, batch_size):
        g = torch.Generator().manual_seed(1 + seed)
        while True:
            yield self.draw(batch_size, g)

    def model(self, entrant: Entrant, size: Size) -> nn.Module:
        return Captioner(entrant, size, self.shapes, self.colours)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["shapes"], batch["colours"], batch["asked"]), batch["y"])

    def evaluate(self, model):
        device = next(model.parameters()).device
        test = {k: t.to(device) for k, t in self.draw(2000, torch.Generator().manual_seed(0)).items()}
        inputs = (test["shapes"], test["colours"], test["asked"])

        def accuracy(*more: Tensor) -> float:
            return (model(*inputs, *more).argmax(-1) == test["y"]).float().mean().item()

        clean = accuracy()
        with ExitStack() as stack:
            stack.enter_context(steer(model, Draw(test["sink"], self.share)))
            if model.entrant.id != "none":
                stack.enter_context(steer(model, registry.create(model.entrant.id, **model.entrant.options)))
            return {"accuracy": accuracy(test["sink"]), "clean": clean}

    def example(self):
        return self.draw(1, torch.Generator().manual_seed(0))
