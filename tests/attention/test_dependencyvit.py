"""Reversed attention: messages written out, conserved mass, plain attention read by columns, the network."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.dependencyvit import DependencyViT
from crosslight.engines import dense
from crosslight.errors import CrosslightError
from crosslight.testing import flops

DIM, HEADS, D, N, M = 12, 3, 4, 5, 7


def make(**options):
    return crosslight.create("dependencyvit", **{"dim": DIM, "heads": HEADS, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


def written_out(attn, x, z, before=None):
    """Sender by sender: what it has to say, to whom, through which head, how much of it."""
    y = torch.zeros(2, x.shape[1], HEADS, D, dtype=torch.double)
    for b in range(2):
        k = attn.k(x[b]).view(-1, HEADS, D)
        for i in range(z.shape[1]):
            q, v = attn.q(z[b, i]).view(HEADS, D), attn.v(z[b, i]).view(HEADS, D)
            p = (10 * (attn.selector.weight @ z[b, i])).softmax(0)
            first, _, last = attn.controller
            hidden = first.weight @ z[b, i] + first.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            mass = 1 / (1 + torch.exp(-(last.weight @ hidden + last.bias)))
            mass = mass if before is None else mass * before[b, i]
            for h in range(HEADS):
                share = (k[:, h] @ q[h] / D**0.5).softmax(0)
                y[b, :, h] += share[:, None] * p[h] * mass * v[h]
    return attn.out(y.flatten(2))


def test_messages_are_the_equations(x):
    attn = make()
    assert torch.allclose(attn(x), written_out(attn, x, x), atol=1e-12)
    before = torch.rand(2, N, dtype=torch.double)
    with attn.after(before):
        assert torch.allclose(attn(x), written_out(attn, x, x, before), atol=1e-12)
    attn, z = make(context_dim=10), torch.randn(2, M, 10, dtype=torch.double)
    assert torch.allclose(attn(x, z), written_out(attn, x, z), atol=1e-12)


def test_in_tiles_it_is_the_same(x, monkeypatch):
    attn = make()
    x.requires_grad_()
    whole = attn(x)
    slope = torch.autograd.grad(whole.square().sum(), x)[0]
    monkeypatch.setattr(dense, "CHUNK", 2 * HEADS * N * 2)
    tiled = attn(x)
    assert torch.allclose(tiled, whole, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(tiled.square().sum(), x)[0], slope, atol=1e-10)


def test_everything_sent_arrives(x):
    attn = make(selector=False, controller=False)
    weights = attn.weights(x)
    assert torch.allclose(weights.sum(2), torch.ones(2, HEADS, N).double())  # over receivers, for each sender
    assert not torch.allclose(weights.sum(3), torch.ones(2, HEADS, N).double(), atol=1e-3)
    sent = attn.v(x).sum(1)
    assert torch.allclose(attn(x).sum(1), sent @ attn.out.weight.T + N * attn.out.bias, atol=1e-12)


def test_transposed_it_is_plain_attention(x):
    attn = make(selector=False, controller=False)
    plain = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        plain.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        plain.out_proj.load_state_dict(attn.out.state_dict())
    expected, a = plain(x, x, x, average_attn_weights=False)
    assert torch.allclose(attn.weights(x).mT, a, atol=1e-12)
    assert torch.allclose(attn.read(attn.weights(x).mT, x), expected, atol=1e-12)


def test_heads_share_out_each_sender(x):
    attn = make(controller=False)
    assert torch.allclose(attn.weights(x).sum((1, 2)), torch.ones(2, N).double())
    assert torch.allclose(attn.dependencies(x).sum(1), torch.ones(2, N).double())
    cold = make(controller=False, temperature=1e-4)
    cold.load_state_dict(attn.state_dict())
    assert torch.allclose(cold.weights(x).sum(2).amax(1), torch.ones(2, N).double(), atol=1e-3)


def test_mass_falls_from_layer_to_layer(x):
    mass = None
    for _ in range(4):
        attn = make()
        y, after, received = attn.send(x, mass)
        assert ((after > 0) & (after < (1 if mass is None else mass))).all()
        with attn.after(torch.ones(2, N).double() if mass is None else mass):
            assert torch.allclose(y, attn(x), atol=1e-12)
            assert torch.allclose(received, attn.weights(x).sum((1, 3)), atol=1e-12)
        x, mass = x + y, after


def test_padding_neither_sends_nor_receives(x):
    attn, keep = make(), torch.arange(N) < torch.tensor([[3], [N]])
    y = attn(x, mask=keep)
    assert torch.allclose(y[0, :3], attn(x[:1, :3])[0], atol=1e-12)
    assert torch.allclose(y[0, 3:], attn.out.bias.expand(2, -1))


def test_network_layer_by_layer():
    model = DependencyViT(DIM, 3, HEADS, image=8, patch=2, channels=1, classes=4, prune=(1, 2), ratio=0.3).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    images = torch.randn(2, 1, 8, 8, dtype=torch.double)
    x = model.embed(images).flatten(2).mT + model.positions
    mass = torch.ones(2, 16, dtype=torch.double)
    for number, block in enumerate(model.blocks):
        z = block.norm1(x)
        w = block.attend.weights(z) * mass[:, None, None]
        x = x + block.attend.read(w, z)
        mass = mass * block.attend.mass(z)
        if number < 2:
            best = w.sum((1, 3)).argsort(1, descending=True)[:, : (11, 6)[number]]
            # Kept tokens are put in order of their mass here; attention and mean do not know the order.
            x = torch.stack([x[b, best[b]] for b in range(2)])
            mass = torch.stack([mass[b, best[b]] for b in range(2)])
        x = x + block.mlp(block.norm2(x))
    assert x.shape[1] == 6
    expected = model.head((model.norm(x) * mass.unsqueeze(-1)).mean(1))
    assert torch.allclose(model(images), expected, atol=1e-10)


def test_parameters_of_the_network_are_those_of_deit_selector_and_controller():
    for name, dim, plain in (("t", 192, 5_717_416), ("s", 384, 22_050_664)):  # DeiT, with class token
        with torch.device("meta"):
            model = crosslight.create("dependencyvit", preset=name)
        own = 12 * dim + (dim * dim // 2 + dim // 2) + (dim // 2 + 1)
        assert sum(p.numel() for p in model.parameters()) == plain - 2 * dim + 12 * own


def test_no_matrix_is_kept(monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", HEADS * 64 * 1024)
    attn = make().float()
    assert flops.measure(lambda: attn(torch.randn(1, 1024, DIM))).largest <= HEADS * 64 * 1024


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="temperature: got 0"):
        make(temperature=0)
    with pytest.raises(CrosslightError, match="prune: got"):
        DependencyViT(prune=(13,))
    with pytest.raises(CrosslightError, match="ratio: got"):
        DependencyViT(prune=(1, 2), ratio=0.5)
