"""Titans: the memory's recurrence with gradients by autograd, the delta rule, and each form of attention around it."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention import titans
from crosslight.attention.titans import FORMS
from crosslight.errors import CrosslightError

DIM, HEADS, D = 8, 2, 4


def make(**options):
    options = {"heads": HEADS, "segment": 6, "chunk": 3, "persistent": 2, **options}
    attn = crosslight.create("titans", dim=DIM, **options).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    torch.nn.init.normal_(attn.memory.gates.weight, std=0.2)
    torch.nn.init.constant_(attn.memory.gates.bias, -2.0)  # larger steps diverge
    return attn


def stream(n, batch=1):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def rms(y):
    return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def mlp(weights, z):
    for i, w in enumerate(weights):
        z = F.silu(z @ w) if i + 1 < len(weights) else z @ w
    return z


class Loop:
    """The memory of one stream, token by token; the loss's gradient by autograd at the head of each chunk."""

    def __init__(self, memory):
        self.memory, self.t, self.inputs = memory, 0, []
        self.M = [[w[h] for w in memory.start] for h in range(HEADS)]
        self.S = [[torch.zeros_like(w) for w in M] for M in self.M]
        self.head = self.M

    def project(self, x):
        self.inputs.append(self.memory.qkv(x))
        taps = self.memory.conv.weight[:, 0]
        seen = [torch.zeros_like(self.inputs[0])] * taps.shape[1] + self.inputs
        y = sum(w * u for w, u in zip(taps.T, seen[-taps.shape[1] :], strict=True)) + self.memory.conv.bias
        q, k, v = F.silu(y).view(3, HEADS, D)
        return q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v

    def __call__(self, x):
        if self.t % self.memory.chunk == 0:
            self.head = self.M
        self.t += 1
        q, k, v = self.project(x)
        alpha, eta, theta = torch.sigmoid(self.memory.gates(x)).view(3, HEADS)
        outs, M, S = [], [], []
        for h in range(HEADS):
            at = [w.detach().requires_grad_() for w in self.head[h]]
            grads = torch.autograd.grad((mlp(at, k[h].detach()) - v[h].detach()).pow(2).sum(), at)
            S.append([eta[h] * s - theta[h] * g for s, g in zip(self.S[h], grads, strict=True)])
            M.append([(1 - alpha[h]) * w + s for w, s in zip(self.M[h], S[h], strict=True)])
            outs.append(rms(mlp(M[h], q[h])))
        self.M, self.S = M, S
        return self.memory.out(torch.cat(outs) * F.silu(self.memory.gate(x)))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_are_the_loop_with_gradients_at_their_head(depth, chunk):
    attn, x = make(form="lmm", depth=depth, chunk=chunk), stream(10)
    loop = Loop(attn.memory)
    expected = torch.stack([loop(token) for token in x[0]])
    assert torch.allclose(attn(x, causal=True)[0], expected, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 3])
def test_gradients_through_groups_and_chunks(depth, monkeypatch):
    monkeypatch.setattr(titans, "GROUP", 6)
    memory, x = make(form="lmm", depth=depth).memory, stream(14).requires_grad_()
    inputs = (x, memory.start[0], memory.gates.bias)
    assert torch.autograd.gradcheck(lambda x, *_: memory.run(x)[0], inputs, fast_mode=True)


def test_only_weights_leave_a_trace(monkeypatch):
    attn, x = make(form="lmm"), stream(10)
    weights, expected = attn.weights(x, causal=True), attn(x, causal=True)
    assert torch.allclose(attn.read(weights, x, causal=True), expected, atol=1e-10)
    monkeypatch.setattr(type(attn.memory), "trace", None)
    assert torch.equal(attn(x, causal=True), expected)
    with pytest.raises(TypeError):
        attn.weights(x, causal=True)


def test_linear_memory_without_momentum_is_the_gated_delta_rule():
    attn, x = make(form="lmm", depth=1, chunk=1), stream(7)
    memory = attn.memory
    with torch.no_grad():
        memory.gates.weight[HEADS : 2 * HEADS] = 0
        memory.gates.bias[HEADS : 2 * HEADS] = -1000
    y, state = memory.run(x)
    (q, k, v), _ = memory.project(x, None, x.new_zeros(1, 3, 3 * DIM))
    alpha, _, theta = torch.sigmoid(memory.gates(x)).transpose(1, 2).chunk(3, 1)
    for h in range(HEADS):
        M = memory.start[0][h].T  # M k instead of k W
        for t in range(7):
            error = v[0, h, t] - M @ k[0, h, t]
            M = (1 - alpha[0, h, t]) * M + theta[0, h, t] * 2 * torch.outer(error, k[0, h, t])
            assert torch.allclose(y[0, h, t], M @ q[0, h, t], atol=1e-12)
        assert torch.allclose(state.M[0][0, h], M.T, atol=1e-12)


def test_open_forget_gate_forgets_everything():
    """What is left is the step of the last token, from the head of its chunk."""
    attn, x = make(form="lmm", kernel=2, depth=1), stream(9)
    with torch.no_grad():
        attn.memory.gates.weight[: 2 * HEADS] = 0
        attn.memory.gates.bias[:HEADS], attn.memory.gates.bias[HEADS : 2 * HEADS] = 1000, -1000
    changed = x.clone()
    changed[:, 6] = stream(1)[:, 0]  # in the chunk of the last token, but not in its convolution
    y, other = (attn.memory.run(s)[0] for s in (x, changed))
    assert torch.allclose(y[:, :, 8], other[:, :, 8], atol=1e-12)
    assert not torch.allclose(y[:, :, 7], other[:, :, 7])
    with torch.no_grad():
        attn.memory.gates.weight.zero_()
        attn.memory.gates.bias[2 * HEADS :] = -1000
    assert not attn.memory.run(x)[0].any()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_its_weights_and_decodes(form):
    attn, x = make(form=form), stream(20, 2)
    expected, sizes = attn(x, causal=True), []
    weights = attn.weights(x, causal=True)
    assert not weights.triu(1).any()
    assert torch.allclose(attn.read(weights, x, causal=True), expected, atol=1e-10)
    keep = torch.arange(20) < torch.tensor([[13], [20]])
    masked = attn(x, causal=True, mask=keep)
    assert torch.allclose(masked[0, :13], expected[0, :13], atol=1e-10)
    assert torch.allclose(attn.read(attn.weights(x, causal=True, mask=keep), x, causal=True, mask=keep), masked)
    cache, parts = None, []
    for t in range(20):
        y, cache = attn.step(x[:, t : t + 1], cache)
        parts.append(y)
        memory = cache.memory
        sizes.append(sum(w.numel() for part in (memory.M, memory.S, memory.head) for w in part))
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-10)
    assert len(set(sizes)) == 1


def softmax_read(attn, query, at, keys, values, head):
    """One query at a position over (vector, position or None) keys of one head."""

    def turned(linear, x, place):
        t = linear(x)[head * D : (head + 1) * D]
        return t if place is None else attn.rope.rotate(t.view(1, 1, 1, D), offset=place).view(D)

    q = turned(attn.q, query, at)
    scores = torch.stack([q @ turned(attn.k, key, place) for key, place in keys]) / D**0.5
    return scores.softmax(0) @ torch.stack([attn.v(value)[head * D : (head + 1) * D] for value in values])


def windowed(attn, x):
    s, outs = torch.cat([attn.persistent, x]), []
    for i in range(2, len(s)):
        seen = [j for j in range(i + 1) if j < 2 or j > i - 6]
        keys, values = [(s[j], j) for j in seen], [s[j] for j in seen]
        outs.append(attn.out(torch.cat([softmax_read(attn, s[i], i, keys, values, h) for h in range(HEADS)])))
    return torch.stack(outs)


def gate(attn, a, b):
    return rms(a) * attn.scale[0] * torch.sigmoid(rms(b) * attn.scale[1])


def test_memory_as_gate_and_as_layer():
    x = stream(13)
    attn = make(form="mag")
    loop = Loop(attn.memory)
    memory = torch.stack([loop(token) for token in x[0]])
    assert torch.allclose(attn(x, causal=True)[0], gate(attn, windowed(attn, x[0]), memory), atol=1e-10)
    attn = make(form="mal")
    loop = Loop(attn.memory)
    memory = torch.stack([loop(token) for token in x[0]])
    assert torch.allclose(attn(x, causal=True)[0], windowed(attn, memory), atol=1e-10)


def test_memory_as_context():
    attn, x = make(), stream(15)
    loop, asks, outs = Loop(attn.memory), Loop(attn.memory), []
    for i, token in enumerate(x[0]):
        if i % 6 == 0:
            M, told, rows = loop.M, [], []
        told.append(torch.cat([mlp(M[h], q) for h, q in enumerate(asks.project(token)[0])]))
        rows.append(token)
        places = range(i - i % 6, i + 1)
        keys = [(p, None) for p in attn.persistent] + list(zip(told + rows, [*places, *places], strict=True))
        values = [*attn.persistent, *told, *rows]
        y = attn.out(torch.cat([softmax_read(attn, token, i, keys, values, h) for h in range(HEADS)]))
        outs.append(gate(attn, y, loop(y)))
    assert torch.allclose(attn(x, causal=True)[0], torch.stack(outs), atol=1e-10)


def test_memory_reaches_further_than_the_window():
    x = stream(20).requires_grad_()
    for form in ("mac", "mag"):
        grad = torch.autograd.grad(make(form=form)(x, causal=True)[:, 19].sum(), x)[0]
        assert grad[:, 0].any()


@pytest.mark.parametrize("form", FORMS)
def test_work_is_linear(form):
    from crosslight.testing import flops

    attn = make(form=form, segment=32, chunk=32).float()
    work = [flops.measure(lambda n=n: attn(torch.randn(1, n, DIM), causal=True)) for n in (256, 1024)]
    assert flops.growth(work[0].flops, work[1].flops, 4) < 1.15


def test_bad_options_are_named():
    for options, named in (({"form": "max"}, "form"), ({"segment": 7}, "segment"), ({"heads": 3}, "dim")):
        with pytest.raises(CrosslightError, match=f"{named}: got"):
            make(**options)
