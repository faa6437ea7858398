"""The checks of kind map: (batch, channels, *space) -> the same shape."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from crosslight.cards import Card
from crosslight.errors import CrosslightError
from crosslight.maps.base import MapAttention
from crosslight.testing.common import close, differentiable, gradients, refused, restored, twice
from crosslight.testing.suite import Make, declare

#: Sides that a map must take: one cell, odd, uneven.
SPACES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,), (7,), (12,)),
    2: ((1, 1), (1, 5), (7, 7), (6, 9)),
    3: ((1, 1, 1), (2, 5, 3)),
}


def sample(gate: MapAttention, space: tuple[int, ...] | None = None, batch: int = 2) -> Tensor:
    """A random map in the module's dtype, that asks for gradients."""
    dtype = next((p.dtype for p in gate.parameters()), torch.float64)
    space = SPACES[gate.space[0]][-1] if space is None else space
    return torch.randn(batch, gate.channels, *space, dtype=dtype, requires_grad=True)


@declare("map")
def shape_is_kept(make: Make, card: Card) -> None:
    """The output has the shape of x for any sides, one cell and odd ones among them, in every rank declared."""
    gate = make()
    for axes in gate.space:
        for space in SPACES[axes]:
            x = sample(gate, space)
            y = gate(x)
            assert y.shape == x.shape, f"output {tuple(y.shape)} for x {tuple(x.shape)}"
            assert y.isfinite().all(), f"output is not finite for x {tuple(x.shape)}"


@declare("map")
def weights_are_the_gate(make: Make, card: Card) -> None:
    """`weights` broadcasts to x; where the map multiplies, it is in [0, 1] and x * weights is the output."""
    gate = make()
    for axes in gate.space:
        x = sample(gate, SPACES[axes][-1])
        weights = gate.weights(x)
        if not gate.multiplicative:
            assert weights.isfinite().all(), "weights are not finite"
            continue
        assert torch.broadcast_shapes(weights.shape, x.shape) == x.shape, (
            f"weights {tuple(weights.shape)} do not broadcast to x {tuple(x.shape)}"
        )
        low, high = weights.min().item(), weights.max().item()
        assert low >= 0, f"a weight is {low:.2g}, expected at least 0"
        assert high <= 1, f"a weight is {high:.2g}, expected at most 1"
        close(x * weights, gate(x), "x * weights(x)")


@declare("map")
def gradients_are_exact(make: Make, card: Card) -> None:
    """Gradients of the input and of every parameter equal finite differences in float64."""
    gate = make()
    x = sample(gate, (*SPACES[gate.space[0]][-1][:-1], 3), batch=1)

    def output(x: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(gate, parameters, (x,))

    differentiable(output, {"x": x} | {name: p for name, p in gate.named_parameters() if p.requires_grad})


@declare("map")
def bfloat16_is_close(make: Make, card: Card) -> None:
    """In bfloat16 the output is bfloat16 and close to that in float64 with the same rounded weights."""
    gate = make().to(torch.bfloat16)
    x = sample(gate)
    y = gate(x)
    assert y.dtype == torch.bfloat16, f"output is {y.dtype}"
    expected = copy.deepcopy(gate).double()(x.double())
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < 0.05, f"relative error {error:.3f}"


@declare("map")
def compiles(make: Make, card: Card) -> None:
    """``torch.compile(fullgraph=True)`` gives the same output and gradients."""
    gate = make()
    x = sample(gate)
    twice(gate, lambda run: run(x), [x, *gate.parameters()])


@declare("map")
def state_restores(make: Make, card: Card) -> None:
    """A state_dict, saved and loaded without pickle, and a deepcopy make the same module again."""
    gate, other = make(seed=0), make(seed=1)
    x = sample(gate)
    restored(gate, other, lambda module: module(x))


@declare("map")
def batch_is_independent(make: Make, card: Card) -> None:
    """In eval mode an element of a batch gives the same result alone."""
    gate = make()
    x = sample(gate, batch=3)
    close(gate(x[1:2]), gate(x)[1:2], "output of one element")


@declare("map")
def evaluation_is_deterministic(make: Make, card: Card) -> None:
    """In eval mode the same input gives the same output, bit for bit."""
    gate = make()
    x = sample(gate)
    assert torch.equal(gate(x), gate(x)), "a second call gives another output"


@declare("map")
def parameters_learn(make: Make, card: Card) -> None:
    """In training mode every parameter receives a finite gradient that is not zero."""
    gate = make().train()
    wanted = {name: p for name, p in gate.named_parameters() if p.requires_grad}
    dead = []
    for name, g in zip(wanted, gradients(gate(sample(gate)), *wanted.values()), strict=True):
        assert g.isfinite().all(), f"gradient of {name} is not finite"
        if not g.any():
            dead.append(name)
    assert not dead, f"no gradient reaches {', '.join(dead)}"


@declare("map")
def float32_by_default(make: Make, card: Card) -> None:
    """The constructor makes float32 parameters."""
    wrong = [name for name, p in make(dtype=None).named_parameters() if p.dtype != torch.float32]
    assert not wrong, f"not float32: {', '.join(wrong)}"


@declare("map")
def bad_input_is_refused(make: Make, card: Card) -> None:
    """Wrong channels, rank or an empty map raise a `CrosslightError` that names x; channels that are none, too."""
    gate = make()
    x: Any = sample(gate).detach()
    with refused("x", also="number of channels"):
        gate(torch.cat([x, x], 1))
    with refused("x", also="rank of x"):
        gate(x[0, 0])
    with refused("x", also="x (no cells)"):
        gate(x[..., :0])
    with refused("channels", CrosslightError, also="channels (0)"):
        make(channels=0)
