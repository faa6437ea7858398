"""Bi-level routing: the equations region by region, full attention as a limit, what regions see, published sizes."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.biformer_bra import BRA, Network
from crosslight.errors import CrosslightError

HEADS, D = 2, 4


def heads(n: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 2, HEADS, n, D, dtype=torch.double).unbind()


def regions_of(height: int, width: int, count: int) -> list[list[int]]:
    """Tokens of each region, regions in reading order."""
    down, across = -(-height // count), -(-width // count)
    return [
        [r * width + c for r in range(top, min(top + down, height)) for c in range(left, min(left + across, width))]
        for top in range(0, height, down)
        for left in range(0, width, across)
    ]


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_equals_the_equations_region_by_region(grid):
    attn, n = BRA(HEADS, D, regions=3, top_k=2), grid[0] * grid[1]
    q, k, v = heads(n)
    regions, expected = regions_of(*grid, 3), torch.empty_like(q)
    for b in range(2):
        wide_q, wide_k = (t[b].transpose(0, 1).flatten(1) for t in (q, k))
        for region in regions:
            alike = [wide_q[region].mean(0) @ wide_k[other].mean(0) for other in regions]
            best = sorted(range(len(regions)), key=lambda i: -alike[i])[:2]
            read = regions[best[0]] + regions[best[1]]
            scores = q[b, :, region] @ k[b, :, read].mT / D**0.5
            expected[b, :, region] = scores.softmax(-1) @ v[b, :, read]
    torch.testing.assert_close(attn(q, k, v, grid=grid), expected)
    torch.testing.assert_close(attn.weights(q, k, grid=grid) @ v, expected)


@pytest.mark.parametrize("top_k", [9, None])
def test_with_all_regions_it_is_full_attention_and_the_convolution(top_k):
    attn = crosslight.create("biformer-bra", dim=8, heads=2, regions=3, top_k=top_k).double()
    x = torch.randn(2, 36, 8, dtype=torch.double)
    v = attn.v(x)
    full = F.scaled_dot_product_attention(*(t.unflatten(2, (2, 4)).transpose(1, 2) for t in (attn.q(x), attn.k(x), v)))
    local = F.conv2d(v.mT.unflatten(2, (6, 6)), attn.lce.weight, attn.lce.bias, padding=2, groups=8)
    expected = attn.out(full.transpose(1, 2).flatten(2) + local.flatten(2).mT)
    torch.testing.assert_close(attn(x, grid=(6, 6)), expected)


def test_a_region_reads_the_regions_that_it_chose_and_no_other():
    attn = BRA(HEADS, D, regions=3, top_k=2)
    q, k, v = (t[:1] for t in heads(36))
    k.requires_grad_()
    v.requires_grad_()
    y = attn(q, k, v, grid=(6, 6))
    for region in regions_of(6, 6, 3):
        by_k, by_v = torch.autograd.grad(y[:, :, region].square().sum(), (k, v), retain_graph=True)
        seen = by_v.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
        whole = [r for r in regions_of(6, 6, 3) if set(r) <= set(seen)]
        assert (len(whole), len(seen)) == (2, 8), "two whole regions of four tokens"
        assert set(by_k.abs().sum((0, 1, 3)).nonzero().flatten().tolist()) <= set(seen)


def test_regions_choose_alike_for_all_heads():
    attn = BRA(HEADS, D, regions=3, top_k=2)
    q, k, _ = heads(36)
    read = attn.weights(q, k, grid=(6, 6)) > 0
    assert torch.equal(read[:, 0], read[:, 1])
    assert (read.sum(-1) == 8).all()


def test_a_region_without_a_key_is_not_chosen():
    attn = crosslight.create("biformer-bra", dim=8, heads=2, regions=2, top_k=2).double()
    x = torch.randn(1, 16, 8, dtype=torch.double)
    keep = torch.tensor([[token % 4 >= 2 for token in range(16)]])  # the right half of the map
    weights = attn.weights(x, grid=(4, 4), mask=keep)
    assert (weights > 0).sum(-1).eq(8).all(), "both regions on the right, whatever the means of the left ones"
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 16).double())


def test_a_context_is_one_row_though_as_long_as_the_map():
    attn = crosslight.create("biformer-bra", dim=8, heads=2, regions=3, top_k=2).double()
    x, z = torch.randn(2, 2, 36, 8, dtype=torch.double).unbind()
    weights = attn.weights(x, z, grid=(6, 6))
    quads = (weights > 0).unflatten(3, (9, 4))  # a row in nine regions
    assert torch.equal(quads.any(-1), quads.all(-1))
    assert (quads.all(-1).sum(-1) == 2).all()
    torch.testing.assert_close(attn.read(weights, x, z, grid=(6, 6)), attn(x, z, grid=(6, 6)))


def test_the_cost_is_least_at_the_number_of_regions_of_the_paper():
    n, k = 4096, 4
    cut = BRA(HEADS, D, regions=None, top_k=k).cut(n, (64, 64))
    cost = {side: (64 // side) ** 4 + k * n * side**2 for side in (1, 2, 4, 8, 16)}  # regions of side x side
    assert cut.size[0] == min(cost, key=lambda side: cost[side])


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 13.1), ("small", 25.5), ("base", 56.8)])
def test_published_sizes(preset, millions):
    with torch.device("meta"):
        model = Network(**Network.presets[preset])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_the_network_reads_images():
    options = {"dim": 16, "depths": [1, 1, 1, 1], "head_dim": 8, "regions": 3, "top_k": (1, 2, 4, None), "classes": 5}
    model = crosslight.create("biformer-bra", preset="tiny", **options).eval()
    maps = model.features(torch.randn(1, 3, 96, 64))
    assert [tuple(f.shape[1:]) for f in maps] == [(16, 24, 16), (32, 12, 8), (64, 6, 4), (128, 3, 2)]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="lce: got 4, expected an odd number, or 0"):
        BRA(HEADS, D, lce=4)
