"""The checks of kind model: whole networks.

A row brings ``presets``, ``published`` (parameter counts of presets) and ``sample(**options) -> (model, inputs)``, a
tiny one and keyword arguments for it, batch first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from crosslight.cards import Card
from crosslight.testing.common import close, gradients, published_sizes, restored
from crosslight.testing.suite import Make, declare

declare("model")(published_sizes)


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Everything floating that the model returns, in one row for each element of the batch."""
    leaves = [t for t in tree_leaves(model(**inputs)) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([t.flatten(1) if t.dim() else t.view(1, 1) for t in leaves], 1)


@declare("model")
def forward_and_backward_are_finite(make: Make, card: Card) -> None:
    """In training mode the outputs are finite, and a finite gradient reaches every parameter."""
    model, inputs = make.example()
    y = output(model.train(), inputs)
    assert y.isfinite().all(), "output is not finite"
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = []
    for name, g in zip(wanted, gradients(y, *wanted.values()), strict=True):
        assert g.isfinite().all(), f"gradient of {name} is not finite"
        if not g.any():
            dead.append(name)
    assert not dead, f"no gradient reaches {', '.join(dead)}"


@declare("model")
def evaluation_is_deterministic(make: Make, card: Card) -> None:
    """In eval mode the same input gives the same output, bit for bit."""
    model, inputs = make.example()
    assert torch.equal(output(model, inputs), output(model, inputs)), "a second call gives another output"


@declare("model")
def batch_is_independent(make: Make, card: Card) -> None:
    """In eval mode an element of a batch gives the same result alone."""
    model, inputs = make.example()
    alone = tree_map(lambda t: t[1:2] if isinstance(t, Tensor) and t.dim() else t, inputs)
    close(output(model, alone), output(model, inputs)[1:2], "output of one element")


@declare("model")
def state_restores(make: Make, card: Card) -> None:
    """A state_dict, saved and loaded without pickle, and a deepcopy make the same model again."""
    (model, inputs), (other, _) = make.example(), make.example(seed=1)
    restored(model, other, lambda module: output(module, inputs))
