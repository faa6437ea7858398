"""L2ViT: the explicit matrix and its floor, the convolutions, and what they do to the map."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.l2vit import GlobalBlock, L2ViT, Network
from crosslight.engines import masks
from crosslight.errors import CrosslightError

DIM, HEADS, D = 12, 3, 4


def make(**options):
    attn = crosslight.create("l2vit", **{"dim": DIM, "heads": HEADS, "floor": 1.0, **options})
    return attn.double().eval()


def heads(n, m=None):
    m = n if m is None else m
    return [torch.randn(2, HEADS, length, D, dtype=torch.double) for length in (n, m, m)]


def test_without_floor_it_is_the_normalised_matrix_times_t():
    q, k, v = heads(30, 40)
    core = L2ViT(HEADS, D, floor=1e-9).double()
    torch.nn.init.uniform_(core.temperature, 0.5, 2)
    a = F.relu(q) @ F.relu(k).transpose(-1, -2)
    sums = a.sum(-1, keepdim=True)
    a = core.temperature * a / torch.where(sums == 0, 1, sums)  # a query without positive channel reads nothing
    assert torch.allclose(core(q, k, v), a @ v, atol=1e-10)
    assert torch.allclose(core.weights(q, k), a, atol=1e-10)


def test_floor_bounds_the_denominator():
    q, k, _ = heads(30)
    a = F.relu(q) @ F.relu(k).transpose(-1, -2)
    sums = a.sum(-1)
    floor = sums.median().item()
    rows = L2ViT(HEADS, D, floor=floor).double().weights(q, k).sum(-1) * math.sqrt(D)
    bound = sums < floor
    assert 0 < bound.sum() < bound.numel()
    assert torch.allclose(rows[~bound], torch.ones((), dtype=rows.dtype), atol=1e-6)
    assert torch.allclose(rows[bound], sums[bound] / floor, atol=1e-6)


def test_temperature_starts_at_that_of_softmax():
    assert torch.allclose(L2ViT(HEADS, 16).temperature, torch.tensor(0.25))


def test_layer_is_attention_and_its_concentration():
    height, width = 4, 5
    attn, x = make(), torch.randn(2, 20, DIM, dtype=torch.double)
    lcm = attn.lcm
    torch.nn.init.normal_(lcm.scale.running_mean)
    torch.nn.init.uniform_(lcm.scale.running_var, 0.5, 2)
    q, k, v = (layer(x).unflatten(-1, (HEADS, D)).transpose(1, 2) for layer in (attn.q, attn.k, attn.v))
    y = attn.out(attn.core(q, k, v).transpose(1, 2).flatten(2))
    z = F.layer_norm(y, (DIM,), lcm.norm.weight, lcm.norm.bias)
    z = z.view(2, height, width, DIM).permute(0, 3, 1, 2)
    z = F.gelu(F.conv2d(z, lcm.first.weight, lcm.first.bias, padding=3, groups=DIM))
    shape = (1, DIM, 1, 1)
    z = (z - lcm.scale.running_mean.view(shape)) / (lcm.scale.running_var + 1e-5).sqrt().view(shape)
    z = z * lcm.scale.weight.view(shape) + lcm.scale.bias.view(shape)
    z = F.conv2d(z, lcm.second.weight, lcm.second.bias, padding=3, groups=DIM)
    expected = y + z.permute(0, 2, 3, 1).reshape(2, 20, DIM)
    assert torch.allclose(attn(x, grid=(height, width)), expected, atol=1e-10)


def test_a_near_token_counts_for_more_with_the_convolutions():
    """Share of the gradient of an output that falls on its 3 x 3 neighbours and itself."""
    x = torch.randn(4, 100, DIM, dtype=torch.double, requires_grad=True)
    shares = []
    for kernel in (0, 3):
        torch.manual_seed(0)
        (grad,) = torch.autograd.grad(make(kernel=kernel)(x, grid=(10, 10))[:, 55].sum(), x)
        grad = grad.norm(dim=-1).view(4, 10, 10)
        grad[:, 5, 5] = 0
        shares.append((grad[:, 4:7, 4:7].sum() / grad.sum()).item())
    assert shares[1] > 2 * shares[0]


def test_padding_is_zero_to_the_convolutions():
    attn, x = make(), torch.randn(2, 8, DIM, dtype=torch.double)
    keep = torch.arange(8) < torch.tensor([[5], [8]])
    assert torch.allclose(attn(x, mask=keep)[0, :5], attn(x[:1, :5])[0], atol=1e-12)
    a = attn.core.weights(*heads(8)[:2], mask=masks.keys(keep))
    assert not a[0, :, :, 5:].any()


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="floor: got 0"):
        make(floor=0)
    with pytest.raises(CrosslightError, match="kernel: got 6"):
        make(kernel=6)


def test_a_block_concentrates_the_sum_of_stream_and_attention():
    block = GlobalBlock(8, 2, 2, kernel=3, floor=1.0).double().eval()
    x = torch.randn(2, 20, 8, dtype=torch.double)

    def on_the_map(conv, t):
        image = F.conv2d(t.mT.reshape(2, 8, 4, 5), conv.weight, conv.bias, padding=1, groups=8)
        return image.reshape(2, 8, 20).mT

    y = x + on_the_map(block.position.conv, x)
    y = y + block.attend(block.norm1(y))
    lcm = block.concentrate
    z = F.gelu(on_the_map(lcm.first, lcm.norm(y))) / math.sqrt(1 + 1e-5)  # batch norm as it starts
    y = y + on_the_map(lcm.second, z)
    assert torch.allclose(block(x, (4, 5)), y + block.mlp(block.norm2(y)), atol=1e-10)


def test_blocks_of_windows_and_of_the_whole_map_take_turns():
    model = Network([8, 16], [2, 2], [1, 2], window=2, classes=10).eval()
    local, whole = model.stages[0].blocks
    x = torch.randn(1, 64, 8, requires_grad=True)
    for block, far in ((local, False), (whole, True)):
        (slope,) = torch.autograd.grad(block(x, (8, 8))[0, 0].square().sum(), x)
        assert bool(slope[0, 63].any()) is far
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 48)).shape == (2, 10)


def test_sizes_are_those_of_the_authors_table():
    for preset, millions in (("tiny", 29), ("small", 50), ("base", 89)):
        with torch.device("meta"):
            model = crosslight.create("l2vit", preset=preset)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
