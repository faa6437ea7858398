"""A byte language model whose layers are made together, for what layers share: projections, or keys and values.

A row whose layers share something has a `stack` (see `crosslight.attention.base`), which makes all layers of the model;
of any other row each layer is made alone, as in the other tasks. Everything else is the language task.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crosslight import registry
from crosslight.tasks.base import Entrant, Size, task
from crosslight.tasks.language import Language
from crosslight.tasks.trunk import LanguageModel, attention


def stacked(entrant: Entrant, size: Size) -> nn.ModuleList:
    """The layers of the entrant, first to last."""
    make, defaults = (None, {}) if entrant.id == "none" else registry.factory(entrant.id)
    stack: Any = getattr(make, "stack", None)
    if stack is None:
        return nn.ModuleList(attention(entrant, size) for _ in range(size.depth))
    return stack(size.depth, **{"dim": size.dim, "heads": size.heads, **defaults, **entrant.options})


class StackModel(LanguageModel):
    """A language model around layers that were made together; what a layer shares is handed on to those after it."""

    def __init__(self, entrant: Entrant, size: Size, vocab: int, length: int) -> None:
        super().__init__(Entrant("none"), size, vocab, length)
        for block, layer in zip(self.trunk.blocks, stacked(entrant, size), strict=True):
            block.entrant = layer

    def hidden(self, tokens: Tensor) -> Tensor:
        x, shared = self.trunk.positions(self.embed(tokens)), None
        block: Any
        for block in self.trunk.blocks:
            if getattr(block.entrant, "leads", False):
                shared = block.entrant.share(block.entrant_norm(x))
            x = block(x, shared, causal=True)
        return self.trunk.norm(x)


@task
class LanguageStack(Language):
    """A byte language model of six layers, made together where the entrant shares something between them."""

    name = "language-stack"
    size = Size(dim=64, heads=4, depth=6)
    steps = 200
    batch_size = 8

    def model(self, entrant, size):
        return StackModel(entrant, size, 256, self.length)
