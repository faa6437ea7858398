"""The checks of kind explain: readings of a model's attention.

A row brings ``sample(**options) -> (explanation, inputs)``, such that ``explanation(**inputs)`` is a `Reading`;
``inputs["model"]`` is the model that is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from crosslight.cards import Card
from crosslight.explain.base import Reading
from crosslight.testing.common import close
from crosslight.testing.suite import Make, declare


def ready(make: Make) -> tuple[Any, dict[str, Any]]:
    return make.example(dtype=torch.float32)


@declare("explain")
def reading_is_finite(make: Make, card: Card) -> None:
    """The explanation gives a `Reading` with scores, all finite and not all alike."""
    explanation, inputs = ready(make)
    reading = explanation(**inputs)
    assert isinstance(reading, Reading), f"got {type(reading).__name__}, expected a Reading"
    assert reading.scores, "the reading has no scores"
    for name, scores in reading.scores.items():
        assert scores.isfinite().all(), f"scores of {name} are not finite"
    assert any(s.std() > 0 for s in reading.scores.values() if s.numel() > 1), "all scores are alike"


@declare("explain")
def reading_is_deterministic(make: Make, card: Card) -> None:
    """The same model and input give the same scores."""
    explanation, inputs = ready(make)
    first, second = explanation(**inputs), explanation(**inputs)
    for name, scores in first.scores.items():
        close(second.scores[name], scores, f"scores of {name} at a second call", 1e-6)


@declare("explain")
def model_is_left_as_it_was(make: Make, card: Card) -> None:
    """Parameters, their gradients, buffers, hooks and the training flag are what they were."""
    explanation, inputs = ready(make)
    model = inputs["model"]

    def state() -> list[Any]:
        flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return [flags, [(p.requires_grad, p.grad is None) for p in model.parameters()]]

    assert isinstance(model, nn.Module), f"inputs['model'] is {type(model).__name__}, expected a module"
    before, values = state(), [t.clone() for t in model.state_dict().values()]
    explanation(**inputs)
    assert state() == before, "reading changed flags, hooks or gradients of the model"
    for old, new in zip(values, model.state_dict().values(), strict=True):
        close(new, old, "state of the model after reading", 0.0)
