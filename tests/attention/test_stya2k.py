"""All-to-key attention: both branches written out, and the invariants of the paper."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.stya2k import Tiles
from crosslight.errors import CrosslightError

DIM = 16


def made(**options):
    attn = crosslight.create("stya2k", dim=DIM, **{"heads": 2, "region": 2} | options).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return attn


def maps(n=24, m=24):
    return torch.randn(2, n, DIM, dtype=torch.float64), torch.randn(2, m, DIM, dtype=torch.float64)


def by_hand(attn, x, z, grid):
    """The released algorithm on maps (channels, height, width) with unfold and fold, for maps of whole regions."""
    p, heads = attn.region, attn.heads
    (h, w), d, r = grid, DIM // attn.heads, attn.region**2
    x, z = x.mT.view(-1, DIM, h, w), z.mT.view(-1, DIM, h, w)

    def norm(t):
        flat = t.flatten(2)
        return ((flat - flat.mean(-1, True)) / (flat.var(-1, keepdim=True) + 1e-5).sqrt()).view_as(t)

    def block(t, layer):
        t = F.conv2d(t, layer.weight[:, :, None, None], layer.bias)
        return F.unfold(t, p, stride=p).view(len(t), heads, d, r, -1).transpose(-1, -2)  # batch heads d regions pixels

    def unblock(t, layer):
        t = F.fold(t.transpose(-1, -2).reshape(len(t), DIM * r, -1), (h, w), p, stride=p)
        return F.conv2d(t, layer.weight[:, :, None, None], layer.bias).flatten(2).mT

    q, k, v = block(norm(x), attn.q), block(norm(z), attn.k), block(z, attn.v)
    sim = torch.sigmoid(attn.beta + attn.alpha * torch.einsum("bhcx,bhcxy->bhxy", k.mean(-1), k))
    pooled = [(torch.einsum("bhxy,bhcxy->bhcx", sim, t) + t.mean(-1)) / (r + 1) for t in (k, v)]
    scores = torch.einsum("bhcxy,bhcz->bhxyz", q, pooled[0]).softmax(-1)
    far = torch.einsum("bhxyz,bhcz->bhcxy", scores, pooled[1])
    q, k, v = block(norm(x), attn.q2), block(norm(z), attn.k2), block(z, attn.v2)
    best = torch.einsum("bhcxy,bhczy->bhxz", q, k).argmax(-1)
    near = torch.zeros_like(q)
    for b in range(len(x)):
        for head in range(heads):
            for s, chosen in enumerate(best[b, head].tolist()):
                a = (q[b, head, :, s].mT @ k[b, head, :, chosen]).softmax(-1)
                near[b, head, :, s] = v[b, head, :, chosen] @ a.mT
    return unblock(far, attn.out) + unblock(near, attn.out2)


@pytest.mark.parametrize("grid", [(4, 6), (6, 4)])
def test_equals_the_algorithm_written_out(grid):
    attn, (x, z) = made(), maps()
    torch.testing.assert_close(attn(x, z, grid=grid), by_hand(attn, x, z, grid))
    torch.testing.assert_close(attn(x, grid=grid), by_hand(attn, x, x, grid))


def test_regions_are_boxes_of_the_grid_and_cover_it_at_the_border():
    tiles = Tiles(15, 2, (3, 5), torch.device("cpu"))
    assert tiles.index.tolist()[:2] == [[0, 1, 5, 6], [2, 3, 7, 8]]
    assert tiles.index.tolist()[2:] == [[4, -1, 9, -1], [10, 11, -1, -1], [12, 13, -1, -1], [14, -1, -1, -1]]
    assert torch.equal(tiles.index.flatten()[tiles.place], torch.arange(15))
    assert Tiles(6, 2, None, torch.device("cpu")).index.tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]]


def test_regions_of_one_pixel_are_dense_attention_but_for_the_pooling():
    attn, (x, z) = made(region=1), maps()
    u = (attn._split(attn.k((z - z.mean(1, True)) / (z.var(1, keepdim=True) + 1e-5).sqrt())) ** 2).sum(-1, True)
    factor = ((attn.alpha * u + attn.beta).sigmoid() + 1) / 2
    far = attn.weights(x, z)[:, :2]
    q, k = (
        attn._split(layer((t - t.mean(1, True)) / (t.var(1, keepdim=True) + 1e-5).sqrt()))
        for layer, t in ((attn.q, x), (attn.k, z))
    )
    torch.testing.assert_close(far, (q @ (factor * k).mT).softmax(-1) * factor.mT)


def test_each_region_reads_exactly_one_and_its_weights_sum_to_one():
    attn, (x, z) = made(), maps()
    tiles = Tiles(24, 2, (4, 6), torch.device("cpu"))
    near = attn.weights(x, z, grid=(4, 6))[:, 2:]
    torch.testing.assert_close(near.sum(-1), torch.ones(2, 2, 24, dtype=torch.float64))
    regions = near[:, :, tiles.index][..., tiles.index].sum(-1)  # batch heads regions pixels regions
    read = regions > 0
    assert (read.sum(-1) == 1).all()
    assert (read == read[:, :, :, :1]).all()


def test_the_order_of_style_regions_does_not_matter():
    """A permutation of whole regions permutes the columns of both matrices and leaves the output as it is."""
    attn, (x, z) = made(), maps(24, 32)
    order = torch.randperm(8).repeat_interleave(4) * 4 + torch.arange(4).repeat(8)
    torch.testing.assert_close(attn(x, z[:, order]), attn(x, z))
    torch.testing.assert_close(attn.weights(x, z[:, order]), attn.weights(x, z)[..., order])


def test_no_tensor_of_all_pairs():
    from crosslight.testing import flops

    attn = crosslight.create("stya2k", dim=16, heads=1, region=4)
    x, z = torch.randn(1, 1024, 16), torch.randn(1, 1024, 16)
    assert flops.measure(lambda: attn(x, z, grid=(32, 32))).largest < 1024 * 1024 / 8


def test_the_grid_of_the_context():
    attn, (x, z) = made(context_grid=(6, 2)), maps(24, 12)
    other = made(context_grid=(2, 6))
    other.load_state_dict(attn.state_dict())
    assert (attn(x, z, grid=(4, 6)) - other(x, z, grid=(4, 6))).abs().max() > 1e-3
    for name, call in (("context_grid", lambda: attn(x, x)), ("grid", lambda: attn(x, grid=(2, 3, 4)))):
        with pytest.raises(CrosslightError, match=name):
            call()
    with pytest.raises(CrosslightError, match="region"):
        made(region=0)
