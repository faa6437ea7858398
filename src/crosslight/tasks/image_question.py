"""A question about an image, in one stream: [image tokens ; question], and the answer at the last token.

The image is a row of handwritten digits, all different, and each is one token: an MLP of its 8 x 8 pixels stands for
the vision encoder and its connector. A question reads ("what stands at place 2?"), finds ("where is the 7?") or relates
("what stands left of the 7?"). The digits are those that scikit-learn ships, a fifth held out; images are drawn anew
for each batch.

The stream is a decoder's. Attention that has a causal form is asked for it, so that the image is read before the
question is known; a row without one brings the mask of image and text that it is about. Such rows are told by their
own option ``images`` that the first ``digits`` tokens are the image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.errors import expect
from crosslight.tasks.base import Entrant, Size, Task, task
from crosslight.tasks.digits import load
from crosslight.tasks.trunk import Trunk, mlp

#: The words are the ten digits, which also number the places, and these.
KINDS = ("at", "where is", "left of", "right of")
WORDS = 10 + len(KINDS)


class Decoder(nn.Module):
    """Image (batch, m, 64) and question (batch, 2) in one stream; logits of the answer at its last token."""

    def __init__(self, entrant: Entrant, size: Size, images: int) -> None:
        super().__init__()
        causal = entrant.id == "none" or "causal-self" in registry.card(entrant.id).patterns
        # Normalised, so that pictures are as large as words and positions.
        self.see = nn.Sequential(nn.Linear(64, size.dim), nn.GELU(), mlp(size.dim), nn.LayerNorm(size.dim))
        self.word = nn.Embedding(WORDS, size.dim)
        self.trunk = Trunk(entrant, size, images + 2, causal=causal)
        self.head = nn.Linear(size.dim, 10)

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        return self.head(self.trunk(torch.cat([self.see(image), self.word(question)], 1))[:, -1])


@task
class ImageQuestion(Task):
    """Which digit stands at a place, where is a digit, which one is next to it? Each comes as often as the others.

    Args:
        digits: how many stand in a row.
        prior: the share of training examples in which the question alone gives the answer away: it is the number in
            the question plus one. In held-out examples it never is, so that who learned the language instead of
            looking is found out.
    """

    name = "image-question"
    pattern = "noncausal-self"
    metric = "accuracy"
    size = Size(dim=48, heads=4, depth=2)
    steps = 800
    batch_size = 64
    lr = 3e-3
    test = 360

    def __init__(self, digits: int = 4, prior: float = 0.0) -> None:
        expect(isinstance(digits, int) and 2 <= digits <= 9, "digits", digits, "2 to 9")
        expect(0 <= prior <= 1, "prior", prior, "a share from 0 to 1")
        self.digits, self.prior = digits, prior

    def _draw(self, count: int, held_out: bool, draw: torch.Generator) -> dict[str, Tensor]:
        row = torch.rand(count, 10, generator=draw).argsort(1)[:, : self.digits]  # the digit at each place
        kind, number, answer, weight = self._questions(row)
        likely = answer == (number + 1) % 10
        given = torch.rand(count, 1, generator=draw) < (0.0 if held_out else self.prior)
        # Where no question about the row has the likely answer, another is asked.
        possible = likely == (given & likely.any(1, keepdim=True))
        asked = (possible * weight).multinomial(1, generator=draw)
        return {
            "image": self._pictures(row, held_out, draw),
            "question": torch.cat([10 + kind[asked], number.gather(1, asked)], 1),
            "y": answer.gather(1, asked).squeeze(1),
        }

    def _questions(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that can be asked about rows (count, digits): kind (questions,), number and answer (count, questions),
        and weight (questions,), by which reading, finding and relating come equally often."""
        place = torch.arange(self.digits)
        places, first, last = place.expand_as(row), row[:, :-1], row[:, 1:]
        kind = torch.cat([0 * place, 0 * place + 1, 0 * place[1:] + 2, 0 * place[1:] + 3])
        number = torch.cat([places, row, last, first], 1)
        answer = torch.cat([row, places, first, last], 1)
        return kind, number, answer, 1 / kind.clamp(max=2).bincount()[kind.clamp(max=2)]

    def _pictures(self, row: Tensor, held_out: bool, draw: torch.Generator) -> Tensor:
        """A picture of each digit, by chance: (count, digits, 64)."""
        x, y = (t[: self.test] if held_out else t[self.test :] for t in load())
        order, many = y.argsort(stable=True), y.bincount()
        chosen = (torch.rand(row.shape, generator=draw) * many[row]).long()
        return x[order[(many.cumsum(0) - many)[row] + chosen]]

    def batches(self, seed, batch_size):
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield self._draw(batch_size, False, draw)

    def _held_out(self, count: int) -> dict[str, Tensor]:
        return self._draw(count, True, torch.Generator().manual_seed(2**32 - 1))

    def model(self, entrant, size):
        return Decoder(entrant, size, self.digits)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["image"], batch["question"]), batch["y"])

    def evaluate(self, model):
        device = next(model.parameters()).device
        batch = {name: t.to(device) for name, t in self._held_out(1000).items()}
        logits = model(batch["image"], batch["question"])
        return {
            "accuracy": (logits.argmax(-1) == batch["y"]).float().mean().item(),
            "loss": F.cross_entropy(logits, batch["y"]).item(),
        }

    def example(self):
        return self._held_out(1)

    def labels(self, example):
        kind, number = example["question"][0].tolist()
        tokens = [*(f"place {i}" for i in range(self.digits)), KINDS[kind - 10], str(number)]
        return {"rows": tokens, "columns": tokens}
