"""ComplexFormer: the sum of cosines, the limit of RoPE, relative positions."""

import math

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError

DIM, HEADS, N = 16, 2, 6
D = DIM // HEADS


@pytest.fixture
def attn():
    layer = crosslight.create("complexformer", dim=DIM, heads=HEADS).double()
    nn.init.normal_(layer.shift)
    return layer


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


@pytest.mark.parametrize("cross", [False, True])
def test_scores_are_the_sum_of_cosines(attn, x, cross):
    z = torch.randn(2, 9, DIM, dtype=torch.double) if cross else x
    q, k = (p(t).unflatten(-1, (HEADS, D)).transpose(1, 2) for p, t in ((attn.q, x), (attn.k, z)))
    (rq, tq), (rk, tk) = (
        ((t[..., : D // 2] ** 2 + t[..., D // 2 :] ** 2 + 1e-9).sqrt(), torch.atan2(t[..., D // 2 :], t[..., : D // 2]))
        for t in (q, k)
    )
    g = 10_000.0 ** (-2 * torch.arange(D // 2) / D)
    distance = torch.arange(N)[:, None, None] - torch.arange(z.shape[1])[None, :, None]
    phase = attn.delta.unsqueeze(1) * (tq.unsqueeze(3) - tk.unsqueeze(2)) + attn.shift.unsqueeze(1) + distance * g
    s = (rq.unsqueeze(3) * rk.unsqueeze(2) * phase.cos()).sum(-1)
    torch.testing.assert_close(attn.weights(x, z if cross else None), s.softmax(-1), atol=1e-6, rtol=1e-6)


def test_delta_one_without_shift_is_rope(attn, x):
    nn.init.ones_(attn.delta)
    nn.init.zeros_(attn.shift)
    rope = crosslight.create("softmax", dim=DIM, heads=HEADS, bias=False, position="rope").double()
    rope.load_state_dict({n: t for n, t in attn.state_dict().items() if n not in ("delta", "shift")})
    with torch.no_grad():
        rope.q.weight *= math.sqrt(D)
    torch.testing.assert_close(attn(x, causal=True), rope(x, causal=True), atol=1e-7, rtol=1e-6)


def test_scores_depend_on_relative_positions(attn, x):
    """Three more tokens in front, which are masked, move all positions by three and change nothing."""
    padded = torch.cat([torch.randn(2, 3, DIM, dtype=torch.double), x], 1)
    mask = (torch.arange(N + 3) >= 3).expand(2, -1)
    torch.testing.assert_close(attn(padded, mask=mask)[:, 3:], attn(x))


def test_without_delta_the_phase_of_the_content_does_not_count(attn, x):
    attn.position = None
    turned = x.clone()
    with torch.no_grad():
        attn.q.weight.copy_(torch.eye(DIM))
        attn.k.weight.copy_(torch.eye(DIM))
        # One more turn of each complex number: same magnitudes, other phases.
        halves = turned.unflatten(-1, (HEADS, 2, D // 2))
        turned = torch.stack([-halves[..., 1, :], halves[..., 0, :]], -2).flatten(-3)
        assert not torch.allclose(attn.weights(turned, x), attn.weights(x, x))
        attn.delta.zero_()
    torch.testing.assert_close(attn.weights(turned, x), attn.weights(x, x))


def test_two_numbers_more_for_each_pair_of_channels(attn):
    plain = crosslight.create("softmax", dim=DIM, heads=HEADS, bias=False)
    more = sum(p.numel() for p in attn.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == 2 * HEADS * D // 2


def test_zero_queries_have_finite_gradients(attn):
    x = torch.zeros(1, 3, DIM, dtype=torch.double, requires_grad=True)
    attn(x).sum().backward()
    assert x.grad.isfinite().all()


def test_an_odd_head_width_is_refused():
    with pytest.raises(CrosslightError, match="head_dim: got 3, expected an even head width"):
        crosslight.create("complexformer", dim=6, heads=2)
