"""A decoder that needs two sources: each target digit takes its high part from one sequence, its parity from another.

The first source is a sequence of symbols 0 to 4, the second a sequence of bits in reverse order. Target digit i is
2 * symbol_i + bit_i, so whoever reads one source alone is right half of the time at best. "none" is the decoder with
ordinary cross-attention to the first source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.tasks.base import Batch, Entrant, Size, Task, task
from crosslight.tasks.trunk import Positions, SelfAttention, mlp

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SYMBOLS, BITS, DIGITS = 5, 2, 10
START = DIGITS


class _OneSource(nn.Module):
    """The sub-layer without the contribution: cross-attention to the first source."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attend = registry.create("softmax", dim=dim, heads=heads)

    def forward(self, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        q = streams["decoder"]
        return {"decoder": q + self.attend(self.norm(q), streams["first"])}


class _Layer(nn.Module):
    def __init__(self, entrant: Entrant, size: Size) -> None:
        super().__init__()
        streams = {"decoder": size.dim, "first": size.dim, "second": size.dim}
        self.entrant = (
            _OneSource(size.dim, size.heads)
            if entrant.id == "none"
            else registry.create(entrant.id, **{"streams": streams, "heads": size.heads, **entrant.options})
        )
        self.own = SelfAttention(size.dim, size.heads, causal=True)
        self.norms = nn.ModuleList(nn.LayerNorm(size.dim) for _ in range(2))
        self.mlp = mlp(size.dim)

    def forward(self, x: Tensor, sources: dict[str, Tensor]) -> Tensor:
        x = x + self.own(self.norms[0](x))
        x = self.entrant({"decoder": x, **sources})["decoder"]
        return x + self.mlp(self.norms[1](x))


class _Decoder(nn.Module):
    """Two embedded sources and the digits so far -> logits of the next digit, at each position."""

    def __init__(self, entrant: Entrant, size: Size, length: int) -> None:
        super().__init__()

        def embed(vocab: int) -> nn.Sequential:
            return nn.Sequential(nn.Embedding(vocab, size.dim), Positions(length, size.dim), nn.LayerNorm(size.dim))

        self.sources = nn.ModuleDict({"first": embed(SYMBOLS), "second": embed(BITS)})
        self.target = embed(DIGITS + 1)
        self.layers = nn.ModuleList(_Layer(entrant, size) for _ in range(size.depth))
        self.head = nn.Sequential(nn.LayerNorm(size.dim), nn.Linear(size.dim, DIGITS))

    def forward(
        self, first: Int[Tensor, "batch n"], second: Int[Tensor, "batch n"], target: Int[Tensor, "batch n"]
    ) -> Float[Tensor, "batch n digits"]:
        sources = {"first": self.sources["first"](first), "second": self.sources["second"](second)}
        x = self.target(F.pad(target[:, :-1], (1, 0), value=START))
        for layer in self.layers:
            x = layer(x, sources)
        return self.head(x)


@task
class TwoSources(Task):
    """Translate a sequence of digits whose parity comes from a second source sequence."""

    name = "two-sources"
    kind = "fusion"
    metric = "accuracy"
    size = Size(dim=32, heads=4, depth=1)
    steps = 400
    batch_size = 64
    lr = 3e-3

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        first = torch.randint(SYMBOLS, (count, self.length), generator=generator)
        bits = torch.randint(BITS, (count, self.length), generator=generator)
        return {"first": first, "second": bits.flip(1), "y": 2 * first + bits}

    def batches(self, seed, batch_size):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._draw(batch_size, generator)

    def model(self, entrant, size):
        return _Decoder(entrant, size, self.length)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["first"], batch["second"], batch["y"]).flatten(0, 1), batch["y"].flatten())

    def evaluate(self, model):
        """ "wrong source": the accuracy when the second source belongs to another example."""
        device = next(model.parameters()).device
        batch = {name: t.to(device) for name, t in self._draw(500, torch.Generator().manual_seed(1_000_003)).items()}
        right = model(batch["first"], batch["second"], batch["y"]).argmax(-1) == batch["y"]
        wrong = model(batch["first"], batch["second"].roll(1, 0), batch["y"]).argmax(-1) == batch["y"]
        return {"accuracy": right.float().mean().item(), "wrong source": wrong.float().mean().item()}

    def example(self):
        return self._draw(1, torch.Generator().manual_seed(1_000_003))
