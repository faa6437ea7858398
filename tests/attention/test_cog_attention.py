"""Cog attention: signs of the scores, magnitudes of a softmax."""

import math

import pytest
import torch

import crosslight
from crosslight.attention.cog_attention import CogAttention
from crosslight.engines import masks

N, WIDTH = 7, 4


@pytest.fixture
def core() -> CogAttention:
    return CogAttention(2, WIDTH)


def heads(n: int = N) -> list[torch.Tensor]:
    return list(torch.randn(3, 2, 2, n, WIDTH, dtype=torch.float64, requires_grad=True).unbind())


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_exponential_form(core, causal):
    """The paper's first form: exp(|p| - row maximum) of the visible keys, normalised, with the sign of p."""
    q, k, v = heads()
    p = (q @ k.mT / 2).detach()
    for b in range(2):
        for h in range(2):
            for i in range(N):
                row = p[b, h, i, : i + 1] if causal else p[b, h, i]
                e = torch.exp(row.abs() - row.abs().max())
                w = row.sign() * e / e.sum()
                got = core.weights(q, k, causal=causal)[b, h, i]
                torch.testing.assert_close(got[: len(w)], w)
                assert (got[len(w) :] == 0).all()
                torch.testing.assert_close(core(q, k, v, causal=causal)[b, h, i], w @ v[b, h, : len(w)])


def test_magnitudes_sum_to_one_and_signs_are_those_of_the_scores(core):
    q, k, _ = heads()
    weights = core.weights(q, k)
    torch.testing.assert_close(weights.abs().sum(-1), torch.ones(2, 2, N, dtype=torch.float64))
    assert torch.equal(weights.sign(), (q @ k.mT).sign())
    assert (weights.sum(-1) < 1).any()


def test_positive_scores_give_softmax_attention(core):
    q, k, v = (t.abs() for t in heads())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(core(q, k, v), expected)


def test_a_negated_query_subtracts_what_it_would_add(core):
    q, k, v = heads()
    torch.testing.assert_close(core(-q, k, v), -core(q, k, v))


def test_gradient_flows_through_the_magnitude(core):
    """dW/dP = sign(P) * Jacobian of softmax(|P|) * sign(P)."""
    q, k, _ = heads(4)
    p = q @ k.mT / 2
    weights = core.weights(q, k)
    upstream = torch.randn_like(weights)
    magnitude = p.abs().softmax(-1)
    inner = upstream * p.sign()
    dp = magnitude * (inner - (magnitude * inner).sum(-1, keepdim=True)) * p.sign()
    torch.testing.assert_close(torch.autograd.grad(weights, q, upstream)[0], dp @ k / math.sqrt(WIDTH))


def test_masked_weights_are_exactly_zero(core):
    q, k, _ = heads()
    weights = core.weights(q, k, mask=masks.window(1), causal=True)
    band = torch.ones(N, N).tril() - torch.ones(N, N).tril(-2)
    assert torch.equal((weights != 0), band.bool().expand_as(weights))


def test_one_head_reads_a_difference_by_its_query_alone():
    """y = v_a - v_b: with score +s on a, -s on b and 0 elsewhere, the weights tend to 1/2, -1/2, 0."""
    core = CogAttention(1, 4)
    k = torch.eye(4, dtype=torch.float64)[None, None]
    v = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    q = 60 * torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    torch.testing.assert_close(2 * core(q, k, v), v[:, :, :1] - v[:, :, 1:2])


def test_layer_has_the_parameters_of_softmax():
    cog, softmax = (crosslight.create(id, dim=12, heads=3) for id in ("cog-attention", "softmax"))
    assert {n: p.shape for n, p in cog.named_parameters()} == {n: p.shape for n, p in softmax.named_parameters()}
