"""Lightning attention: the layer as its recurrence, the block form at any length, and the limits of the decay."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.lightning_attention import LightningAttention
from crosslight.errors import CrosslightError

DIM, HEADS, D = 12, 3, 4


def make(**options):
    return crosslight.create("lightning-attention", **{"dim": DIM, "heads": HEADS, **options}).double()


def heads(n):
    return [torch.randn(2, HEADS, n, D, dtype=torch.double, requires_grad=True) for _ in range(3)]


def test_layer_is_the_recurrence():
    """Every equation of the docstring, token by token."""
    attn, x = make(layer=1, layers=4), torch.randn(2, 70, DIM, dtype=torch.double)
    q, k = (F.silu(layer(x)).view(2, 70, HEADS, D) for layer in (attn.q, attn.k))
    v, state, outs = attn.v(x).view(2, 70, HEADS, D), torch.zeros(2, HEADS, D, D, dtype=torch.double), []
    for t in range(70):
        for h in range(HEADS):
            fade = math.exp(-8 * h / HEADS * (1 - 1 / 4))
            state[:, h] = fade * state[:, h].clone() + k[:, t, h, :, None] * v[:, t, h, None, :]
        o = torch.einsum("bhd,bhde->bhe", q[:, t], state).flatten(1)
        o = o * math.sqrt(DIM) / o.norm(dim=-1, keepdim=True)
        outs.append(attn.out(o * attn.gate(x[:, t])))
    assert torch.allclose(attn(x, causal=True), torch.stack(outs, 1), atol=1e-6)  # the norm has an epsilon


@pytest.mark.parametrize("n", [1, 63, 64, 150])
def test_blocks_are_the_masked_matrix_with_gradients(n):
    core, given = LightningAttention(HEADS, D, decay=[1.0, 0.9, 0.2]), heads(n)
    q, k, v = given
    i, j = torch.arange(n)[:, None], torch.arange(n)
    fade = torch.tensor([1.0, 0.9, 0.2], dtype=torch.double)[:, None, None] ** (i - j).clamp(min=0)
    expected = (q @ k.transpose(-1, -2) * (fade * (i >= j))) @ v
    out, toward = core(q, k, v, causal=True), torch.randn(2, HEADS, n, D, dtype=torch.double)
    assert torch.allclose(out, expected, atol=1e-10)
    grads = [torch.autograd.grad(y, given, toward) for y in (out, expected)]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))


def test_limits_of_the_decay():
    q, k, v = heads(80)
    plain = (q @ k.transpose(-1, -2)).tril() @ v
    assert torch.allclose(LightningAttention(HEADS, D, decay=1.0)(q, k, v, causal=True), plain, atol=1e-10)
    own = (q * k).sum(-1, keepdim=True) * v
    assert torch.allclose(LightningAttention(HEADS, D, decay=0.0)(q, k, v, causal=True), own, atol=1e-10)


def test_both_directions_share_the_present():
    core, (q, k, v) = LightningAttention(HEADS, D), heads(30)
    past = core(q, k, v, causal=True)
    future = core(q.flip(2), k.flip(2), v.flip(2), causal=True).flip(2)
    both = past + future - (q * k).sum(-1, keepdim=True) * v
    assert torch.allclose(core(q, k, v), both, atol=1e-10)


def test_a_context_has_no_order():
    attn, x, z = make(), *torch.randn(2, 2, 9, DIM, dtype=torch.double)
    assert torch.allclose(attn(x, z), attn(x, z.flip(1)), atol=1e-12)
    assert torch.allclose(attn(x, z), attn(x, z, causal=True), atol=1e-12)


def test_decay_follows_layer_and_head():
    first, last = LightningAttention(4, D, layer=0, layers=3), LightningAttention(4, D, layer=2, layers=3)
    assert first.log_decay == [0, -2, -4, -6]
    assert last.log_decay == pytest.approx([x / 3 for x in first.log_decay])


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="decay"):
        make(decay=1.5)
    with pytest.raises(CrosslightError, match="decay"):
        make(decay=[0.5])
    with pytest.raises(CrosslightError, match="layer: got 2"):
        make(layer=2, layers=2)
