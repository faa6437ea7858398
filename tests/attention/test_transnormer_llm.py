"""TransNormerLLM: the matrix with cosines, what it shares with lightning attention, long inputs and small states."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.transnormer_llm import LRPE, TransNormerLLM

DIM, HEADS, D = 12, 3, 4


def make(id="transnormer-llm", **options):
    return crosslight.create(id, **{"dim": DIM, "heads": HEADS, **options}).double()


def test_first_layer_is_its_equations():
    """Head by head and pair by pair, with the norm and the gate."""
    n, attn = 9, make(layers=4)
    x, y = torch.randn(n, DIM, dtype=torch.double), torch.zeros(n, DIM, dtype=torch.double)
    q, k = F.silu(attn.q(x)), F.silu(attn.k(x))
    v = attn.v(x)
    for t in range(n):
        for s in range(t + 1):
            for h in range(HEADS):
                a = sum(
                    q[t, c] * k[s, c] * torch.cos(attn.position.theta[h, 0, c - h * D] * (t - s))
                    for c in range(h * D, h * D + D)
                )
                part = slice(h * D, h * D + D)
                y[t, part] = y[t, part].clone() + math.exp(-8 * h / HEADS) ** (t - s) * a * v[s, part]
    y = y * math.sqrt(DIM) / y.norm(dim=-1, keepdim=True) * attn.gate(x)
    assert torch.allclose(attn(x[None], causal=True)[0], attn.out(y), atol=1e-6)  # the norm has an epsilon


def test_later_layers_are_lightning_attention():
    ours, theirs = make(layer=1, layers=4), make("lightning-attention", layer=1, layers=4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 70, DIM, dtype=torch.double)
    assert torch.allclose(ours(x, causal=True), theirs(x, causal=True), atol=1e-12)


def test_decay_follows_the_layer_and_ends():
    first, middle, last = (TransNormerLLM(4, D, layer=i, layers=4) for i in (0, 1, 3))
    assert first.log_decay == [0, -2, -4, -6]
    assert middle.log_decay == [0, -1.5, -3, -4.5]
    assert last.log_decay == [0, 0, 0, 0]
    assert TransNormerLLM(4, D).log_decay == first.log_decay


def test_without_decay_it_is_plain_linear_attention():
    q, k, v = torch.randn(3, 2, HEADS, 70, D, dtype=torch.double)
    plain = (q @ k.transpose(-1, -2)).tril() @ v
    assert torch.allclose(TransNormerLLM(HEADS, D, decay=1.0)(q, k, v, causal=True), plain, atol=1e-10)


def test_rotating_products_depend_on_the_distance_only():
    lrpe = LRPE(HEADS, D).double()
    q, k = torch.randn(2, 1, HEADS, 5, D, dtype=torch.double)
    products = [lrpe.rotate(q, offset=o) @ lrpe.rotate(k, offset=o).transpose(-1, -2) for o in (0, 1000)]
    assert torch.allclose(*products, atol=1e-9)
    assert torch.allclose(products[0].diagonal(dim1=-2, dim2=-1), (q * k).sum(-1))


def test_only_the_first_layer_rotates_by_itself():
    assert isinstance(make(layer=0, layers=2).position, LRPE)
    assert make(layer=1, layers=2).position is None
    assert type(make(layer=0, layers=2, position="rope").position).__name__ == "Rotary"


@pytest.mark.parametrize(("layer", "width"), [(0, 2 * D), (1, D)])
def test_state_is_one_matrix_a_head(layer, width):
    _, cache = make(layer=layer, layers=3).step(torch.randn(1, 1, DIM, dtype=torch.double))
    assert cache.state.S.shape == (1, HEADS, width, D)


def test_nothing_overflows_at_100_000_tokens():
    core = TransNormerLLM(2, 4, layer=1, layers=3).float()
    q, k, v = torch.randn(3, 1, 2, 100_000, 4)
    out = core(q, k, v, causal=True)
    assert out.isfinite().all()
    # Head 1 forgets at exp(-8 / 2 * 2 / 3) a token: its end is that of a short sequence.
    near = core(*(t[:, :, -64:] for t in (q, k, v)), causal=True)
    assert torch.allclose(out[:, 1, -1], near[:, 1, -1], atol=1e-4)
