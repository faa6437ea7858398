"""Attention as a marginal: the joint enumerated, priors as masks and biases, inference of the queries."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight import testing
from crosslight.attention.bayesian_attention_marginal import MarginalAttention
from crosslight.engines import masks
from crosslight.errors import CrosslightError

N, D = 5, 4


def heads(n: int = N) -> list[torch.Tensor]:
    return list(torch.randn(3, 1, 1, n, D, dtype=torch.double).unbind())


def potential(name: str, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """psi of all pairs, (n, m)."""
    if name == "bilinear":
        return (q @ k.T / D**0.5).exp()
    return (-torch.cdist(q, k).square() / (2 * D**0.5)).exp()


@pytest.mark.parametrize("name", ["bilinear", "gaussian"])
def test_weights_are_the_marginals_of_the_enumerated_joint(name):
    """All 5^5 graphs with one edge into each node, with a random prior, in which some edges cannot be."""
    q, k, v = heads()
    prior = torch.rand(N, N, dtype=torch.double)
    allowed = (torch.rand(N, N) < 0.7) | torch.eye(N, dtype=torch.bool)
    joint = prior * allowed * potential(name, q[0, 0], k[0, 0])
    marginal, expected = torch.zeros(N, N).double(), torch.zeros(N, D).double()
    for phi in itertools.product(range(N), repeat=N):
        p = joint[torch.arange(N), torch.tensor(phi)].prod()
        marginal[torch.arange(N), torch.tensor(phi)] += p
        expected += p * v[0, 0, list(phi)]
    z = marginal[0].sum()
    core = MarginalAttention(1, D, potential=name)
    mask = masks.Pairs(allowed[None, None])
    bias = prior.log()[None, None]
    got = core.weights(q, k, mask=mask, bias=bias)
    torch.testing.assert_close(got[0, 0], marginal / z)
    torch.testing.assert_close(core(q, k, v, mask=mask, bias=bias)[0, 0], expected / z)
    assert (got[0, 0][~allowed] == 0).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 1, N).double())


@pytest.mark.parametrize("causal", [False, True])
def test_uniform_prior_and_bilinear_potential_are_plain_attention(causal):
    q, k, v = heads()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(MarginalAttention(1, D)(q, k, v, causal=causal), expected)


def test_a_distance_prior_is_alibi():
    ours = crosslight.create("bayesian-attention-marginal", dim=8, heads=2, position="alibi").double()
    plain = crosslight.create("softmax", dim=8, heads=2, position="alibi").double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, N, 8).double()
    torch.testing.assert_close(ours(x, causal=True), plain(x, causal=True))


def test_iterations_are_hopfield_updates():
    """xi <- K^T softmax(beta K xi), then one more reading of the values."""
    q, k, v = heads()
    xi = q[0, 0]
    for _ in range(2):
        xi = torch.stack([k[0, 0].T @ (k[0, 0] @ one / D**0.5).softmax(0) for one in xi])
    expected = (xi @ k[0, 0].T / D**0.5).softmax(-1) @ v[0, 0]
    torch.testing.assert_close(MarginalAttention(1, D, iterations=3)(q, k, v)[0, 0], expected)


def test_queries_settle_on_clusters_under_the_gaussian_potential():
    """Near either of two clusters, the posterior becomes one over the points of that cluster alone."""
    centres = 8 * torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).double()
    k = (centres.repeat_interleave(6, 0) + 0.1 * torch.randn(12, D).double())[None, None]
    q = (0.4 * centres.flip(0) + 0.6 * centres)[None, None]
    soft, hard = (MarginalAttention(1, D, potential="gaussian", iterations=i) for i in (1, 6))
    share = hard.weights(q, k)[0, 0].unflatten(-1, (2, 6)).sum(-1)
    torch.testing.assert_close(share, torch.eye(2).double(), atol=1e-6, rtol=0)
    assert soft.weights(q, k)[0, 0].unflatten(-1, (2, 6)).sum(-1).diagonal().max() < 1 - 1e-6
    torch.testing.assert_close(hard(q, k, k)[0, 0], k[0, 0].unflatten(0, (2, 6)).mean(1), atol=0.05, rtol=0)


def test_the_gaussian_with_iterations_conforms():
    testing.check(
        "bayesian-attention-marginal",
        options={"potential": "gaussian", "iterations": 3},
        only=["fast_path_equals_weights", "backends_agree", "decoding_equals_full_pass", "empty_rows_are_zero"],
    )


def test_bad_potential_is_named():
    with pytest.raises(CrosslightError, match="potential: got 'cubic'"):
        MarginalAttention(1, D, potential="cubic")
