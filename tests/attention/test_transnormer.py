"""TransNormer: both attentions written out, what the norm makes invariant, and the borders of the blocks."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.transnormer import TransNormer
from crosslight.errors import CrosslightError, UnsupportedPattern

DIM, HEADS, D = 12, 3, 4


def make(**options):
    return crosslight.create("transnormer", **{"dim": DIM, "heads": HEADS, **options}).double()


def split(attn, x):
    return [layer(x).unflatten(-1, (HEADS, D)).transpose(1, 2) for layer in (attn.q, attn.k, attn.v)]


def normed(y):
    y = y.transpose(1, 2).flatten(2)
    return y / y.square().mean(-1, keepdim=True).add(1e-12).sqrt()  # queries that no key answers stay zero


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("causal", [False, True])
def test_norm_attention_is_the_quadratic_form_and_a_norm(variant, causal):
    attn, x = make(variant=variant), torch.randn(2, 70, DIM, dtype=torch.double)
    torch.nn.init.uniform_(attn.norm.weight, 0.5, 2)
    q, k, v = split(attn, x)
    q, k = (torch.where(t > 0, t, t.exp() - 1) + (variant == "t2") for t in (q, k))
    a = q @ k.transpose(-1, -2)
    y = normed((a.tril() if causal else a) @ v) * attn.norm.weight
    assert torch.allclose(attn(x, causal=causal), attn.out(y), atol=1e-8)


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [3, 8, 19])
def test_diag_attention_is_attention_inside_blocks(variant, causal, n):
    attn, x = make(variant=variant, local=True, block=4), torch.randn(2, n, DIM, dtype=torch.double)
    q, k, v = split(attn, x)
    scores, i = q @ k.transpose(-1, -2) / math.sqrt(D), torch.arange(n)
    seen = i[:, None] // 4 == i // 4
    seen = seen & (i <= i[:, None]) if causal else seen
    if variant == "t1":
        y = normed(F.relu(scores) * seen @ v)
    else:
        y = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(attn(x, causal=causal), attn.out(y), atol=1e-6)
    assert torch.allclose(attn.read(attn.weights(x, causal=causal), x, causal=causal), attn(x, causal=causal))


def test_a_block_of_all_tokens_is_full_attention():
    q, k, v = torch.randn(3, 2, HEADS, 9, D, dtype=torch.double)
    full = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(TransNormer(HEADS, D, variant="t2", local=True, block=9)(q, k, v), full, atol=1e-12)


def test_no_influence_across_borders():
    attn, x = make(local=True, block=4), torch.randn(1, 10, DIM, dtype=torch.double, requires_grad=True)
    (grad,) = torch.autograd.grad(attn(x)[:, 4:8].sum(), x)
    assert grad[:, 4:8].any()
    assert not grad[:, :4].any()
    assert not grad[:, 8:].any()


@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_padding_and_steps_in_blocks(variant):
    attn, x = make(variant=variant, local=True, block=4), torch.randn(2, 10, DIM, dtype=torch.double)
    keep = torch.arange(10) < torch.tensor([[10], [6]])
    assert torch.allclose(attn(x, mask=keep)[1, :6], attn(x[1:, :6])[0], atol=1e-12)
    assert torch.allclose(attn(x, mask=keep)[1, 8:], attn.out(torch.zeros(DIM, dtype=torch.double)))
    cache, outs = None, []
    for t in range(10):
        y, cache = attn.step(x[:, t : t + 1], cache)
        outs.append(y)
        assert cache.state.length <= 4
    assert torch.allclose(torch.cat(outs, 1), attn(x, causal=True), atol=1e-12)


def test_scale_of_the_keys_does_not_matter_where_phi_is_homogeneous():
    """elu is, on positive numbers; the norm takes the factor out."""
    attn, x = make(), torch.rand(2, 9, DIM, dtype=torch.double)
    for layer in (attn.q, attn.k):
        torch.nn.init.uniform_(layer.weight, 0.1, 1)
        torch.nn.init.zeros_(layer.bias)
    before = attn(x)
    with torch.no_grad():
        attn.k.weight.mul_(50)
    assert torch.allclose(attn(x), before, atol=1e-10)


def test_gradients_stay_bounded_where_a_denominator_blows_up():
    """Features of elu sum to nearly zero: divided by that sum, gradients are unbounded; normalised, they are not."""
    v = torch.randn(1, 1, 64, D, dtype=torch.double)
    k = torch.randn(1, 1, 64, D, dtype=torch.double)
    core = TransNormer(1, D)
    total = core._features(k).sum(2, keepdim=True)
    q = torch.rand(1, 1, 64, D, dtype=torch.double) + 0.5
    q = q - (1 - 1e-6) * (q * total).sum(-1, keepdim=True) / total.square().sum(-1, keepdim=True) * total  # sums near 0
    q = torch.where(q > 0, q, (1 + q.clamp(min=-0.9)).log()).requires_grad_()
    y = core(q, k, v)
    (bounded,) = torch.autograd.grad(F.rms_norm(y, (D,)).sum(), q, retain_graph=True)
    divided = y / (core._features(q) * total).sum(-1, keepdim=True)
    (unbounded,) = torch.autograd.grad(divided.sum(), q)
    assert bounded.norm() < 100
    assert unbounded.norm() > 100 * bounded.norm()


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="variant: got 't3'"):
        make(variant="t3")
    with pytest.raises(CrosslightError, match="block: got 0"):
        make(block=0)
    with pytest.raises(UnsupportedPattern, match="local"):
        make(local=True)(*torch.randn(2, 1, 4, DIM, dtype=torch.double))
