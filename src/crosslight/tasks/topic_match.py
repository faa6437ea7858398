"""Retrieval from contexts that hold several topics: which of 50 candidates speaks of one of them?

Each of 64 topics has eight words of its own. A context is six sentences of four words, each on another topic; the right
candidate is a sentence on one of these topics, in words that contexts never use (a paraphrase, whose meaning has to be
learned). The other candidates are on topics that the context does not have. Training takes the other candidates of the
batch as negatives. "none" is a bi-encoder: the mean of the context's tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.tasks.base import Batch, Entrant, Size, Task, task
from crosslight.tasks.trunk import Block, Positions, SelfAttention

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WORDS, SENTENCE = 8, 4


class _Mean(nn.Module):
    """The bi-encoder without attention to the context."""

    def features(self, context: Tensor) -> tuple[Tensor, None]:
        return context.mean(1, keepdim=True), None

    def score(self, features: Tensor, candidates: Tensor, keep: None = None) -> Tensor:
        return (candidates @ features.transpose(1, 2)).squeeze(2)


class _Scorer(nn.Module):
    """Tokens of contexts and candidates -> scores, by two encoders and the entrant."""

    def __init__(self, entrant: Entrant, size: Size, topics: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(topics * WORDS, size.dim)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.positions = Positions(context, size.dim)
        self.encoders = nn.ModuleDict({name: self._encoder(size) for name in ("context", "candidate")})
        self.entrant = (
            _Mean()
            if entrant.id == "none"
            else registry.create(
                entrant.id, **{"streams": {"context": size.dim, "candidate": size.dim}, **entrant.options}
            )
        )

    @staticmethod
    def _encoder(size: Size) -> nn.Module:
        own = (SelfAttention(size.dim, size.heads, causal=False) for _ in range(size.depth))
        return nn.Sequential(*(Block(None, size.dim, o) for o in own), nn.LayerNorm(size.dim))

    def forward(
        self, context: Int[Tensor, "batch n"], candidates: Int[Tensor, "*batch candidates m"]
    ) -> Float[Tensor, "batch candidates"]:
        """Candidates (candidates, m) are scored for every context, (batch, candidates, m) for their own."""
        states = self.encoders["context"](self.positions(self.embed(context)))
        first = self.encoders["candidate"](self.positions(self.embed(candidates.flatten(0, -2))))[:, 0]
        features, keep = self.entrant.features(states)
        return self.entrant.score(features, first.view(*candidates.shape[:-1], -1), keep)


@task
class TopicMatch(Task):
    """Rank 50 candidates for a context of several topics, one of which the right candidate shares."""

    name = "topic-match"
    kind = "fusion"
    metric = "recall@1"
    size = Size(dim=16, heads=2, depth=1)
    steps = 600
    batch_size = 64
    lr = 1e-2

    def __init__(self, topics: int = 64, sentences: int = 6, candidates: int = 50) -> None:
        self.topics, self.sentences, self.candidates = topics, sentences, candidates

    def _sentences(self, topics: Tensor, first: int, generator: torch.Generator) -> Tensor:
        """Four random words of each topic, from its words ``first`` to ``first`` + 3: (..., 4)."""
        words = torch.randint(first, first + WORDS // 2, (*topics.shape, SENTENCE), generator=generator)
        return topics.unsqueeze(-1) * WORDS + words

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        order = torch.rand(count, self.topics, generator=generator).argsort(1)
        context = self._sentences(order[:, : self.sentences], 0, generator).flatten(1)
        # The first topic of the random order is the right one; its place in the context is random.
        shuffle = torch.rand(count, self.sentences, generator=generator).argsort(1)
        context = context.unflatten(1, (self.sentences, SENTENCE)).gather(
            1, shuffle.unsqueeze(-1).expand(-1, -1, SENTENCE)
        )
        right = self._sentences(order[:, :1], WORDS // 2, generator)
        others = self._sentences(order[:, self.sentences :], WORDS // 2, generator)
        return {"context": context.flatten(1), "candidates": torch.cat([right, others], 1)[:, : self.candidates]}

    def _pairs(self, count: int, generator: torch.Generator) -> Batch:
        batch = self._draw(count, generator)
        return {"context": batch["context"], "candidate": batch["candidates"][:, 0]}

    def batches(self, seed, batch_size):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._pairs(batch_size, generator)

    def model(self, entrant, size):
        return _Scorer(entrant, size, self.topics, self.sentences * SENTENCE)

    def loss(self, model, batch):
        scores = model(batch["context"], batch["candidate"])
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))

    def evaluate(self, model):
        device = next(model.parameters()).device
        batch = self._draw(500, torch.Generator().manual_seed(1_000_003))
        scores = model(batch["context"].to(device), batch["candidates"].to(device))
        rank = (scores > scores[:, :1]).sum(1)
        return {"recall@1": (rank == 0).float().mean().item(), "mrr": (1 / (1 + rank.float())).mean().item()}

    def example(self):
        return self._pairs(1, torch.Generator().manual_seed(1_000_003))
