"""Adaptive filter attention: complex residuals, the Lyapunov equation, the limit of rotary dot products."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.afa import variance
from crosslight.engines import dense
from crosslight.engines.positions import Rotary
from crosslight.errors import CrosslightError

DIM, HEADS, D = 16, 2, 8


def make(**options):
    attn = crosslight.create("afa", **{"dim": DIM, "heads": HEADS, **options}).double()
    for p in attn.core.parameters():  # heads that differ in everything
        p.data += 0.2 * torch.randn_like(p)
    return attn


def stream(n, batch=2):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def heads(n, batch=2):
    return torch.randn(batch, HEADS, n, D, dtype=torch.double)


def to_complex(t):
    return torch.complex(*t.chunk(2, -1))


def test_factored_residuals_are_those_of_carried_keys():
    core, q, k = make().core, heads(9), heads(9)
    alpha = core.dynamics()[0]
    dt = torch.arange(9)[:, None] - torch.arange(9)
    found = core.residuals(core._back(q), core._back(k), (-alpha.view(-1, 1, 1) * dt.abs()).exp())
    for i in range(9):
        for j in range(i + 1):
            forward = ((-alpha.unsqueeze(1) + 1j * core.omega) * (i - j)).exp()
            r = to_complex(q)[:, :, i] - forward * to_complex(k)[:, :, j]
            assert torch.allclose(found[:, :, i, j], r.abs().square().sum(-1), atol=1e-10)


def test_the_variance_solves_the_lyapunov_equation():
    alpha, sigma2, eta2, gamma2 = (torch.tensor(t, dtype=torch.double) for t in (0.3, 0.7, 1.1, 0.4))
    p, dt, steps = eta2.clone(), 5.0, 20_000
    for _ in range(steps):  # dP/dt = -2 alpha P + sigma^2, by midpoints
        middle = p + dt / steps / 2 * (sigma2 - 2 * alpha * p)
        p = p + dt / steps * (sigma2 - 2 * alpha * middle)
    found = variance(torch.tensor(dt).double(), alpha, sigma2, eta2, gamma2)
    assert torch.allclose(found, p + gamma2, atol=1e-7)


def test_the_variance_starts_at_the_noises_and_grows_straight_without_decay():
    alpha = torch.tensor([0.0, 1e-9, 0.5], dtype=torch.double, requires_grad=True)
    one = torch.ones(3, dtype=torch.double)
    at_zero = variance(torch.tensor(0.0).double(), alpha, one, 0.3 * one, 0.2 * one)
    assert torch.allclose(at_zero, 0.5 * one)
    later = variance(torch.tensor(4.0).double(), alpha, one, 0.3 * one, 0.2 * one)
    assert torch.allclose(later[:2], 4.5 * one[:2], atol=1e-6)
    assert torch.autograd.grad(later.sum(), alpha)[0].isfinite().all()


@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_output_is_the_estimate_written_out(robust, causal):
    n, attn = 6, make(robust=robust)
    core, x = attn.core, stream(n, batch=1)
    q, k, v = (to_complex(layer(x)[0].view(n, HEADS, D)) for layer in (attn.q, attn.k, attn.v))
    alpha, sigma2, eta2, gamma2 = core.dynamics()
    nu, estimate = F.softplus(core.raw_nu), torch.empty(n, HEADS, D // 2, dtype=torch.cdouble)
    for h in range(HEADS):
        for i in range(n):
            weights, carried = [], []
            for j in range(i + 1 if causal else n):
                dt = abs(i - j)
                carry = torch.exp(-alpha[h] * dt + 1j * core.omega[h] * (i - j))
                e = math.exp(-2 * alpha[h].item() * dt)
                precision = 1 / (eta2[h] * e + sigma2[h] * (1 - e) / (2 * alpha[h]) + gamma2[h])
                misfit = precision * (q[i, h] - carry * k[j, h]).abs().square().sum() / (nu[h] * D / 2)
                w = precision / (1 + misfit) if robust else precision * torch.exp(-misfit)
                weights.append(w ** (core.tau[h] ** 2))
                carried.append(carry * v[j, h])
            estimate[i, h] = sum(w * c for w, c in zip(weights, carried, strict=True)) / sum(weights)
    y = attn.out(torch.cat([estimate.real, estimate.imag], -1).flatten(1))
    assert torch.allclose(attn(x, causal=causal)[0], y, atol=1e-10)


def test_without_decay_and_noise_it_is_softmax_attention_with_rotary_positions():
    core = crosslight.create("afa", dim=DIM, heads=HEADS).double().core
    with torch.no_grad():
        core.raw_alpha.fill_(-60.0)
        core.raw_sigma.fill_(-60.0)
        core.raw_nu.fill_(1e5)
        core.tau.fill_(1e3)
        core.omega.neg_()  # RoPE turns keys back to the query, the filter carries them forth
    q, k = (F.normalize(heads(12), dim=-1) for _ in range(2))
    _, _, eta2, gamma2 = core.dynamics()
    beta = 2 * core.tau[0] ** 2 / (1e5 * D / 2 * (eta2 + gamma2)[0])
    rope = Rotary(D)
    expected = dense.weights(rope.rotate(q), rope.rotate(k), causal=True, scale=beta.item())
    assert beta > 1
    assert torch.allclose(core.weights(q, k, causal=True), expected, atol=1e-3)


def test_precision_falls_with_time_where_residuals_are_equal():
    core = crosslight.create("afa", dim=DIM, heads=HEADS).double().core
    zero = torch.zeros(1, HEADS, 9, D, dtype=torch.double)
    with torch.no_grad():
        core.raw_sigma.fill_(3.0)
    last = core.weights(zero, zero, causal=True)[0, :, -1]
    assert (last.diff(dim=-1) > 0).all()


def test_queries_in_chunks_are_all_queries_at_once(monkeypatch):
    attn, x = make(), stream(11)
    expected = attn(x), attn(x, causal=True)
    monkeypatch.setattr(dense, "CHUNK", 150)
    assert torch.allclose(attn(x), expected[0], atol=1e-12)
    assert torch.allclose(attn(x, causal=True), expected[1], atol=1e-12)


def test_values_of_a_turning_decaying_state_are_estimated_without_error():
    """What moves by the layer's own dynamics is the same estimate from every token."""
    core = make().core
    alpha = core.dynamics()[0]
    t = torch.arange(7).view(-1, 1)
    moving = ((-alpha.view(-1, 1, 1) + 1j * core.omega.unsqueeze(1)) * t).exp()
    v = torch.cat([moving.real, moving.imag], -1).unsqueeze(0)
    y = core(heads(7, batch=1), heads(7, batch=1), v, causal=True)
    assert torch.allclose(y, v, atol=1e-10)


def test_an_odd_width_is_named():
    with pytest.raises(CrosslightError, match="head_dim: got 3"):
        crosslight.create("afa", dim=6, heads=2)
