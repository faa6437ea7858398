"""The checks of kind control: rules that change the attention of a model while it runs.

A row whose rule asks more of its host than a small transformer over 24 tokens brings ``sample(**options) -> (rule,
{"model": model, "inputs": inputs})``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crosslight.cards import Card
from crosslight.errors import expect
from crosslight.hosts import steer
from crosslight.testing.common import close
from crosslight.testing.suite import Make, Skip, declare


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        from crosslight.attention.softmax import Softmax

        self.norm, self.attend = nn.LayerNorm(dim), Softmax.build(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(self.norm(x))


def host(dim: int = 16, heads: int = 2, depth: int = 4) -> nn.Module:
    """A small pre-norm transformer of our own layers."""
    return nn.Sequential(*(Block(dim, heads) for _ in range(depth))).eval()


def ready(make: Make, **options: Any) -> tuple[Any, nn.Module, Any]:
    """(rule, model, inputs)."""
    if hasattr(make.cls, "sample"):
        rule, example = make.example(dtype=None, **options)
        return rule, example["model"].eval(), example["inputs"]
    rule = make(dtype=None, **options)
    expect(callable(rule), "rule", type(rule).__name__, "a function (weights, call) -> weights")
    return rule, host(), torch.randn(4, 24, 16)


def run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out[0]


@declare("control")
def strength_zero_changes_nothing(make: Make, card: Card) -> None:
    """With strength 0 the output is that of the model alone, bit for bit."""
    if not make.takes("strength"):
        raise Skip("its rule has no strength")
    rule, model, inputs = ready(make, strength=0.0)
    plain = run(model, inputs)
    with steer(model, rule):
        steered = run(model, inputs)
    assert torch.equal(plain, steered), "strength 0 changes the output"


@declare("control")
def rule_acts_and_stays_finite(make: Make, card: Card) -> None:
    """The rule changes the output, which stays finite."""
    rule, model, inputs = ready(make)
    with steer(model, lambda weights, call: weights):
        plain = run(model, inputs)
    with steer(model, rule):
        steered = run(model, inputs)
    assert steered.isfinite().all(), "the steered output is not finite"
    assert not torch.equal(plain, steered), "the rule changes nothing"


@declare("control")
def leaving_restores(make: Make, card: Card) -> None:
    """After the block, and after an error inside it, the model gives what it gave, bit for bit."""
    rule, model, inputs = ready(make)
    plain, state = run(model, inputs), {name: t.clone() for name, t in model.state_dict().items()}
    with steer(model, rule):
        run(model, inputs)
    assert torch.equal(run(model, inputs), plain), "the output differs after steering"
    try:
        with steer(model, rule):
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(run(model, inputs), plain), "the output differs after an error while steering"
    assert list(model.state_dict()) == list(state), "steering changed the names in the state_dict"
    for name, t in model.state_dict().items():
        close(t, state[name], f"{name} after steering", 0.0)
