"""The checks of kind training: losses.

A row brings ``sample(**options) -> (loss, inputs)``, such that ``loss(**inputs)`` is a number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from crosslight.cards import Card
from crosslight.testing.common import close, differentiable, gradients
from crosslight.testing.suite import Make, declare


@declare("training")
def loss_is_a_finite_number(make: Make, card: Card) -> None:
    """The loss is one finite number, with finite gradients that are not all zero."""
    loss, inputs = make.example()
    inputs = tree_map(lambda t: t.requires_grad_() if _floating(t) else t, inputs)
    value = loss(**inputs)
    assert value.dim() == 0, f"loss is {tuple(value.shape)}, expected one number"
    assert value.isfinite(), f"loss is {value.item()}"
    found = gradients(value, *(t for t in tree_leaves(inputs) if _floating(t)))
    assert all(g.isfinite().all() for g in found), "a gradient is not finite"
    assert any(g.any() for g in found), "no gradient reaches the inputs"


@declare("training")
def gradients_are_exact(make: Make, card: Card) -> None:
    """Gradients of the inputs equal finite differences in float64."""
    loss, inputs = make.example()
    given = {name: t.requires_grad_() for name, t in inputs.items() if _floating(t)}
    differentiable(lambda **ts: loss(**{**inputs, **ts}), given)


@declare("training")
def loss_is_deterministic(make: Make, card: Card) -> None:
    """In eval mode the same input gives the same loss, and float32 that of float64."""
    loss, inputs = make.example()
    value = loss(**inputs)
    assert torch.equal(value, loss(**inputs)), "a second call gives another loss"
    single = tree_map(lambda t: t.float() if _floating(t) else t, inputs)
    close(loss.float()(**single).double(), value, "loss in float32", 1e-4)


def _floating(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()
