"""Efficient attention: the explicit product, what its matrix is, and the causal form as its formula says."""

import pytest
import torch

import crosslight
from crosslight.attention.efficient_attention import EfficientAttention
from crosslight.engines import masks
from crosslight.errors import CrosslightError

HEADS, D = 2, 4


def heads(n, m=None, dtype=torch.double):
    m = n if m is None else m
    return (torch.randn(2, HEADS, length, D, dtype=dtype) for length in (n, m, m))


def core(**options):
    return EfficientAttention(HEADS, D, **options)


def test_scaling_is_dot_product_attention_over_n():
    q, k, v = heads(7, 11)
    assert torch.allclose(core(normalisation="scaling")(q, k, v), q @ k.transpose(-1, -2) / 11 @ v, atol=1e-12)
    keep = torch.arange(11) < torch.tensor([[5], [11]])
    expected = q[0] @ k[0, :, :5].transpose(-1, -2) / 5 @ v[0, :, :5]
    assert torch.allclose(core(normalisation="scaling")(q, k, v, mask=masks.keys(keep))[0], expected, atol=1e-12)


def test_softmax_is_the_explicit_product():
    q, k, v = heads(7, 11)
    explicit = torch.einsum("bhic,bhjc->bhij", q.softmax(3), k.softmax(2))
    assert torch.allclose(core().weights(q, k), explicit, atol=1e-12)
    assert torch.allclose(core()(q, k, v), explicit @ v, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_distributions(causal):
    q, k, _ = heads(9)
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    a = core().weights(q, k, mask=masks.keys(keep), causal=causal)
    assert (a >= 0).all()
    assert torch.allclose(a.sum(-1), torch.ones((), dtype=a.dtype))
    assert not a[1, :, :, 4:].any()


def test_causal_is_its_formula():
    q, k, v = heads(80)
    out, scaled = core()(q, k, v, causal=True), core(normalisation="scaling")(q, k, v, causal=True)
    for i in (0, 1, 40, 79):
        seen = slice(0, i + 1)
        maps = k[:, :, seen].softmax(2)  # the noncausal form of the prefix, which holds only what query i may read
        expected = torch.einsum("bhc,bhjc,bhje->bhe", q[:, :, i].softmax(-1), maps, v[:, :, seen])
        assert torch.allclose(out[:, :, i], expected, atol=1e-12)
        expected = torch.einsum("bhc,bhjc,bhje->bhe", q[:, :, i], k[:, :, seen], v[:, :, seen]) / (i + 1)
        assert torch.allclose(scaled[:, :, i], expected, atol=1e-12)


@pytest.mark.parametrize("rising", [False, True])
def test_causal_survives_logits_that_exp_does_not(rising):
    """Keys far apart: over a sequence that rises to 1000, exp(k - maximum) is zero for every early token."""
    q, k, v = heads(150, dtype=torch.float32)
    slope = torch.linspace(-1000, 1000, 150)[:, None]
    k = k + (slope if rising else -slope)
    given = [t.requires_grad_() for t in (q, k, v)]
    out = core()(*given, causal=True)
    exact = core()(*(t.double() for t in given), causal=True)
    assert torch.allclose(out.double(), exact, atol=1e-3)
    assert torch.allclose(out[:, :, 0], v[:, :, 0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), given))


def test_steps_survive_them_too():
    q, k, v = heads(20, dtype=torch.float32)
    k = k + torch.linspace(-300, 300, 20)[:, None]
    state, outs = None, []
    for t in range(20):
        out, state = core().step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        outs.append(out)
    assert torch.allclose(torch.cat(outs, 2), core()(q, k, v, causal=True), atol=1e-3)


def test_order_of_the_tokens_does_not_matter():
    attn = crosslight.create("efficient-attention", dim=8, heads=2).double()
    x, order = torch.randn(2, 9, 8, dtype=torch.double), torch.randperm(9)
    assert torch.allclose(attn(x[:, order]), attn(x)[:, order], atol=1e-12)


def test_bad_normalisation_is_named():
    with pytest.raises(CrosslightError, match="normalisation: got 'max'"):
        crosslight.create("efficient-attention", dim=8, heads=2, normalisation="max")
