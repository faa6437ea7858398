"""Sigmoid attention: the closed form, and that keys do not compete."""

import math

import pytest
import torch

import crosslight
from crosslight.attention.sigmoid_attention import SigmoidAttention

N, M, WIDTH = 6, 8, 4


def heads() -> list[torch.Tensor]:
    return [torch.randn(2, 3, length, WIDTH, dtype=torch.float64, requires_grad=True) for length in (N, M, M)]


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_tiles_add_up_in_any_order(size, order):
    q, k, v = heads()
    b = -math.log(M)
    tiles = [torch.sigmoid(q @ kt.mT / 2 + b) @ vt for kt, vt in zip(k.split(size, 2), v.split(size, 2), strict=True)]
    total = sum(tiles if order == "forwards" else tiles[::-1])
    torch.testing.assert_close(SigmoidAttention(3, WIDTH)(q, k, v), total)
    torch.testing.assert_close(SigmoidAttention(3, WIDTH, score_bias=b)(q, k, v), total)


def test_gradient_is_the_closed_form():
    """d a / d s = a (1 - a): no statistics of the row are needed."""
    q, k, v = heads()
    y = SigmoidAttention(3, WIDTH)(q, k, v)
    upstream = torch.randn_like(y)
    a = torch.sigmoid(q @ k.mT / 2 - math.log(M))
    ds = a * (1 - a) * (upstream @ v.mT)
    expected = ds @ k / 2, ds.mT @ q / 2, a.mT @ upstream
    torch.testing.assert_close(torch.autograd.grad(y, (q, k, v), upstream), expected)


def test_at_score_zero_every_weight_is_one_over_n_plus_one():
    zero = torch.zeros(1, 1, M, WIDTH)
    torch.testing.assert_close(SigmoidAttention(1, WIDTH).weights(zero, zero), torch.full((1, 1, M, M), 1 / (M + 1)))


def test_a_new_key_leaves_the_other_weights_alone():
    q, k, _ = heads()
    fixed, softmax = SigmoidAttention(3, WIDTH, score_bias=-2.0), crosslight.create("softmax", dim=12, heads=3).core
    assert torch.equal(fixed.weights(q, k)[..., :-1], fixed.weights(q, k[:, :, :-1]))
    assert (softmax.weights(q, k)[..., :-1] < softmax.weights(q, k[:, :, :-1])).all()


def test_the_bias_follows_the_keys_that_a_row_may_read():
    q, k, _ = heads()
    k = k[:, :, :N]
    core = SigmoidAttention(3, WIDTH)
    weights = core.weights(q, k, causal=True)
    for i in range(N):
        alone = core.weights(q[:, :, i : i + 1], k[:, :, : i + 1])
        torch.testing.assert_close(weights[:, :, i : i + 1, : i + 1], alone)


def test_padding_to_another_length_changes_nothing():
    attn = crosslight.create("sigmoid-attention", dim=12, heads=3).double()
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(1, 4, 12, dtype=torch.float64)], 1)
    y = attn(padded, mask=torch.arange(9)[None] < 5)[:, :5]
    torch.testing.assert_close(y, attn(x))


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_positions_act_on_the_scores(position):
    attn = crosslight.create("sigmoid-attention", dim=12, heads=3, position=position).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(attn.read(attn.weights(x, causal=True), x, causal=True), attn(x, causal=True))
    if position == "alibi":
        plain = crosslight.create("sigmoid-attention", dim=12, heads=3).double()
        plain.load_state_dict(attn.state_dict())
        i = torch.arange(7)
        scores = plain.weights(x).logit() + attn.position.bias(i.view(-1, 1), i)
        torch.testing.assert_close(attn.weights(x), scores.sigmoid())
