"""Collinear attention: the factored score against keys built pair by pair, and what holds of it by distance."""

import math

import pytest
import torch

import crosslight
from crosslight.engines.positions import Rotary
from crosslight.errors import CrosslightError
from crosslight.testing import flops

N, HEADS, D = 9, 2, 8


def make(**options):
    return crosslight.create("collinear-attention", **{"dim": HEADS * D, "heads": HEADS, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, N, HEADS * D, dtype=torch.double)


def heads(t: torch.Tensor) -> torch.Tensor:
    return t.unflatten(-1, (HEADS, D)).transpose(1, 2)


def scores(attn, x):
    """What softmax is taken of."""
    q, k = (attn.position.rotate(t) for t in (attn._queries(x), attn._keys(x)))
    return q @ k.mT / math.sqrt(D)


def test_equals_keys_built_pair_by_pair_and_rotated(x):
    attn, turn = make(), Rotary(D)
    q, t = heads(attn.q(x)), heads(attn.k(x))
    t = ((t[..., : D // 2] + t[..., D // 2 :]) / 2).relu().repeat(1, 1, 1, 2)
    naive = torch.empty(2, HEADS, N, N, dtype=torch.double)
    for m in range(N):
        for n in range(N):
            key = turn.rotate((q[:, :, m] * t[:, :, n])[:, :, None], offset=n)
            naive[:, :, m, n] = (turn.rotate(q[:, :, m : m + 1], offset=m) * key).sum((-1, -2)) / math.sqrt(D)
    torch.testing.assert_close(scores(attn, x), naive)
    for causal in (False, True):
        seen = torch.ones(N, N, dtype=torch.bool).tril() if causal else torch.ones(N, N, dtype=torch.bool)
        weights = naive.masked_fill(~seen, -math.inf).softmax(-1)
        torch.testing.assert_close(attn.weights(x, causal=causal), weights)
        y = attn.out((weights @ heads(attn.v(x))).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attn(x, causal=causal), y)


def test_equals_the_closed_form_in_cosines(x):
    attn = make()
    radius = heads(attn.q(x)).unflatten(-1, (2, -1)).square().sum(-2)
    theta = 10_000.0 ** (-2 * torch.arange(D // 2, dtype=torch.double) / D)
    distance = torch.arange(N)[:, None] - torch.arange(N)
    cosines = (distance[..., None] * theta).cos()
    closed = torch.einsum("bhnj,bhmj,mnj->bhmn", attn.factors(x), radius, cosines) / math.sqrt(D)
    torch.testing.assert_close(scores(attn, x), closed)


def test_factors_are_not_negative(x):
    attn = make()
    assert (attn.factors(x) >= 0).all()
    assert (attn.factors(x) == 0).any(), "relu is idle, so the test shows nothing"


def test_only_the_distance_counts(x):
    attn = make()
    q, k = attn._queries(x), attn._keys(x)

    def at(offset):
        return attn.position.rotate(q, offset=offset) @ attn.position.rotate(k, offset=offset).mT

    torch.testing.assert_close(at(0), at(37))


def test_equal_content_scores_highest_at_the_own_place(x):
    attn = make()
    same = x[:, :1].expand(-1, 300, -1)
    a = scores(attn, same)
    assert (a <= a.diagonal(dim1=2, dim2=3)[..., None] + 1e-12).all()
    # Plain rotary attention has keys that start at an angle: some other place wins.
    plain = crosslight.create("softmax", dim=HEADS * D, heads=HEADS, position="rope").double()
    weights = plain.weights(same)
    assert (weights > weights.diagonal(dim1=2, dim2=3)[..., None] + 1e-12).any()


def test_another_rotation_serves_as_the_position(x):
    attn, slow = make(), make(position=Rotary(D, base=1e6))
    slow.load_state_dict(attn.state_dict())
    assert (attn(x) - slow(x)).abs().max() > 1e-6


def test_no_tensor_for_each_pair_and_channel():
    n = 128
    call = torch.randn(1, n, HEADS * D, dtype=torch.double, requires_grad=True)
    meter = flops.measure(lambda: make()(call))
    assert meter.largest <= HEADS * n * n


@pytest.mark.parametrize(("name", "value"), [("position", "alibi"), ("position", None), ("head_dim", 7)])
def test_bad_options_are_refused(name, value):
    with pytest.raises(CrosslightError, match=name):
        make(**{name: value})
