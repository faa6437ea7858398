"""Scans and long convolutions against loops and sums written out."""

import pytest
import torch

from crosslight.engines import recurrent
from crosslight.engines.backend import backend
from crosslight.engines.recurrent import DampedEMA
from crosslight.errors import CrosslightError

DOUBLE = torch.double


def loop(a, b, initial=None):
    h, out = torch.zeros_like(b[:, 0]) if initial is None else initial, []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 37])
@pytest.mark.parametrize("dtype", [torch.double, torch.complex128])
def test_scan_is_the_loop(n, dtype):
    """Also for coefficients that are zero, negative, above one, or broadcast."""
    a, b = 1.5 * torch.randn(1, n, 3, 1, dtype=dtype), torch.randn(2, n, 3, 4, dtype=dtype)
    a[:, ::3] = 0
    h = torch.randn(2, 3, 4, dtype=dtype)
    assert torch.allclose(recurrent.scan(a, b), loop(a, b))
    assert torch.allclose(recurrent.scan(a, b, initial=h), loop(a, b, h))
    assert torch.allclose(recurrent.scan(a.movedim(1, 2), b.movedim(1, 2), dim=2), loop(a, b).movedim(1, 2))
    with backend("reference"):
        assert torch.allclose(recurrent.scan(a, b, initial=h), loop(a, b, h))


@pytest.mark.parametrize("dtype", [torch.double, torch.complex128])
def test_scan_gradients(dtype):
    a, b = torch.randn(1, 6, 2, 1, dtype=dtype), torch.randn(2, 6, 2, 3, dtype=dtype)
    given = [t.requires_grad_() for t in (a, b, torch.randn(2, 2, 3, dtype=dtype))]

    def scanned(a, b, h):
        return recurrent.scan(a, b, initial=h)

    assert torch.autograd.gradcheck(scanned, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(scanned, given, fast_mode=True)


def test_scan_in_half_precision_sums_in_float32():
    ones = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    assert recurrent.scan(ones, ones)[0, -1].item() == 1000  # bfloat16 alone stops at 256


def test_scan_names_bad_input():
    with pytest.raises(CrosslightError, match=r"scan\(a\)"):
        recurrent.scan(torch.ones(1, 4, 2), torch.ones(1, 5, 2))


def test_scan_compiles():
    a, b = (torch.randn(2, 13, 3, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    compiled = torch.compile(recurrent.scan, fullgraph=True, backend="aot_eager")
    results = [(y, torch.autograd.grad(y.sin().sum(), (a, b))) for y in (recurrent.scan(a, b), compiled(a, b))]
    assert torch.allclose(results[0][0], results[1][0])
    assert all(torch.allclose(x, y) for x, y in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("n", [1, 2, 9, 64])
@pytest.mark.parametrize("taps", [1, 5, 80])
@pytest.mark.parametrize("sides", [1, 2])
def test_fft_conv_is_the_sum(n, taps, sides):
    x, kernel, ahead = torch.randn(2, 3, n, dtype=DOUBLE), *torch.randn(2, 3, taps, dtype=DOUBLE)
    expected = torch.zeros_like(x)
    for t in range(n):
        for s in range(n):
            if 0 <= t - s < taps:
                expected[..., t] += kernel[:, t - s] * x[..., s]
            elif sides == 2 and 0 < s - t <= taps:
                expected[..., t] += ahead[:, s - t - 1] * x[..., s]
    given = (x, kernel, ahead if sides == 2 else None)
    assert torch.allclose(recurrent.fft_conv(*given), expected, atol=1e-12)
    with backend("reference"):
        assert torch.allclose(recurrent.fft_conv(*given), expected, atol=1e-12)


def test_fft_conv_gradients_and_half_precision():
    given = [torch.randn(s, dtype=DOUBLE, requires_grad=True) for s in ((2, 3, 7), (3, 7), (3, 4))]
    assert torch.autograd.gradcheck(recurrent.fft_conv, given, fast_mode=True)
    half = [t.detach().bfloat16() for t in given]
    exact = recurrent.fft_conv(*(t.double() for t in half))
    assert recurrent.fft_conv(*half).dtype == torch.bfloat16
    assert (recurrent.fft_conv(*half) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.double, torch.complex128])
def test_exponentials_are_the_powers(dtype):
    weight, decay = torch.randn(3, 4, dtype=dtype), -torch.rand(3, 4, dtype=dtype)
    for n in (1, 2, 10, 50):
        expected = torch.stack([(weight * (decay * t).exp()).sum(-1) for t in range(n)], -1)
        assert torch.allclose(recurrent.exponentials(weight, decay, n), expected)


def average(channels=3, modes=4):
    alpha, delta = torch.rand(2, channels, modes, dtype=DOUBLE)
    return DampedEMA(alpha, delta, *torch.randn(2, channels, modes, dtype=DOUBLE))


def test_ema_by_fft_is_the_recurrence():
    """Equations of Mega, token by token, then as convolution, as scan and by steps."""
    ema, x = average(), torch.randn(2, 33, 3, dtype=DOUBLE)
    s, expected = torch.zeros(2, 3, 4, dtype=DOUBLE), []
    for t in range(33):
        u = ema.beta * x[:, t, :, None]
        s = ema.alpha * u + (1 - ema.alpha * ema.delta) * s
        expected.append(torch.einsum("cm,bcm->bc", ema.eta, s))
    expected = torch.stack(expected, 1)
    assert torch.allclose(recurrent.ema(x, ema), expected, atol=1e-12)
    assert torch.allclose(ema.recur(x), expected, atol=1e-12)
    state, steps = None, []
    for t in range(33):
        y, state = ema.step(x[:, t], state)
        steps.append(y)
    assert torch.allclose(torch.stack(steps, 1), expected, atol=1e-12)


def test_ema_over_both_sides_counts_the_present_once():
    past, future, x = average(), average(), torch.randn(2, 17, 3, dtype=DOUBLE)
    later = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
    # The future's average at t + 1, one step older.
    after = DampedEMA(future.alpha, future.delta, future.beta, future.eta * future.decay).recur(later.flip(1)).flip(1)
    expected = past.recur(x) + after
    assert torch.allclose(recurrent.ema(x, past, future), expected, atol=1e-12)
    with backend("reference"):
        assert torch.allclose(recurrent.ema(x, past, future), expected, atol=1e-12)
    assert recurrent.ema(x[:, :1], past, future).shape == (2, 1, 3)


def test_undamped_ema_is_the_textbook_average():
    one, x = torch.ones(1, 1, dtype=DOUBLE), torch.randn(1, 9, 1, dtype=DOUBLE)
    y = recurrent.ema(x, DampedEMA(0.3 * one, one, one, one)).flatten()
    level = 0.0
    for t in range(9):
        level = 0.3 * x[0, t, 0] + 0.7 * level
        assert torch.isclose(y[t], level)


def test_ema_that_forgets_at_once():
    """alpha = delta = 1 leaves no memory, and no logarithm of zero in the gradients."""
    one = torch.ones(2, 1, dtype=DOUBLE)
    alpha = one.clone().requires_grad_()
    x = torch.randn(1, 9, 2, dtype=DOUBLE)
    y = recurrent.ema(x, DampedEMA(alpha, one, one, one))
    assert torch.allclose(y, x)
    assert torch.autograd.grad(y.sum(), alpha)[0].isfinite().all()


def selective(n=37, channels=3, states=4, batch=2):
    """x, delta, A, B, C and the state before the first token."""
    x, delta = torch.randn(batch, n, channels, dtype=DOUBLE), torch.rand(batch, n, channels, dtype=DOUBLE)
    A, (B, C) = -torch.rand(channels, states, dtype=DOUBLE), torch.randn(2, batch, n, states, dtype=DOUBLE)
    return x, delta, A, B, C, torch.randn(batch, channels, states, dtype=DOUBLE)


def selective_loop(x, delta, A, B, C, h):
    out = []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + torch.einsum("bc,bs,bc->bcs", delta[:, t], B[:, t], x[:, t])
        out.append(torch.einsum("bs,bcs->bc", C[:, t], h))
    return torch.stack(out, 1), h


@pytest.mark.parametrize("batch", [2, 5])  # fewer and more sequences than channels: other layouts in memory
@pytest.mark.parametrize("n", [1, 2, 16, 37])
def test_selective_scan_is_the_loop(n, batch, monkeypatch):
    given = selective(n, batch=batch)
    expected = selective_loop(*given)
    for held in (1, 1 << 18):  # in chunks of 16 tokens, and all at once
        monkeypatch.setattr(recurrent, "STATES", held)
        for got, want in zip(recurrent.selective_scan(*given), expected, strict=True):
            assert torch.allclose(got, want, atol=1e-12)
    with backend("reference"):
        for got, want in zip(recurrent.selective_scan(*given), expected, strict=True):
            assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("batch", [2, 3])
def test_selective_scan_gradients(batch, monkeypatch):
    monkeypatch.setattr(recurrent, "STATES", 1)
    given = [t.requires_grad_() for t in selective(21, 2, 3, batch)]
    assert torch.autograd.gradcheck(recurrent.selective_scan, given, fast_mode=True)


def test_selective_scan_by_steps():
    x, delta, A, B, C, h = selective(9)
    expected, parts = recurrent.selective_scan(x, delta, A, B, C, h)[0], []
    for t in range(9):
        now = slice(t, t + 1)
        y, h = recurrent.selective_scan(x[:, now], delta[:, now], A, B[:, now], C[:, now], h)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-12)


def test_selective_weights_are_its_matrix():
    x, delta, A, B, C, _ = selective(19)
    read = recurrent.selective_weights(delta, A, B, C) @ x.transpose(1, 2).unsqueeze(-1)
    assert torch.allclose(read.squeeze(-1).transpose(1, 2), recurrent.selective_scan(x, delta, A, B, C)[0], atol=1e-12)


def test_selective_scan_keeps_no_states():
    """n * channels * states elements at no time, forwards or backwards."""
    from crosslight.testing.flops import Meter

    given = [t.float().requires_grad_() for t in selective(2048, 32, 16, 1)]
    with Meter() as meter:
        recurrent.selective_scan(*given)[0].sum().backward()
    assert meter.largest <= 2048 * 32 * 16 / 4


def test_selective_scan_is_mambas():
    """The slow path of transformers' Mamba, with its own weights around the scan."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(hidden_size=8, state_size=4, time_step_rank=2, num_hidden_layers=1)
    theirs, u = MambaMixer(config, layer_idx=0).double(), torch.randn(2, 11, 8, dtype=DOUBLE)
    with torch.no_grad():
        expected = theirs(u)
        x, z = theirs.in_proj(u).chunk(2, -1)
        x = torch.nn.functional.silu(theirs.conv1d(x.transpose(1, 2))[..., :11]).transpose(1, 2)
        step, B, C = theirs.x_proj(x).split([2, 4, 4], -1)
        delta = torch.nn.functional.softplus(theirs.dt_proj(step))
        y = recurrent.selective_scan(x, delta, -theirs.A_log.exp(), B, C)[0] + theirs.D * x
        ours = theirs.out_proj(y * torch.nn.functional.silu(z))
    assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(5, 7), (1, 9), (8, 1)])
def test_fft_conv2d_is_the_padded_convolution(grid):
    x = torch.randn(2, 3, *grid, dtype=DOUBLE)
    for taps, centre in ((grid, (0, 0)), ((2 * grid[0] - 1, 3), (grid[0] - 1, 1))):
        kernel = torch.randn(3, *taps, dtype=DOUBLE)
        (down, right), (up, left) = (c for c in centre), (t - 1 - c for t, c in zip(taps, centre, strict=True))
        padded = torch.nn.functional.pad(x, (left, right, up, down))
        expected = torch.nn.functional.conv2d(padded, kernel.flip(-1, -2).unsqueeze(1), groups=3)
        assert torch.allclose(recurrent.fft_conv2d(x, kernel, centre), expected, atol=1e-12)
        with backend("reference"):
            assert torch.allclose(recurrent.fft_conv2d(x, kernel, centre), expected, atol=1e-12)
