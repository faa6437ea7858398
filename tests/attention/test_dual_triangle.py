"""Dual triangle attention: half of each head looks back, half looks ahead."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.dual_triangle import DualTriangle
from crosslight.engines import dense, masks
from crosslight.errors import CrosslightError

HEADS, N, WIDTH = 3, 9, 8


@pytest.fixture
def core() -> DualTriangle:
    return DualTriangle(HEADS, WIDTH)


def heads() -> list[torch.Tensor]:
    return list(torch.randn(3, 2, HEADS, N, WIDTH, dtype=torch.float64, requires_grad=True).unbind())


def test_equals_sdpa_on_twice_the_heads_with_triangular_masks(core):
    q, k, v = heads()
    halves = [t.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2) for t in (q, k, v)]  # down, up, down, up ...
    down = torch.ones(N, N, dtype=torch.bool).tril()
    mask = torch.stack([down, down.mT] * HEADS)
    y = F.scaled_dot_product_attention(*halves, attn_mask=mask)
    expected = y.unflatten(1, (HEADS, 2)).transpose(2, 3).flatten(3)
    torch.testing.assert_close(core(q, k, v), expected)


@pytest.mark.parametrize("mask", ["none", "keys", "window", "pairs for each head"])
def test_two_matrices_a_head(core, mask):
    q, k, v = heads()
    chosen = {
        "none": None,
        "keys": masks.keys(torch.arange(N) < torch.tensor([[N], [4]])),
        "window": masks.window(2),
        "pairs for each head": masks.Pairs(torch.rand(2, HEADS, N, N) < 0.7),
    }[mask]
    weights = core.weights(q, k, mask=chosen)
    assert weights.shape == (2, 2 * HEADS, N, N)
    assert (weights[:, :HEADS].triu(1) == 0).all()
    assert (weights[:, HEADS:].tril(-1) == 0).all()
    if chosen is not None:
        seen = dense.visible(q, k, chosen, False).expand(2, HEADS, N, N).repeat(1, 2, 1, 1)
        assert (weights[~seen] == 0).all()
    torch.testing.assert_close(core.read(weights, v), core(q, k, v, mask=chosen))


def test_shapes_at_any_length():
    attn = crosslight.create("dual-triangle", dim=16, heads=2)
    for n in (1, 2, 33):
        x = torch.randn(2, n, 16)
        assert attn(x).shape == x.shape
        assert attn.weights(x).shape == (2, 4, n, n)


def test_reversing_the_sequence_and_swapping_the_halves_reverses_the_output(core):
    q, k, v = heads()

    def swapped(t):
        return torch.cat(t.chunk(2, -1)[::-1], -1)

    y = core(*(swapped(t.flip(2)) for t in (q, k, v)))
    torch.testing.assert_close(swapped(y).flip(2), core(q, k, v))


def test_knows_the_order_where_plain_attention_does_not():
    x = torch.randn(1, N, 16, dtype=torch.float64)
    order = torch.randperm(N)
    plain, dual = (crosslight.create(id, dim=16, heads=2).double() for id in ("softmax", "dual-triangle"))
    torch.testing.assert_close(plain(x[:, order]), plain(x)[:, order])
    assert (dual(x[:, order]) - dual(x)[:, order]).abs().max() > 1e-3
    assert sum(p.numel() for p in dual.parameters()) == sum(p.numel() for p in plain.parameters())


def test_each_half_reads_one_side(core):
    q, k, v = heads()
    down, up = core(q, k, v).chunk(2, -1)
    for i in (0, 4, N - 1):
        past = torch.autograd.grad(down[:, :, i].sum(), (k, v), retain_graph=True)
        future = torch.autograd.grad(up[:, :, i].sum(), (k, v), retain_graph=True)
        assert all((g[:, :, i + 1 :] == 0).all() and (g[:, :, : i + 1] != 0).any() for g in past[1:])
        assert all((g[:, :, :i] == 0).all() and (g[:, :, i:] != 0).any() for g in future[1:])
        assert (past[0][:, :, i + 1 :] == 0).all()
        assert (future[0][:, :, :i] == 0).all()


def test_rope_turns_the_whole_head_before_the_split():
    attn = crosslight.create("dual-triangle", dim=16, heads=2, position="rope").double()
    x = torch.randn(1, N, 16, dtype=torch.float64)
    q, k, v = (layer(x).view(1, N, 2, 8).transpose(1, 2) for layer in (attn.q, attn.k, attn.v))
    y = attn.core(attn.position.rotate(q), attn.position.rotate(k), v)
    torch.testing.assert_close(attn(x), attn.out(y.transpose(1, 2).flatten(2)))


def test_an_odd_head_width_is_refused():
    with pytest.raises(CrosslightError, match=r"head_dim.*7"):
        crosslight.create("dual-triangle", dim=14, heads=2)
