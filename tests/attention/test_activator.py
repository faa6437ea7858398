"""Activator: the unit written out, its linear limit, what permutations do to either axis, cost."""

import math

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.activator import GatedUnit
from crosslight.errors import CrosslightError
from crosslight.testing import flops

DIM, N, HIDDEN = 6, 5, 9


def make(**options):
    attn = crosslight.create("activator", **{"dim": DIM, "max_length": 8, "hidden": HIDDEN, **options}).double()
    for module in attn.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return attn


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


def glu(z, unit, act):
    """The unit on one vector, number by number; shorter vectors use the first columns and rows."""

    def normal(h):
        if unit.norm is None:
            return h
        mean = sum(h) / len(h)
        deviation = math.sqrt(sum((t - mean) ** 2 for t in h) / len(h) + 1e-5)
        return [
            (t - mean) / deviation * a + b
            for t, a, b in zip(h, unit.norm.weight.tolist(), unit.norm.bias.tolist(), strict=True)
        ]

    def rows(linear, count=None):
        weight, bias = linear.weight[:count].tolist(), linear.bias[:count].tolist()
        return [
            lambda v, w=w, b=b: sum(p * q for p, q in zip(w, v, strict=False)) + b
            for w, b in zip(weight, bias, strict=True)
        ]

    u = normal([act(f(z)) for f in rows(unit.gate)])
    v = normal([f(z) for f in rows(unit.value)])
    h = [a * b for a, b in zip(u, v, strict=True)]
    return torch.tensor([f(h) for f in rows(unit.out, len(z))], dtype=torch.double)


def gelu(t):
    return 0.5 * t * (1 + math.erf(t / math.sqrt(2)))


def silu(t):
    return t / (1 + math.exp(-t))


@pytest.mark.parametrize(("activation", "act"), [("gelu", gelu), ("silu", silu)])
@pytest.mark.parametrize("norm", [True, False])
def test_units_are_the_equations(activation, act, norm, x):
    options = {"activation": activation, "norm": norm}
    channel, token, both = (make(axes=axes, **options) for axes in ("channel", "token", "token-channel"))
    expected = torch.stack([torch.stack([glu(t.tolist(), channel.channel, act) for t in b]) for b in x])
    assert torch.allclose(channel(x), expected, atol=1e-10)
    expected = torch.stack([torch.stack([glu(t.tolist(), token.token, act) for t in b.T]).T for b in x])
    assert torch.allclose(token(x), expected, atol=1e-10)
    t = torch.stack([torch.stack([glu(c.tolist(), both.token, act) for c in b.T]).T for b in x])
    z = both.between(x + t)
    expected = t + torch.stack([torch.stack([glu(c.tolist(), both.channel, act) for c in b]) for b in z])
    assert torch.allclose(both(x), expected, atol=1e-10)


@pytest.mark.parametrize("axes", ["channel", "token"])
def test_constant_gate_without_norm_is_a_linear_map(axes, x):
    attn = make(axes=axes, norm=False)
    unit = attn.token or attn.channel
    nn.init.zeros_(unit.gate.weight)
    nn.init.constant_(unit.gate.bias, 1.0)
    size = N if axes == "token" else DIM
    linear = gelu(1.0) * unit.out.weight[:size] @ unit.value.weight[:, :size]
    jacobian = torch.func.jacrev(lambda z: unit(z))(torch.randn(size, dtype=torch.double))
    assert torch.allclose(jacobian, linear)
    zero = attn(torch.zeros_like(x))
    assert torch.allclose(attn(2 * x) - zero, 2 * (attn(x) - zero))
    if axes == "token":
        assert torch.allclose(attn.weights(x)[0, 0], linear)


def test_only_the_channel_form_does_not_know_the_order(x):
    order = torch.tensor([3, 0, 4, 1, 2])
    for axes in ("channel", "token", "token-channel"):
        attn = make(axes=axes)
        assert torch.allclose(attn(x[:, order]), attn(x)[:, order]) == (axes == "channel")


def test_tokens_meet_along_tokens_only(x):
    x.requires_grad_()
    for axes, meet in (("channel", False), ("token", True), ("token-channel", True)):
        (slope,) = torch.autograd.grad(make(axes=axes)(x)[:, 1].sum(), x)
        assert bool(slope[:, [0, 2, 3, 4]].any()) == meet


def test_matrix_and_constant_give_the_unit():
    for norm in (True, False):
        unit = GatedUnit(8, HIDDEN, norm=norm).double()
        z = torch.randn(3, N, dtype=torch.double)
        linear = (unit.matrix(z) @ z.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(linear + unit.constant(z), unit(z))


def test_no_matrix_of_tokens_is_built():
    attn = crosslight.create("activator", dim=16, max_length=2048)
    work = [flops.measure(lambda n=n: attn(torch.randn(1, n, 16))) for n in (512, 2048)]
    assert flops.growth(work[0].flops, work[1].flops, 4) < 1.1
    assert work[1].largest < 2048**2 / 8


def test_padding_counts_as_zeros(x):
    attn, keep = make(axes="token"), torch.tensor([[True, True, False, True, False], [True] * 5])
    assert torch.allclose(attn(x, mask=keep), attn(x * keep.unsqueeze(-1)))


def test_bad_options_are_named(x):
    for name, value in (("axes", "rows"), ("activation", "tanh"), ("max_length", 0), ("hidden", 0)):
        with pytest.raises(CrosslightError, match=f"{name}: got"):
            make(**{name: value})
    with pytest.raises(CrosslightError, match="x: got 9 tokens"):
        make()(torch.randn(1, 9, DIM).double())
