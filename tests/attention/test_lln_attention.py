"""LLN attention: its matrix written out, the log-variance of softmax attention, blocks, and the running deviations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.lln_attention import A, B, LLNAttention
from crosslight.engines import masks
from crosslight.errors import CrosslightError

HEADS, D = 2, 4


def heads(n, m=None, dtype=torch.double):
    m = n if m is None else m
    return [torch.randn(2, HEADS, length, D, dtype=dtype) for length in (n, m, m)]


def core(**options):
    return LLNAttention(HEADS, D, **options).eval().double()


def explicit(q, k, alpha, beta, seen):
    p = torch.einsum("bhic,bhjc->bhij", (alpha * q).exp(), (beta * k).exp()) * seen
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [3, 80])
def test_half_of_the_exponentials_and_half_of_the_blocks(causal, n):
    q, k, v = heads(n)
    attn = core()
    attn.sigma.copy_(torch.tensor([0.7, 1.3]))
    s = math.sqrt(((0.7 * 1.3) ** 2 - B) / (2 * A))
    i = torch.arange(n)
    seen = i <= i[:, None] if causal else torch.ones(n, n, dtype=torch.bool)
    p = explicit(q, k, s / 0.7, s / 1.3, seen)
    blocks = seen & (i // D == i[:, None] // D)
    d = (q @ k.transpose(-1, -2) / math.sqrt(D)).masked_fill(~blocks, -math.inf).softmax(-1)
    assert torch.allclose(attn(q, k, v, causal=causal), (p + d) / 2 @ v, atol=1e-6)  # sigma is rounded to float32
    assert torch.allclose(attn.weights(q, k, causal=causal), (p + d) / 2, atol=1e-6)
    assert torch.allclose(attn(q, k, v, causal=causal), attn.weights(q, k, causal=causal) @ v, atol=1e-10)


def test_one_block_is_half_of_full_attention():
    q, k, v = heads(D)
    expected = (core(block=0)(q, k, v) + F.scaled_dot_product_attention(q, k, v)) / 2
    assert torch.allclose(core()(q, k, v), expected, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_distributions(causal):
    q, k, _ = heads(9)
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    a = core(block=0).weights(q, k, mask=masks.keys(keep), causal=causal)
    assert (a >= 0).all()
    assert torch.allclose(a.sum(-1), torch.ones((), dtype=a.dtype))
    assert not a[1, :, :, 4:].any()


@pytest.mark.parametrize("deviation", [1.0, 1.2, 1.5, 2.0])
def test_log_variance_is_that_of_softmax(deviation):
    d, n = 64, 512
    q, k = deviation * torch.randn(2, 1, 1, n, d, dtype=torch.double)
    attn = LLNAttention(1, d, block=0).double()
    attn(q, k, k)  # in training, the first batch sets the deviations
    matched = attn.eval().weights(q, k).log().var(dim=(-1, -2))
    softmax = (q @ k.transpose(-1, -2) / math.sqrt(d)).softmax(-1).log().var(dim=(-1, -2))
    assert 1 / 1.4 < matched / softmax < 1.4
    plain = explicit(q, k, 1.0, 1.0, torch.ones((), dtype=torch.bool)).log().var(dim=(-1, -2))
    assert plain < softmax / 10


@pytest.mark.parametrize("rising", [False, True])
def test_causal_survives_features_that_exp_does_not(rising):
    """Over keys that run from -1000 to 1000, exp(k - maximum) is zero for every early token or every late one."""
    q, k, v = heads(150, dtype=torch.float32)
    slope = torch.linspace(-1000, 1000, 150)[:, None]
    k = k + (slope if rising else -slope)
    given = [t.requires_grad_() for t in (q, k, v)]
    attn = LLNAttention(HEADS, D, block=0).eval()
    out = attn(*given, causal=True)
    exact = core(block=0)(*(t.double() for t in given), causal=True)
    assert torch.allclose(out.double(), exact, atol=1e-2)
    assert torch.allclose(out[:, :, 0], v[:, :, 0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), given))


def test_training_moves_the_deviations_and_evaluation_does_not():
    attn = LLNAttention(HEADS, D)
    q, k, v = heads(50, dtype=torch.float32)
    keep = torch.arange(50) < torch.tensor([[50], [20]])
    attn(2 * q, 3 * k, v, mask=masks.keys(keep))
    read = torch.cat([k[0].flatten(), k[1, :, :20].flatten()])
    first = torch.stack([2 * q.std(correction=0), 3 * read.std(correction=0)])
    assert torch.allclose(attn.sigma, first, atol=1e-5)
    attn(q, k, v)
    second = torch.stack([q.std(correction=0), k.std(correction=0)])
    assert torch.allclose(attn.sigma, (first + second) / 2, atol=1e-5)
    before = attn.sigma.clone()
    attn.eval()(5 * q, k, v)
    assert torch.equal(attn.sigma, before)


def test_deviations_leave_out_padding():
    """In self-attention that of queries too; a mask of the context says nothing of them."""
    attn = crosslight.create("lln-attention", dim=8, heads=2).double().train()
    x, z = torch.randn(2, 2, 9, 8, dtype=torch.double)
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    changed = torch.where(keep.unsqueeze(-1), x, 10 * x)

    def sigma(*streams):
        fresh = copy.deepcopy(attn)
        fresh(*streams, mask=keep)
        return fresh.core.sigma

    assert torch.allclose(sigma(changed), sigma(x))
    assert torch.allclose(sigma(x, torch.where(keep.unsqueeze(-1), z, 10 * z)), sigma(x, z))
    assert not torch.allclose(sigma(changed, z), sigma(x, z))


def test_a_context_has_no_blocks():
    attn = crosslight.create("lln-attention", dim=8, heads=2).double().eval()
    plain = crosslight.create("lln-attention", dim=8, heads=2, block=0).double().eval()
    plain.load_state_dict(attn.state_dict())
    x, z = torch.randn(2, 2, 9, 8, dtype=torch.double)
    assert torch.allclose(attn(x, z), plain(x, z), atol=1e-12)
    assert torch.allclose(attn(x, z), attn(x, z.flip(1)), atol=1e-12)
    assert not torch.allclose(attn(x), plain(x))


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="block: got -1"):
        core(block=-1)
    with pytest.raises(CrosslightError, match="mix: got 2"):
        core(mix=2)
