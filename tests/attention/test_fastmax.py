"""Fastmax: the polynomial's matrix written out, its rows, its limits, and the cost of its features."""

import math

import pytest
import torch

import crosslight
from crosslight.attention.fastmax import CHUNK, Fastmax
from crosslight.engines import masks
from crosslight.errors import CrosslightError

HEADS, D = 2, 6


def heads(n, m=None):
    m = n if m is None else m
    return (torch.randn(2, HEADS, length, D, dtype=torch.double) for length in (n, m, m))


def scores(q, k, normalise="norm", temperature=1.0):
    """s of the docstring."""
    q, k = (x - x.mean(-1, keepdim=True) for x in (q, k))
    if normalise == "norm":
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    else:
        q, k = (x / x.std(-1, correction=0, keepdim=True) for x in (q, k))
    return q @ k.transpose(-1, -2) / temperature


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("normalise", ["norm", "std"])
@pytest.mark.parametrize("causal", [False, True])
def test_factored_is_the_matrix_of_the_polynomial(p, normalise, causal):
    q, k, v = heads(80)
    temperature = 1.5 if normalise == "norm" else 8.0
    s = scores(q, k, normalise, temperature)
    f = 1 + s + (s**2 / 2 if p == 2 else 0)
    f = f.tril() if causal else f
    a = f / f.sum(-1, keepdim=True)
    core = Fastmax(HEADS, D, p=p, temperature=temperature, normalise=normalise)
    assert torch.allclose(core(q, k, v, causal=causal), a @ v, atol=1e-9)
    assert torch.allclose(core.weights(q, k, causal=causal), a, atol=1e-9)
    assert torch.allclose(core(q, k, v, causal=causal), core.weights(q, k, causal=causal) @ v, atol=1e-10)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, CHUNK, 2 * CHUNK + 5])
def test_gradients_are_those_of_the_matrix(p, causal, n):
    q, k, v = (t.requires_grad_() for t in heads(n, n if causal else CHUNK + 3))
    k, v = (t[:, :1] for t in (k, v))  # one head of keys for all
    mask = masks.keys(torch.rand(2, k.shape[2]) < 0.7)
    core = Fastmax(HEADS, D, p=p, temperature=1.5)
    fast, exact = core(q, k, v, mask=mask, causal=causal), core.weights(q, k, mask=mask, causal=causal) @ v
    cotangent = torch.randn_like(fast)
    for got, right in zip(*(torch.autograd.grad(y, (q, k, v), cotangent) for y in (fast, exact)), strict=True):
        assert torch.allclose(got, right, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_distributions(causal):
    q, k, _ = heads(12)
    keep = torch.arange(12) < torch.tensor([[12], [7]])
    a = Fastmax(HEADS, D, normalise="std").weights(q, k, mask=masks.keys(keep), causal=causal)
    assert torch.allclose(a.sum(-1), torch.ones((), dtype=a.dtype))
    assert not a[1, :, :, 7:].any()
    visible = keep[:, None, None] & (torch.ones(12, 12).tril() > 0 if causal else torch.tensor(True))
    assert (a > 0)[visible.expand_as(a)].all()


def test_limits_of_the_temperature():
    q, k, _ = heads(7, 11)
    uniform = Fastmax(HEADS, D, temperature=1e9).weights(q, k)
    assert torch.allclose(uniform, torch.full_like(uniform, 1 / 11), atol=1e-8)
    errors = []
    for temperature in (10.0, 20.0):
        exact = scores(q, k, temperature=temperature).softmax(-1)
        errors.append((Fastmax(HEADS, D, temperature=temperature).weights(q, k) - exact).abs().max().item())
    assert errors[0] < 1e-4
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.5)  # halved scores, an eighth of the error


def test_state_holds_each_product_once():
    attn = crosslight.create("fastmax", dim=HEADS * D, heads=HEADS)
    x = torch.randn(1, 1, HEADS * D)
    _, cache = attn.step(x)
    assert cache.state.S.shape == (1, HEADS, 1 + D + D * (D + 1) // 2, D)


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="p: got 3"):
        Fastmax(HEADS, D, p=3)
    with pytest.raises(CrosslightError, match="temperature: got 0"):
        Fastmax(HEADS, D, temperature=0)
    with pytest.raises(CrosslightError, match="normalise: got 'max'"):
        Fastmax(HEADS, D, normalise="max")
