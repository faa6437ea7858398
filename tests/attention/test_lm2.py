"""LM2: the read and write equations slot by slot, the gates at their ends, and segments."""

import math

import pytest
import torch

import crosslight
from crosslight.errors import CrosslightError

DIM = 8


def make(**options):
    attn = crosslight.create("lm2", dim=DIM, **{"heads": 2, "segment": 4, "slots": 5, **options}).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return attn


def stream(n, batch=1):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def fix(linear, bias):
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.constant_(linear.bias, bias)


def plain(attn, **options):
    layer = crosslight.create("softmax", dim=DIM, heads=2, bias=False, position="rope", **options).double()
    layer.load_state_dict({name: p for name, p in attn.state_dict().items() if not name.startswith("memory")})
    return layer


def one_read(memory, token, bank, top_k):
    scores = [(memory.q(token) @ memory.k(slot)).item() / math.sqrt(DIM) for slot in bank]
    seen = sorted(range(len(bank)), key=lambda i: -scores[i])[:top_k]
    total = sum(math.exp(scores[i]) for i in seen)
    found = sum(math.exp(scores[i]) / total * memory.v(bank[i]) for i in seen)
    return torch.sigmoid(memory.gate_out(found)) * found


def one_write(memory, tokens, bank):
    after, everything = [], [*bank, *tokens]
    for slot in bank:
        scores = torch.stack([memory.ask(slot) @ memory.k(t) for t in everything]) / math.sqrt(DIM)
        candidate = scores.softmax(0) @ torch.stack([memory.v(t) for t in everything])
        g_in = torch.sigmoid(memory.gate_in(sum(tokens) / len(tokens)))
        after.append(g_in * torch.tanh(candidate) + torch.sigmoid(memory.gate_forget(candidate)) * slot)
    return after


@pytest.mark.parametrize("top_k", [None, 2])
def test_equations(top_k):
    attn, x = make(top_k=top_k), stream(11)
    expected, bank = [], list(torch.eye(5, DIM, dtype=torch.double))
    for start in (0, 4, 8):
        tokens = list(x[0, start : start + 4])
        expected += [one_read(attn.memory, token, bank, top_k or 5) for token in tokens]
        bank = one_write(attn.memory, tokens, bank)
    memory = attn(x, causal=True) - plain(attn)(x, causal=True)
    assert torch.allclose(memory[0], torch.stack(expected), atol=1e-12)


def test_shut_output_gate_is_the_vanilla_decoder():
    attn, x, z = make(kv_heads=1), stream(11, 2), stream(7, 2)
    fix(attn.memory.gate_out, -1000.0)
    vanilla = plain(attn, kv_heads=1)
    assert torch.equal(attn(x, causal=True), vanilla(x, causal=True))
    assert torch.equal(attn(x, z), vanilla(x, z))


def test_shut_input_and_open_forget_gate_leave_the_bank():
    attn = make()
    fix(attn.memory.gate_in, -1000.0)
    fix(attn.memory.gate_forget, 1000.0)
    bank = stream(5, 2)
    for _ in range(6):  # of the same shape after any number of segments
        after = attn.memory.write(stream(4, 2), bank)
        assert torch.equal(after, bank)


def test_reads_sum_to_one():
    """With values of one and an open gate, what is read is one."""
    attn = make()
    torch.nn.init.zeros_(attn.memory.v.weight)
    bank = stream(5)
    bank[..., 0] = 1
    with torch.no_grad():
        attn.memory.v.weight[:, 0] = 1
    fix(attn.memory.gate_out, 1000.0)
    assert torch.allclose(attn.memory.read(stream(4), bank), torch.ones(1, 4, DIM, dtype=torch.double))


@pytest.mark.parametrize("slots", [5, 0])
def test_facts_of_the_first_segment_reach_the_fourth_by_memory_only(slots):
    attn, x = make(local=True, slots=slots), stream(16).requires_grad_()
    grad = torch.autograd.grad(attn(x, causal=True)[:, 13].sum(), x)[0].abs().sum(2)[0]
    assert bool(grad[:4].any()) == bool(slots)
    assert grad[12:14].all()
    assert not grad[14:].any()


@pytest.mark.parametrize("position", ["rope", "relative"])
@pytest.mark.parametrize("cross", [False, True])
def test_local_decoding_forgets_the_segment_before(cross, position):
    attn, x, z = make(local=True, position=position), stream(11), stream(3) if cross else None
    cache, parts = None, []
    for t in range(11):
        y, cache = attn.step(x[:, t : t + 1], cache, context=z if t == 0 else None)
        parts.append(y)
        if not cross:
            assert cache.attention.state.length == t % 4 + 1
    assert torch.allclose(torch.cat(parts, 1), attn(x, z, causal=True), atol=1e-12)


def test_padding_is_not_written():
    attn, x = make(), stream(4, 2)
    keep, bank = torch.tensor([[True, True, False, True], [True] * 4]), stream(5, 2)
    shorter = attn.memory.write(x[:1, [0, 1, 3]], bank[:1])
    assert torch.allclose(attn.memory.write(x, bank, keep)[:1], shorter, atol=1e-12)


def test_local_attention_costs_linear_work():
    from crosslight.testing import flops

    attn = make(local=True).float()
    work = [flops.measure(lambda n=n: attn(torch.randn(1, n, DIM), causal=True)) for n in (256, 1024)]
    assert flops.growth(work[0].flops, work[1].flops, 4) < 1.15
    assert work[1].largest < 1024**2


def test_bad_options_are_named():
    for options, named in (({"top_k": 6}, "top_k"), ({"segment": 0}, "segment"), ({"slots": -1}, "slots")):
        with pytest.raises(CrosslightError, match=f"{named}: got"):
            make(**options)
