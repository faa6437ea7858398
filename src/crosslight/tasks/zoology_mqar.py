"""Multi-query associative recall (MQAR): many keys of one sequence are asked again, each for the value it came with.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023, arXiv 2312.04927.

A sequence of N tokens over a vocabulary of V begins with D pairs key, value: keys from [1, V/2) without repetition,
values from [V/2, V). In the N - 2D positions after them every key comes once more, at an even one. How far from the
pairs follows a power law: slot g (of (N - 2D) / 2) is drawn with p(g) ~ (g + 1)^(a - 1), without repetition. The label
at such a position is the key's value; all others are -100 and count nowhere. The other slots hold random tokens, or 0.

    inputs    k1 v1 k2 v2   x  x  k2  x  x  x  k1  x        N = 12, D = 2
    labels     .  .  .  .   .  . v2   .  .  . v1   .

Attention solves MQAR at a width that does not depend on N; a gated convolution needs one that grows with it. The
companion entrant "base-conv" is that convolution at its simplest:

    y = (u W + b1) * (h conv u + b2)        h causal, one filter of ``kernel`` taps a channel

For a seed, `generate` draws keys, values and slots in the order of the authors' generator and so gives the same arrays;
the random tokens between them come from the same seed here, and from torch's global state there.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.cards import Card, Evidence
from crosslight.errors import expect, require
from crosslight.tasks import data
from crosslight.tasks.base import Entrant, Size, Task, task
from crosslight.tasks.trunk import LanguageModel

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IGNORE = -100

CARD = Card(
    id="zoology-mqar",
    kind="bench",
    group="bench",
    title="Zoology: Measuring and Improving Recall in Efficient Language Models",
    year=2023,
    paper="2312.04927",
    code="HazyResearch/zoology",
    summary="Multi-query associative recall: keys asked again later in a sequence, each for the value it came with.",
    patterns=("causal-self",),
    why_not="The task is next-token prediction.",
    mask="none",
    checked="the authors' generator: the same keys, values, slots and labels for the same seed",
    differs=(
        "As a task it is smaller than in the paper (vocabulary 64 instead of 8192, N = 32, D = 4), so that two cores "
        "solve it in a minute. The companion convolution has short filters and no second projection."
    ),
    evidence=Evidence(
        claim="Two layers of attention recall what gated convolutions of the same width and depth do not",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.5,
        entrant="softmax",
        baseline="base-conv",
    ),
)


def generate(
    count: int,
    length: int,
    *,
    vocab: int = 8192,
    pairs: int = 8,
    power: float = 0.01,
    fill: bool = True,
    seed: int = 0,
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"]]:
    """Sequences and labels.

    Args:
        count, length: how many sequences of how many tokens (N).
        vocab: V; keys are below V/2, values from there on.
        pairs: D.
        power: a of the power law of distances; 1 is uniform.
        fill: random tokens between the queries, or zeros.
    """
    np = require("numpy", "compare")
    expect(length % 2 == 0, "length", length, "an even number of tokens")
    expect(pairs >= 1 and 4 * pairs <= length, "pairs", pairs, f"1 to length / 4 = {length // 4}")
    expect(vocab > max(length, 2 * pairs + 2), "vocab", vocab, f"more than {max(length, 2 * pairs + 2)} tokens")
    draw = np.random.RandomState(seed)  # the legacy stream is the one that the paper's arrays come from
    context, slots = 2 * pairs, (length - 2 * pairs) // 2
    law = np.arange(1, slots + 1) ** (power - 1)

    def rows(values: Any, p: Any = None) -> Any:
        return np.stack([draw.choice(values, size=pairs, replace=False, p=p) for _ in range(count)])

    keys, values = rows(np.arange(1, vocab // 2)), rows(np.arange(vocab // 2, vocab))
    where = context + 2 * rows(np.arange(slots), law / law.sum())
    inputs = np.zeros((count, length), dtype=np.int64)
    labels = np.full((count, length), IGNORE, dtype=np.int64)
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    np.put_along_axis(inputs, where, keys, 1)
    np.put_along_axis(labels, where, values, 1)
    if fill:
        inputs = np.where(inputs == 0, draw.randint(vocab, size=inputs.shape), inputs)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


class BaseConv(nn.Module):
    """(u W + b1) * (h conv u + b2), h causal with ``kernel`` taps a channel."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.kernel = kernel
        self.gate = nn.Linear(dim, dim)
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim)

    def forward(self, u: Float[Tensor, "batch n dim"], *_: object, **__: object) -> Float[Tensor, "batch n dim"]:
        past = F.pad(u.transpose(1, 2), (self.kernel - 1, 0))
        return self.gate(u) * self.conv(past).transpose(1, 2)


@registry.register(CARD)
@task
class ZoologyMQAR(Task):
    """Recall the value of each key that is asked again. Chance is 2 / ``vocab``."""

    name = "zoology-mqar"
    pattern = "causal-self"
    metric = "accuracy"
    size = Size(dim=64, heads=4, depth=2)
    steps = 1000
    batch_size = 32
    lr = 3e-3
    companions = ("none", "base-conv")

    def __init__(
        self,
        length: int = 32,
        vocab: int = 64,
        pairs: int = 4,
        power: float = 0.01,
        examples: int = 20_000,
    ) -> None:
        self.length, self.vocab, self.pairs, self.power, self.examples = length, vocab, pairs, power, examples

    def _draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        return generate(count, self.length, vocab=self.vocab, pairs=self.pairs, power=self.power, seed=seed)

    def batches(self, seed, batch_size):
        inputs, labels = self._draw(self.examples, seed)
        for index in data.shuffled(len(inputs), batch_size, seed):
            yield {"inputs": inputs[index], "labels": labels[index]}

    @cached_property
    def _held_out(self) -> dict[str, Tensor]:
        inputs, labels = self._draw(512, 2**32 - 1)
        return {"inputs": inputs, "labels": labels}

    def model(self, entrant, size):
        if entrant.id != "base-conv":
            return LanguageModel(entrant, size, self.vocab, self.length)
        model = LanguageModel(Entrant("none"), size, self.vocab, self.length)
        for block in model.trunk.blocks:
            block.entrant = BaseConv(size.dim, **entrant.options)
        return model

    def _answers(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        asked = batch["labels"] != IGNORE
        return model(batch["inputs"])[asked], batch["labels"][asked]

    def loss(self, model, batch):
        return F.cross_entropy(*self._answers(model, batch))

    def evaluate(self, model):
        device = next(model.parameters()).device
        logits, labels = self._answers(model, {name: t.to(device) for name, t in self._held_out.items()})
        return {
            "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
            "loss": F.cross_entropy(logits, labels).item(),
        }

    def example(self):
        return {name: t[:1] for name, t in self._held_out.items()}

    def labels(self, example):
        tokens = [str(token) for token in example["inputs"][0].tolist()]
        return {"rows": tokens, "columns": tokens}
