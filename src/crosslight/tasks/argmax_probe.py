"""The position of the largest of n random numbers, without positional embeddings: does attention know the order?

The model is blocks of noncausal self-attention over the numbers, a mean over the tokens and a linear head. Attention
that does not know the order gives the same answer for every order of the numbers, and stays at chance.
"""

from __future__ import annotations

from torch import Tensor, nn

from crosslight.tasks.argmax_position import ArgmaxPosition
from crosslight.tasks.base import Entrant, Size, task
from crosslight.tasks.trunk import Block, attention


class Unordered(nn.Module):
    """Numbers (batch, n, 1) -> logits (batch, out), with no positions added."""

    def __init__(self, entrant: Entrant, size: Size, out: int) -> None:
        super().__init__()
        self.embed = nn.Linear(1, size.dim)
        self.blocks = nn.ModuleList(Block(attention(entrant, size), size.dim) for _ in range(size.depth))
        self.norm, self.head = nn.LayerNorm(size.dim), nn.Linear(size.dim, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@task
class ArgmaxProbe(ArgmaxPosition):
    """Name the position of the largest of ``length`` numbers without positional embeddings; chance is 1 / length."""

    name = "argmax-probe"
    pattern = "noncausal-self"  # type: ignore[assignment]
    size = Size(dim=32, heads=4, depth=2)
    steps = 700

    def __init__(self, length: int = 8) -> None:
        super().__init__(length)

    def model(self, entrant, size):
        return Unordered(entrant, size, self.length)

    def _logits(self, model, batch):
        return model(batch["x"].unsqueeze(-1))

    def labels(self, example):
        numbers = [f"{v:.2f}" for v in example["x"][0].tolist()]
        return {"rows": numbers, "columns": numbers}
