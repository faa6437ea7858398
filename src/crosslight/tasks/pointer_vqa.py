"""Which objects did the answer come from? A two-stream network answers "what colour is the SHAPE?" about an image of
objects; then image tokens are hidden in the order of an explanation, and accuracy should fall."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight import registry
from crosslight.hosts import watch
from crosslight.tasks.base import Entrant, Size, Task, task


class CoLayer(nn.Module):
    """Self-attention of both streams, then cross-attention in both directions."""

    def __init__(self, size: Size) -> None:
        super().__init__()

        def attention() -> nn.Module:
            return registry.create("softmax", dim=size.dim, heads=size.heads)

        self.t, self.i, self.ti, self.it = (attention() for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(size.dim) for _ in range(6))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(size.dim, 2 * size.dim), nn.GELU(), nn.Linear(2 * size.dim, size.dim))
            for _ in range(2)
        )

    def forward(self, t: Tensor, i: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        n = self.norms
        t, i = t + self.t(n[0](t)), i + self.i(n[1](i), mask=keep)
        a, b = n[2](t), n[3](i)
        t, i = t + self.ti(a, b, mask=keep), i + self.it(b, a)
        return t + self.mlps[0](n[4](t)), i + self.mlps[1](n[5](i))


class CoNet(nn.Module):
    def __init__(self, entrant: Entrant, size: Size, shapes: int, colours: int) -> None:
        super().__init__()
        self.entrant = entrant
        self.word = nn.Embedding(shapes + 2, size.dim)
        self.shape, self.colour = nn.Embedding(shapes, size.dim), nn.Embedding(colours, size.dim)
        self.layers = nn.ModuleList(CoLayer(size) for _ in range(size.depth))
        self.head = nn.Linear(size.dim, colours)

    def forward(self, words: Tensor, shapes: Tensor, colours: Tensor, keep: Tensor | None = None) -> Tensor:
        t, i = self.word(words), self.shape(shapes) + self.colour(colours)
        for layer in self.layers:
            t, i = layer(t, i, keep)
        return self.head(t[:, 0])


@task
class PointerVqa(Task):
    """Mean fall of accuracy when the 1, 2, 3 image tokens of highest score are hidden. The explanation is the entrant;
    without one it is the attention of the answer token in the last layer."""

    name = "pointer-vqa"
    kind = "explain"
    metric = "drop"
    size = Size(dim=48, heads=4, depth=2)
    steps = 600
    batch_size = 64
    lr = 2e-3

    def __init__(self, shapes: int = 12, colours: int = 8, objects: int = 9) -> None:
        self.shapes, self.colours, self.objects = shapes, colours, objects

    def draw(self, count: int, g: torch.Generator) -> dict[str, Tensor]:
        shapes = torch.rand(count, self.shapes, generator=g).argsort(-1)[:, : self.objects]
        colours = torch.randint(self.colours, (count, self.objects), generator=g)
        asked = torch.randint(self.objects, (count, 1), generator=g)
        answer, filler = torch.full((count, 1), self.shapes), torch.full((count, 1), self.shapes + 1)
        return {
            "words": torch.cat([answer, filler, shapes.gather(1, asked), filler], 1),
            "shapes": shapes,
            "colours": colours,
            "y": colours.gather(1, asked).squeeze(1),
        }

    def batches(self, seed, batch_size):
        g = torch.Generator().manual_seed(1 + seed)
        while True:
            yield self.draw(batch_size, g)

    def model(self, entrant: Entrant, size: Size) -> nn.Module:
        return CoNet(entrant, size, self.shapes, self.colours)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["words"], batch["shapes"], batch["colours"]), batch["y"])

    def scores(self, model: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        """(batch, objects): how much each image token is said to have mattered for the answer."""
        entrant: Entrant = model.entrant  # type: ignore[assignment]
        if entrant.id == "none":
            with watch(model, where="*.ti") as seen:
                model(*inputs)
            return list(seen)[-1][1].mean(1)[:, 0]
        names = {"t": ("text", "text"), "i": ("image", "image"), "ti": ("text", "image"), "it": ("image", "text")}
        explain = registry.create(
            entrant.id,
            stream="text",
            streams=lambda site, *_: names[site.name.rpartition(".")[2]],
            **entrant.options,
        )
        reading = explain(model, inputs, lambda out: out.gather(1, answer[:, None]).squeeze(1))
        return reading.scores["image"]

    def evaluate(self, model):
        device = next(model.parameters()).device
        test = {k: t.to(device) for k, t in self.draw(1000, torch.Generator().manual_seed(0)).items()}
        inputs = (test["words"], test["shapes"], test["colours"])
        right = model(*inputs).argmax(-1)
        order = self.scores(model, inputs, right).argsort(-1, descending=True)
        whole = (right == test["y"]).float().mean().item()
        left = []
        for hidden in (1, 2, 3):
            keep = torch.ones_like(test["shapes"], dtype=torch.bool).scatter(1, order[:, :hidden], False)
            left.append((model(*inputs, keep).argmax(-1) == test["y"]).float().mean().item())
        return {"drop": whole - sum(left) / len(left), "whole": whole}

    def example(self):
        return self.draw(1, torch.Generator().manual_seed(0))
