"""The linear engine: every form against a recurrence token by token, gradients, stability, memory."""

import pytest
import torch

from crosslight.engines import linear
from crosslight.engines.backend import backend
from crosslight.errors import CrosslightError
from crosslight.testing.flops import Meter

FORMS = ["none", "head", "token", "channel"]
BATCH, HEADS, D, DV = 2, 4, 3, 5


def decay(form, n, strength=1.0, dtype=torch.double):
    shape = {"head": (HEADS,), "token": (BATCH, HEADS, n), "channel": (BATCH, HEADS, n, D)}
    return None if form == "none" else -strength * torch.rand(shape[form], dtype=dtype)


def qkv(n, m=None, kv_heads=HEADS, dtype=torch.double):
    m = n if m is None else m
    q, k = torch.rand(BATCH, HEADS, n, D, dtype=dtype), torch.rand(BATCH, kv_heads, m, D, dtype=dtype)
    return q, k, torch.randn(BATCH, kv_heads, m, DV, dtype=dtype)


def recurrence(q, k, v, g=None, normalise=False):
    """S <- exp(g) S + k^T v, out = q S / q z, written as the papers do."""
    S, z, outs = torch.zeros(BATCH, HEADS, D, DV, dtype=q.dtype), torch.zeros(BATCH, HEADS, D, dtype=q.dtype), []
    for t in range(q.shape[2]):
        fade = torch.ones(BATCH, HEADS, D, dtype=q.dtype)
        if g is not None:
            at = {1: (None, slice(None), None), 3: (..., t, None), 4: (..., t, slice(None))}[g.dim()]
            fade = g[at].exp()
        S = fade[..., None] * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = fade * z + k[:, :, t]
        out = torch.einsum("bhd,bhde->bhe", q[:, :, t], S)
        outs.append(out / (q[:, :, t] * z).sum(-1, keepdim=True) if normalise else out)
    return torch.stack(outs, 2)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks in a segment and several segments, also at short lengths."""
    monkeypatch.setattr(linear, "CHUNK", 8)
    monkeypatch.setattr(linear, "SEGMENT", BATCH * HEADS * 16 * DV)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalise", [False, True])
def test_causal_is_the_recurrence(form, normalise, small_chunks):
    for n in (1, 7, 8, 45):
        (q, k, v), g = qkv(n), decay(form, n)
        out = linear.attend(q, k, v, causal=True, log_decay=g, normalise=normalise)
        assert torch.allclose(out, recurrence(q, k, v, g, normalise), atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_weights_stand_for_the_output(form):
    for n in (1, 70):
        (q, k, v), g = qkv(n), decay(form, n)
        for normalise in (False, True):
            a = linear.weights(q, k, causal=True, log_decay=g, normalise=normalise)
            assert torch.equal(a, a.tril())
            assert torch.allclose(a @ v, recurrence(q, k, v, g, normalise), atol=1e-12)
            if normalise:
                assert torch.allclose(a.sum(-1), torch.ones((), dtype=a.dtype))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_matrix(form, small_chunks):
    (q, k, v), g, keep = qkv(45), decay(form, 45), torch.rand(BATCH, 45) < 0.7
    given = [t.requires_grad_() for t in (q, k, v, g) if t is not None]
    toward = torch.randn(BATCH, HEADS, 45, DV, dtype=torch.double)
    grads = []
    for name in ("auto", "reference"):
        with backend(name):
            out = linear.attend(q, k, v, causal=True, keep=keep, log_decay=g, normalise=True)
            grads.append(torch.autograd.grad(out, given, toward))
    for fast, slow in zip(*grads, strict=True):
        assert torch.allclose(fast, slow, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 4)
    monkeypatch.setattr(linear, "SEGMENT", BATCH * HEADS * 4 * DV)
    (q, k, v), g = qkv(10), decay(form, 10)
    given = [t.requires_grad_() for t in (q, k, v, g) if t is not None]

    def causal(q, k, v, g=None):
        return linear.attend(q, k, v, causal=True, log_decay=g)

    assert torch.autograd.gradcheck(causal, given, fast_mode=True)


def test_second_derivatives_of_the_fast_path_are_refused():
    q, k, v = (t.requires_grad_() for t in qkv(9))
    (grad,) = torch.autograd.grad(linear.attend(q, k, v, causal=True).pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("form", ["none", "head"])
def test_bidirectional_and_cross(form):
    q, k, v = qkv(9, 9 if form == "head" else 13)
    keep, g = torch.rand(BATCH, k.shape[2]) < 0.6, decay(form, 9)
    i, j = torch.arange(9)[:, None], torch.arange(k.shape[2])
    a = torch.einsum("bhid,bhjd->bhij", q, k) * keep[:, None, None]
    if g is not None:
        a = a * ((i - j).abs() * g[:, None, None]).exp()
    plain = linear.attend(q, k, v, keep=keep, log_decay=g)
    assert torch.allclose(plain, a @ v, atol=1e-12)
    normal = linear.attend(q, k, v, keep=keep, log_decay=g, normalise=True)
    assert torch.allclose(normal, a @ v / a.sum(-1, keepdim=True), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_read_is_zero(causal):
    q, k, v = (t.requires_grad_() for t in qkv(9))
    keep = torch.arange(9) >= torch.tensor([[9], [4]])
    out = linear.attend(q, k, v, causal=causal, keep=keep, normalise=True)
    assert not out[0].any()
    assert causal != bool(out[1, :, :4].any())
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("form", FORMS)
def test_shared_heads_are_repeated_heads(form):
    q, k, v = qkv(20, kv_heads=2)
    full = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    g = decay(form, 20)
    assert torch.equal(
        linear.attend(q, k, v, causal=True, log_decay=g), linear.attend(q, *full, causal=True, log_decay=g)
    )
    assert torch.allclose(linear.attend(q, k, v), linear.attend(q, *full))


@pytest.mark.parametrize("form", ["head", "token", "channel"])
def test_strong_decay_neither_overflows_nor_loses(form):
    """exp(-i g) alone would overflow here: the decay over one chunk is some e^-1600."""
    (q, k, v), g = qkv(200), decay(form, 200, strength=100)
    g[..., ::2] *= 1e-4
    exact = recurrence(q, k, v, g)
    given = [t.float().requires_grad_() for t in (q, k, v, g)]
    out = linear.attend(*given[:3], causal=True, log_decay=given[3])
    # Sums of decays in the thousands have a rounding error of some 1e-4 in float32.
    assert torch.allclose(out.double(), exact, atol=2e-3)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), given))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalise", [False, True])
def test_steps_are_the_causal_pass(form, normalise):
    (q, k, v), g = qkv(12, kv_heads=2), decay(form, 12)
    state, outs, sizes = None, [], set()
    for t in range(12):
        now = slice(t, t + 1)
        here = g if g is None or g.dim() == 1 else g[:, :, now]
        out, state = linear.step(q[:, :, now], k[:, :, now], v[:, :, now], state, log_decay=here, normalise=normalise)
        outs.append(out)
        sizes.add(state.nbytes)
    full = linear.attend(q, k, v, causal=True, log_decay=g, normalise=normalise)
    assert torch.allclose(torch.cat(outs, 2), full, atol=1e-12)
    assert len(sizes) == 1
    assert state.length == 12


def test_half_precision_keeps_its_state_in_float32():
    q, k, v = qkv(300, dtype=torch.bfloat16)
    exact = recurrence(q.double(), k.double(), v.double())
    out = linear.attend(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 0.01 * exact.norm()
    assert linear.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], None)[1].S.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_linear(form):
    """No tensor of n x n elements, and what is kept for the backward pass is the input and a state a segment."""
    n, d = 2048, 16
    q, k, v = (torch.randn(1, 2, n, d, requires_grad=True) for _ in range(3))
    shape = {"head": (2,), "token": (1, 2, n), "channel": (1, 2, n, d)}
    g = None if form == "none" else (-torch.rand(shape[form])).requires_grad_()
    kept = []
    with Meter() as meter, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear.attend(q, k, v, causal=True, log_decay=g).sum().backward()
    assert meter.largest < n * n / 4
    assert sum(t.numel() for t in kept) <= 5 * n * 2 * d


def test_compiles(small_chunks):
    (q, k, v), g = qkv(20), decay("head", 20)
    given = [t.requires_grad_() for t in (q, k, v, g) if t is not None]

    def causal(q, k, v, g=None):
        return linear.attend(q, k, v, causal=True, log_decay=g, normalise=True)

    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager")
    results = [(y, torch.autograd.grad(y.sin().sum(), given)) for y in (causal(*given), compiled(*given))]
    assert torch.allclose(results[0][0], results[1][0])
    for eager, graph in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(eager, graph)


def test_bad_input_is_named():
    q, k, v = qkv(6, 9)
    with pytest.raises(CrosslightError, match="k: got 9 tokens"):
        linear.attend(q, k, v, causal=True)
    with pytest.raises(CrosslightError, match="log_decay"):
        linear.attend(q, k[:, :, :6], v[:, :, :6], log_decay=torch.zeros(BATCH, HEADS, 6))
    with pytest.raises(CrosslightError, match="backend"), backend("sdpa"):
        linear.attend(q, k, v)


def test_autocast_keeps_the_state_in_float32():
    q, k, v = (t.requires_grad_() for t in qkv(20, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear.attend(q, k, v, causal=True)
        state = None
        for t in range(3):
            _, state = linear.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
    assert state.S.dtype == torch.float32
    exact = recurrence(q, k, v)
    assert (out - exact).norm() < 0.01 * exact.norm()
    grads = [torch.autograd.grad(y.sum(), (q, k, v)) for y in (out, exact)]
    assert all((a - b).norm() < 0.02 * b.norm() for a, b in zip(*grads, strict=True))
