"""Mega: the whole layer as a recurrence written out, the gates, and chunks."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.errors import CrosslightError

DIM = 6


def make(**options):
    options = {"dim": DIM, "z_dim": 4, "v_dim": 8, "ema_dim": 3, **options}
    attn = crosslight.create("mega", **options).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return attn


def stream(n, width=DIM):
    return torch.randn(2, n, width, dtype=torch.double)


def smoothed(ema, x, bidirectional):
    """The damped average, state by state; the future side leaves out the present token."""
    alpha, delta, total = ema.alpha.sigmoid(), ema.delta.sigmoid(), torch.zeros_like(x)
    for side, turned in ((0, x), (1, x.flip(1))) if bidirectional else ((0, x),):
        s, y = torch.zeros(2, DIM, 3, dtype=torch.double), []
        for t in range(x.shape[1]):
            fresh = alpha[side] * ema.beta[side] * turned[:, t, :, None]
            s = (1 - alpha[side] * delta[side]) * s
            y.append(((s if side else s + fresh) * ema.eta[side]).sum(-1))
            s = s + fresh
        y = torch.stack(y, 1)
        total = total + (y.flip(1) if side else y)
    return total if ema.omega is None else F.silu(total + ema.omega * x)


def written_out(attn, x, causal, chunk):
    """The docstring's equations, one query at a time."""
    smooth = smoothed(attn.ema, x, not causal)
    z, v = F.silu(attn.z(smooth)), F.silu(attn.v(x))
    q, k = (attn.kappa[i] * z + attn.mu[i] for i in (0, 1))
    y = torch.zeros(2, x.shape[1], 8, dtype=torch.double)
    for i in range(x.shape[1]):
        start = i - i % chunk
        seen = slice(start, i + 1 if causal else min(start + chunk, x.shape[1]))
        scores = torch.einsum("bc,bjc->bj", q[:, i], k[:, seen])
        if attn.activation == "softmax":
            weight = (scores / math.sqrt(4)).softmax(-1)
        else:
            scores = scores / scores.shape[1]
            sigma = math.sqrt(1 / (4 * math.pi))
            weight = 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) / (sigma * math.sqrt(2))))
        y[:, i] = torch.einsum("bj,bjc->bc", weight, v[:, seen])
    candidate = F.silu(attn.candidate(smooth) + attn.out(F.silu(attn.gate(smooth)) * y))
    p = attn.update(smooth).sigmoid()
    return p * candidate + (1 - p) * x


@pytest.mark.parametrize("activation", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("ema_skip", [False, True])
def test_equations(activation, causal, chunk, ema_skip):
    attn = make(activation=activation, chunk_size=chunk, position=None, ema_skip=ema_skip)
    x = stream(11)
    expected = written_out(attn, x, causal, chunk or 11)
    assert torch.allclose(attn(x, causal=causal), expected, atol=1e-12)
    assert torch.allclose(attn.read(attn.weights(x, causal=causal), x, causal=causal), expected, atol=1e-12)


@pytest.mark.parametrize("activation", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", ["relative", "rope", "alibi"])
def test_one_chunk_is_the_whole(activation, causal, position):
    options = {"activation": activation, "position": position, "heads": 2}
    full, chunked = make(**options), make(**options, chunk_size=9)
    chunked.load_state_dict(full.state_dict())
    x, keep = stream(9), torch.arange(9) < torch.tensor([[9], [5]])
    for mask in (None, keep):
        assert torch.allclose(full(x, causal=causal, mask=mask), chunked(x, causal=causal, mask=mask), atol=1e-12)
        assert torch.allclose(
            full.weights(x, causal=causal, mask=mask), chunked.weights(x, causal=causal, mask=mask), atol=1e-12
        )


@pytest.mark.parametrize("activation", ["softmax", "laplace"])
@pytest.mark.parametrize("position", ["relative", "rope"])
def test_chunks_decode_from_a_bounded_cache(activation, position):
    attn, x = make(activation=activation, position=position, chunk_size=4, heads=2), stream(15)
    cache, outs = None, []
    for t in range(15):
        y, cache = attn.step(x[:, t : t + 1], cache)
        outs.append(y)
        assert cache.kv.length == t % 4 + 1
    assert torch.allclose(torch.cat(outs, 1), attn(x, causal=True), atol=1e-12)


def test_chunks_hear_of_earlier_ones_through_the_average():
    attn = make(chunk_size=4)
    x = stream(12).requires_grad_()
    a = attn.weights(x, causal=True)
    assert not a[..., 8:, :8].any()
    assert torch.autograd.grad(attn(x, causal=True)[:, 8].sum(), x)[0][:, :8].abs().min() > 0


def test_closed_update_gate_passes_the_stream_through():
    attn, x = make(), stream(7)
    torch.nn.init.zeros_(attn.update.weight)
    torch.nn.init.constant_(attn.update.bias, -1000.0)
    assert torch.equal(attn(x), x)


def test_a_stream_as_its_own_context():
    attn, x = make(), stream(7)
    assert torch.allclose(attn(x, x), attn(x), atol=1e-12)


def test_padding_shortens_the_stream():
    """Masked tokens enter neither the average nor the attention."""
    attn, x = make(activation="laplace"), stream(9)
    keep = torch.arange(9) < torch.tensor([[5], [9]])
    assert torch.allclose(attn(x, mask=keep)[0, :5], attn(x[:1, :5])[0], atol=1e-12)
    assert torch.allclose(attn(x, x, mask=keep)[:1], attn(x[:1], x[:1, :5]), atol=1e-12)


def test_chunks_cost_linear_memory():
    from crosslight.testing.flops import Meter

    attn, x = make(chunk_size=8).float(), torch.randn(1, 1024, DIM)
    with Meter() as meter:
        attn(x, causal=True).sum().backward()
    assert meter.largest < 1024 * 1024 / 8


def test_bad_options_are_named():
    for options, named in (
        ({"activation": "relu"}, "activation"),
        ({"heads": 3}, "z_dim"),
        ({"chunk_size": 0}, "chunk_size"),
    ):
        with pytest.raises(CrosslightError, match=f"{named}: got"):
            make(**options)
