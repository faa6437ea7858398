"""Recurrent memory with chunks: the paths and the bank written out, the queue, and what each path may read."""

import math

import pytest
import torch

import crosslight
from crosslight.engines.positions import Rotary
from crosslight.errors import CrosslightError

DIM, HEADS, D = 8, 2, 4


def make(**options):
    options = {"segment": 6, "chunk": 3, "slots": 3, **options}
    attn = crosslight.create("recurrent-memory-chunked", dim=DIM, heads=HEADS, **options).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return attn


def stream(n, batch=1):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def attention(path, query, at, keys, places, head):
    """One query vector of one head over key vectors, with RoPE where the path has it."""

    def part(linear, x, place, turned=True):
        t = linear(x)[head * D : (head + 1) * D]
        return Rotary(D).rotate(t.view(1, 1, 1, D), offset=place).view(D) if path.rope and turned else t

    q = part(path.q, query, at)
    scores = torch.stack([q @ part(path.k, key, p) for key, p in zip(keys, places, strict=True)]) / math.sqrt(D)
    values = torch.stack([part(path.v, key, 0, turned=False) for key in keys])
    return scores.softmax(0) @ values


def written_out(attn, x, causal):
    n, outs, bank = x.shape[0], [], []
    for i in range(n):
        if i and i % 6 == 0:
            for c in range(i - 6, i, 3):
                part = x[c : c + 3]
                u = attn.write(part.mean(0) if attn.pool == "mean" else part[-1])
                old = bank.pop(0) if len(bank) == 3 else torch.zeros(DIM, dtype=torch.double)
                g = torch.sigmoid(attn.write_gate(torch.cat([u, old])))
                bank.append(g * u + (1 - g) * old)
        heads = []
        for h in range(HEADS):
            parts, seen = [], []
            for path, size in ((attn.full, 6), (attn.near, 3)):
                s = i - i % size
                places = range(s, i + 1 if causal else min(s + size, n))
                parts.append(attention(path, x[i], i, [x[j] for j in places], places, h))
                seen.append(attn.share[len(seen), h] if attn.share is not None else None)
            if bank:
                parts.append(attention(attn.memory, x[i], 0, bank, [0] * len(bank), h))
                seen.append(attn.share[2, h] if attn.share is not None else None)
            g = torch.stack(seen).softmax(0) if attn.share is not None else torch.ones(len(parts))
            heads.append(sum(a * b for a, b in zip(g, parts, strict=True)))
        outs.append(attn.out(torch.cat(heads)))
    return torch.stack(outs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("merge", "pool"), [("gate", "mean"), ("sum", "last")])
def test_equations(causal, merge, pool):
    attn, x = make(merge=merge, pool=pool), stream(20)
    assert torch.allclose(attn(x, causal=causal)[0], written_out(attn, x[0], causal), atol=1e-12)


def test_without_memory_and_chunks_it_is_rotary_attention():
    plain = crosslight.create("softmax", dim=DIM, heads=HEADS, bias=False, position="rope").double()
    attn, x = make(slots=0, chunk=None, segment=32), stream(17, 2)
    state = {name.replace("full.", ""): p for name, p in attn.state_dict().items() if name != "share"}
    plain.load_state_dict(state)
    assert torch.allclose(attn(x, causal=True), plain(x, causal=True), atol=1e-12)


def test_chunk_path_does_not_cross_its_chunk():
    attn, x = make(slots=0), stream(12)
    near = attn.weights(x)[0, HEADS:]
    for i in range(12):
        for j in range(12):
            assert bool((near[:, i, j] > 0).all()) == (i // 3 == j // 3)
    torch.nn.init.zeros_(attn.full.v.weight)
    x.requires_grad_()
    grad = torch.autograd.grad(attn(x)[:, 4].sum(), x)[0].abs().sum((0, 2))
    assert (grad > 0).tolist() == [3 <= j < 6 for j in range(12)]


def gate_at(attn, bias):
    torch.nn.init.zeros_(attn.write_gate.weight)
    torch.nn.init.constant_(attn.write_gate.bias, bias)


def test_open_gate_is_a_queue_of_bounded_size():
    attn = make(slots=3)
    gate_at(attn, 1000.0)
    bank, wrote = stream(0), []
    for segment in stream(30).split(6, 1):
        pooled = attn.pooled(segment)[:, 0]
        wrote += list(attn.write(pooled)[0])
        bank = attn.update(bank, pooled)
        assert bank.shape[1] == min(len(wrote), 3)
        assert torch.allclose(bank[0], torch.stack(wrote[-3:]), atol=1e-12)


def test_closed_gate_keeps_the_content():
    attn = make(slots=4)
    gate_at(attn, -1000.0)
    bank = stream(4)
    after = attn.update(bank, attn.pooled(stream(6))[:, 0])
    assert torch.equal(after, bank.roll(-2, 1))  # the same slots, in turn


def test_a_pair_of_the_first_segment_reaches_the_fourth_by_memory_only():
    x = stream(24).requires_grad_()
    for slots, reaches in ((8, True), (0, False)):
        attn = make(slots=slots)
        grad = torch.autograd.grad(attn(x, causal=True)[:, 20].sum(), x)[0][:, :6].abs().sum()
        assert bool(grad > 0) == reaches
    grad = torch.autograd.grad(make(slots=8, detach=True)(x, causal=True)[:, 20].sum(), x)[0]
    assert not grad[:, :18].any()
    assert grad[:, 18:21].any()


def test_padding_writes_nothing():
    attn = make(pool="last")
    x, keep = stream(14, 2), torch.ones(2, 14, dtype=torch.bool)
    keep[0, 2] = keep[0, 5] = False  # the last of each chunk
    bank = attn.write(attn.pooled(x, keep))
    assert torch.allclose(bank[0, 0], attn.write(x[0, [1, 4]]))
    assert torch.allclose(attn.pooled(x, keep)[1], attn.pooled(x)[1])


def test_bad_options_are_named():
    for options, named in (({"chunk": 4}, "chunk"), ({"slots": 1}, "slots"), ({"merge": "max"}, "merge")):
        with pytest.raises(CrosslightError, match=f"{named}: got"):
            make(**options)
