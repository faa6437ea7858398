"""Copying sequences longer than any of the training.

The encoder and the decoder are recurrent and no positions are added, as a learned position says nothing where it was
never trained; what stands between them is the entrant alone. Attention by content finds its place by what was written
last and loses it where that occurs twice; attention by location goes on from where it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crosslight.errors import expect
from crosslight.tasks.base import Entrant, Size, task
from crosslight.tasks.copy import Copy
from crosslight.tasks.trunk import attention, mlp


class Recurrent(nn.Module):
    """Source (batch, m), target (batch, n) -> logits (batch, n, vocab): GRU encoder and decoder, between them the
    entrant."""

    def __init__(self, entrant: Entrant, size: Size, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, size.dim)
        self.encoder, self.decoder = (nn.GRU(size.dim, size.dim, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(size.dim) for _ in range(3))
        self.entrant = attention(entrant, size)
        self.mlp = mlp(size.dim)
        self.head = nn.Linear(size.dim, vocab)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        letters = self.embed(source)
        context = self.norms[0](letters + self.encoder(letters)[0])
        x = self.decoder(self.embed(target))[0]
        x = x + self.entrant(self.norms[1](x), context, causal=True)
        return self.head(x + self.mlp(self.norms[2](x)))


@task
class CopyLonger(Copy):
    """Copy up to ``length`` random symbols in training (at least half as many, the same in a batch) and ``test_length``
    after it; accuracy over the symbols of the longer ones, chance is 1 / ``symbols``."""

    name = "copy-longer"
    size = Size(dim=32, heads=4, depth=1)
    steps = 600

    def __init__(self, length: int = 10, test_length: int = 40, symbols: int = 16) -> None:
        super().__init__(length, symbols)
        expect(test_length >= length, "test_length", test_length, f"at least length = {length}")
        self.test_length = test_length

    def batches(self, seed, batch_size):
        draw = torch.Generator().manual_seed(seed)
        for batch in super().batches(seed, batch_size):
            short = torch.randint(self.length // 2, self.length + 1, (), generator=draw)
            yield {"source": batch["source"][:, :short]}

    def _held_out(self):
        draw = torch.Generator().manual_seed(2**32 - 1)
        return {"source": torch.randint(1, self.symbols + 1, (128, self.test_length), generator=draw)}

    def model(self, entrant, size):
        return Recurrent(entrant, size, self.symbols + 1)

    def evaluate(self, model):
        long = self._held_out()["source"].to(next(model.parameters()).device)
        scores = {}
        for name, source in (("accuracy", long), ("accuracy_trained", long[:, : self.length])):
            right = self._logits(model, {"source": source}).argmax(-1) == source
            scores[name] = right.float().mean().item()
        return scores
