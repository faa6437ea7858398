"""Hyena N-D: the filter cell by cell, the convolution by conv2d, reach, rank, equivariance and the backbone."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.errors import CrosslightError

DIM = 4


def make(**options):
    attn = crosslight.create("hyena-nd", dim=DIM, **{"reach": 6, "filter_width": 5, **options}).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return attn


def stream(n, batch=2):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def one_tap(filter, places):
    """The filter at one cell, of a position on each axis."""
    z, fall = [], torch.zeros(DIM, dtype=torch.double)
    decays = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, DIM).double()
    for axis, i in enumerate(places):
        w = 2 * math.pi * i / 6 * 1e-4
        z += [i / 5, math.cos(w), -math.sin(w)]
        fall += i / 5 * (decays if filter.delta is None else filter.delta[axis]).abs()
    h = torch.tensor(z, dtype=torch.double)
    for layer in filter.mlp:
        h = torch.sin(layer.frequency * h) if hasattr(layer, "frequency") else F.linear(h, layer.weight, layer.bias)
    return h * torch.exp(-fall)


@pytest.mark.parametrize("window", ["fixed", "learned"])
@pytest.mark.parametrize("kind", ["2d", "product"])
def test_filter_cell_by_cell(kind, window):
    attn = make(filter=kind, window=window)
    k = attn.kernel(4, 7)  # beyond the reach too
    for i in range(4):
        for j in range(7):
            if kind == "2d":
                tap = one_tap(attn.filters[0], (i, j))
            else:
                tap = one_tap(attn.filters[0], (i,)) * one_tap(attn.filters[1], (j,))
            assert torch.allclose(k[:, i, j], tap, atol=1e-12)


def quadrant(image, k, turns):
    """The convolution from above and left, of the image turned and turned back."""
    height, width = image.shape[-2:]
    padded = F.pad(image.flip(turns), (width - 1, 0, height - 1, 0))
    return F.conv2d(padded, k.flip(1, 2).unsqueeze(1), groups=DIM).flip(turns)


@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (4, 1)])
@pytest.mark.parametrize("directions", ["four", "one"])
def test_equations(grid, directions):
    for corner in (0, 1, 2, 3) if directions == "one" else (0,):
        attn, x = make(directions=directions, quadrant=corner), stream(grid[0] * grid[1])
        p = attn.short(attn.into(x).transpose(1, 2).unflatten(2, grid))
        x0, x1, v = p.chunk(3, 1)
        u, k = x1 * v, attn.kernel(*grid)
        sides = [quadrant(u, k, turns) for turns in ([], [3], [2], [2, 3])]
        y = sides[corner]
        if directions == "four":
            y = sum(w * side for w, side in zip(attn.sides, sides, strict=True))
        expected = attn.out((x0 * (y + attn.skip[:, None, None] * u)).flatten(2).transpose(1, 2))
        assert torch.allclose(attn(x, grid=grid), expected, atol=1e-12)
        weights = attn.weights(x, grid=grid)
        assert torch.allclose(attn.read(weights, x, grid=grid), expected, atol=1e-12)


def test_causal_is_the_hyena_of_one_dimension():
    attn, x = make(), stream(9)
    p = F.pad(attn.into(x), (0, 0, 2, 0))
    row = attn.short.weight[:, 0, 1]
    p = torch.stack([(p[:, t : t + 3] * row.T).sum(1) + attn.short.bias for t in range(9)], 1)
    x0, x1, v = p.chunk(3, -1)
    k, outs = attn.kernel(1, 9)[:, 0], []
    for t in range(9):
        y = sum(k[:, t - s] * (x1 * v)[:, s] for s in range(t + 1))
        outs.append(attn.out(x0[:, t] * (y + attn.skip * (x1 * v)[:, t])))
    assert torch.allclose(attn(x, causal=True), torch.stack(outs, 1), atol=1e-12)


def reached(attn, grid, cell):
    """Which pixels the output of one cell depends on."""
    torch.nn.init.zeros_(attn.short.weight)
    with torch.no_grad():
        attn.short.weight[:, :, 1, 1] = 1
    x = stream(grid[0] * grid[1], 1).requires_grad_()
    grad = torch.autograd.grad(attn(x, grid=grid)[:, cell[0] * grid[1] + cell[1]].sum(), x)[0]
    return grad.abs().sum(2).view(grid) > 1e-9


def test_one_quadrant_reads_above_and_left_and_four_read_everything():
    i, j = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    assert torch.equal(reached(make(directions="one"), (4, 5), (2, 3)), (i <= 2) & (j <= 3))
    assert torch.equal(reached(make(directions="one", quadrant=2), (4, 5), (2, 3)), (i >= 2) & (j <= 3))
    assert reached(make(), (4, 5), (2, 3)).all()


def test_product_filter_has_rank_one():
    for kind, rank in (("product", 1), ("2d", 4)):
        singular = torch.linalg.svdvals(make(filter=kind).kernel(5, 6))
        assert ((singular[:, 1] / singular[:, 0] < 1e-12) == (rank == 1)).all()


def test_the_convolution_moves_with_its_input():
    attn = make()
    k, centre = attn.placed(attn.kernel(6, 6), causal=False)
    u = torch.zeros(1, DIM, 6, 6, dtype=torch.double)
    u[:, :, 1:3, 1:4] = torch.randn(DIM, 2, 3)
    moved = crosslight.engines.recurrent.fft_conv2d(u.roll((2, 1), (2, 3)), k, centre)
    still = crosslight.engines.recurrent.fft_conv2d(u, k, centre)
    assert torch.allclose(moved[..., 2:, 1:], still[..., :-2, :-1], atol=1e-12)


def test_padding_of_a_grid_is_not_read():
    attn, x, keep = make(), stream(12), torch.rand(2, 12) < 0.6
    changed = torch.where(keep.unsqueeze(-1), x, 5.0)
    given = {"mask": keep, "grid": (3, 4)}
    assert torch.allclose(attn(x, **given)[keep], attn(changed, **given)[keep], atol=1e-12)


def test_backbone_is_hyena_first_and_attention_after():
    model = crosslight.create("hyena-nd", preset="tiny")
    kinds = [type(block.attend).__name__ for block in model.blocks]
    assert kinds == ["HyenaND"] * 3 + ["AttentionLayer"] * 3
    images = torch.randn(2, 1, 8, 8)
    model(images).sum().backward()
    assert model(images).shape == (2, 10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_options_are_named():
    for options, named in (
        ({"filter": "3d"}, "filter"),
        ({"directions": "two"}, "directions"),
        ({"emb_dim": 4}, "emb_dim"),
        ({"reach": 0}, "reach"),
    ):
        with pytest.raises(CrosslightError, match=f"{named}: got"):
            make(**options)
    with pytest.raises(CrosslightError, match="grid: got"):
        make()(stream(12), grid=(2, 2, 3))
