"""Every token row on an accelerator, in float32 and bfloat16, long enough that its fast backend runs.

The same weights and the same input in float64 on the CPU, by the reference backend, say what is right.
Needs one: ``pytest tests/test_accelerator.py --device cuda``.
"""

import copy
import functools

import pytest
import torch

from crosslight import registry, testing
from crosslight.engines.backend import backend

#: Largest relative error of the output and of the gradient by x, in norm. In bfloat16 a few routed tokens choose
#: another block than in float64.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
#: Tokens of x and of the context: just long enough that no backend takes the matrix instead.
N = 1024


@functools.cache
def cases():
    registry.load_all()
    cards = [registry.factory(id)[0].card for id in registry.ids()]
    return [(card.id, pattern) for card in cards if card.kind == "token" for pattern in card.patterns]


def _run(attn, x, context, causal):
    x = x.detach().requires_grad_()
    y = attn(x, context, causal=causal)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y) / y.shape[1])
    return y.detach(), grad


def _error(a, b):
    return ((a.double().cpu() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("id", "pattern"), cases())
def test_output_and_gradient_are_those_of_float64(id, pattern, dtype, device):
    attn = testing.suite.Maker(id)(dim=128, heads=2).to(dtype)
    x = torch.randn(1, N, 128).to(dtype)
    context = torch.randn(1, N, attn.context_dim).to(dtype) if pattern.endswith("cross") else None
    causal = pattern.startswith("causal")
    there = _run(copy.deepcopy(attn).to(device), x.to(device), None if context is None else context.to(device), causal)
    with backend("reference"):
        here = _run(attn.double(), x.double(), None if context is None else context.double(), causal)
    for name, got, right in zip(("output", "gradient"), there, here, strict=True):
        assert _error(got, right) < TOLERANCE[dtype], f"{name} off by {_error(got, right):.1e}"
