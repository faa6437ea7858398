"""Positions against independent implementations: transformers' Llama, T5 and Bloom, timm's Swin."""

import math

import pytest
import torch

from crosslight.engines import positions
from crosslight.errors import CrosslightError


def test_rotary_is_that_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=2)
    q, k = torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 16)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(11)[None])
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    rotary = positions.Rotary(16)
    torch.testing.assert_close((rotary.rotate(q), rotary.rotate(k)), expected)


def test_rotary_offset_continues_the_sequence():
    x = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    rotary = positions.Rotary(8)
    torch.testing.assert_close(rotary.rotate(x[:, :, 6:], offset=6), rotary.rotate(x)[:, :, 6:])


def test_rotary_sees_distances_only():
    q, k = torch.randn(2, 1, 1, 7, 8, dtype=torch.float64)
    rotary = positions.Rotary(8)
    near = rotary.rotate(q) @ rotary.rotate(k).mT
    far = rotary.rotate(q, offset=1000) @ rotary.rotate(k, offset=1000).mT
    torch.testing.assert_close(near, far)


def test_rotary_angles_survive_half_precision():
    x = torch.ones(1, 1, 1, 8)
    far = positions.Rotary(8).rotate(x.bfloat16(), offset=4097).float()
    torch.testing.assert_close(far, positions.Rotary(8).rotate(x, offset=4097), atol=0.01, rtol=0.01)


def test_rotary_keeps_the_layout_and_has_its_gradients():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()  # as a projection gives it
    for rotary, grid in ((positions.Rotary(8), None), (positions.Rotary2d(8), (5, 1))):
        y = rotary.rotate(x, grid=grid)
        assert y.stride() == x.stride()
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
        assert torch.autograd.gradcheck(lambda x: rotary.rotate(x, grid=grid), x)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: rotary.rotate(x, grid=grid), x)  # noqa: B023


def test_rotary2d_turns_half_by_row_and_half_by_column():
    """Written out with complex numbers: channel pairs (c, c + 2) of each half of 8 channels."""
    height, width = 3, 5
    x = torch.randn(1, 1, height * width, 8, dtype=torch.float64)
    expected = torch.empty_like(x)
    for row in range(height):
        for column in range(width):
            cell = row * width + column
            for at, place in ((0, row), (4, column)):
                for c in range(2):
                    pair = torch.complex(x[0, 0, cell, at + c], x[0, 0, cell, at + c + 2])
                    angle = torch.tensor(place * 100.0 ** (-2 * c / 4), dtype=torch.float64)
                    turned = pair * torch.polar(torch.ones_like(angle), angle)
                    expected[0, 0, cell, at + c], expected[0, 0, cell, at + c + 2] = turned.real, turned.imag
    torch.testing.assert_close(positions.Rotary2d(8).rotate(x, grid=(height, width)), expected)


def test_rotary2d_asks_for_its_grid():
    with pytest.raises(CrosslightError, match="grid"):
        positions.Rotary2d(8).rotate(torch.zeros(1, 1, 4, 8))


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 20])
def test_alibi_slopes_are_those_of_bloom(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    n = 7
    # Bloom adds slope * j, which the softmax cannot tell from -slope * (i - j) for j <= i.
    expected = bloom.build_alibi_tensor(torch.ones(1, n), heads, torch.float32).view(heads, n)
    i, j = torch.arange(n).view(-1, 1), torch.arange(n)
    bias = positions.ALiBi(heads).bias(i, j)
    assert torch.equal(bias, bias.mT)
    torch.testing.assert_close(bias[:, -1] - bias[:, -1, :1], expected)


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (16, 64), (8, 20)])
def test_relative_buckets_are_those_of_t5(buckets, far):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    i, j = torch.arange(300).view(-1, 1), torch.arange(300)
    expected = t5.T5Attention._relative_position_bucket(j - i, True, buckets, far)
    ours = positions.RelativeBias(2, buckets, far)
    assert torch.equal(ours.bucket(i, j), expected)
    torch.nn.init.normal_(ours.table)
    torch.testing.assert_close(ours.bias(i, j), ours.table[:, expected])


def test_relative_bias_2d_is_that_of_swin():
    swin = pytest.importorskip("timm.models.swin_transformer")
    grid, heads = (3, 4), 2
    ours = positions.RelativeBias2d(heads, grid)
    torch.nn.init.normal_(ours.table)
    rows = ours.table.detach().flatten(1).mT[swin.get_relative_position_index(*grid).flatten()]
    expected = rows.view(12, 12, heads).permute(2, 0, 1)
    i, j = torch.arange(12).view(-1, 1), torch.arange(12)
    torch.testing.assert_close(ours.bias(i, j).detach(), expected)


def test_biases_answer_for_any_index_tensors():
    """Block executors ask for gathered positions, which is the same as indexing the whole matrix."""
    i, j = torch.randint(0, 12, (5, 3, 1)), torch.randint(0, 12, (5, 1, 4))
    whole = torch.arange(12).view(-1, 1), torch.arange(12)
    for bias in (positions.ALiBi(2), positions.RelativeBias(2), positions.RelativeBias2d(2, (3, 4))):
        for parameter in bias.parameters():
            torch.nn.init.normal_(parameter)
        torch.testing.assert_close(bias.bias(i, j), bias.bias(*whole)[:, i, j])


def test_positions_by_name():
    made = {name: positions.make(name, heads=2, head_dim=8) for name in ("rope", "rope2d", "alibi", "relative")}
    assert [type(p).__name__ for p in made.values()] == ["Rotary", "Rotary2d", "ALiBi", "RelativeBias"]
    assert positions.make(None, heads=2, head_dim=8) is None
    assert positions.make(made["rope"], heads=2, head_dim=8) is made["rope"]
    with pytest.raises(CrosslightError, match=r"position.*rope"):
        positions.make("sinusoidal", heads=2, head_dim=8)
    with pytest.raises(CrosslightError, match="even"):
        positions.make("rope", heads=2, head_dim=7)
    assert math.isclose(made["alibi"].slopes[0].item(), 2**-4)
