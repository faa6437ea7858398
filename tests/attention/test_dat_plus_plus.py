"""Deformable attention: the equations point by point, its limits without offsets, the points, the published sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.dat_plus_plus import DeformableAttention, Network
from crosslight.attention.fused_neighborhood_attention import NeighbourhoodAttention
from crosslight.errors import CrosslightError, UnsupportedPattern


def layer(dim: int = 8, heads: int = 2, **options) -> DeformableAttention:
    attn = DeformableAttention(dim, heads, **{"stride": 2, "kernel": 3, "size": 4, **options}).double()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn


def still(**options) -> DeformableAttention:
    """Without offsets and biases."""
    attn = layer(size=0, **options)
    torch.nn.init.zeros_(attn.offset[3].weight)
    return attn


def between(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """The value of (channels, height, width) at a place in [-1, 1]^2, linear between the four cells around it."""
    height, width = image.shape[1:]
    row, column = (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1)
    total = torch.zeros_like(image[:, 0, 0])
    for r in range(height):
        for c in range(width):
            total = total + max(0.0, 1 - abs(row - r)) * max(0.0, 1 - abs(column - c)) * image[:, r, c]
    return total


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("offset_range", [None, 2.0])
def test_equals_the_equations_point_by_point(groups, offset_range):
    attn, (height, width), c = layer(groups=groups, offset_range=offset_range), (6, 5), 8 // groups
    x = torch.randn(1, 30, 8, dtype=torch.double)
    q = attn.q(x)[0]
    conv, norm = attn.offset[0], attn.offset[1]
    place = lambda i, side: 2 * i / (side - 1) - 1  # noqa: E731
    points = []
    for g in range(groups):
        image = q[:, g * c : (g + 1) * c].T.unflatten(1, (height, width))
        features = F.conv2d(image[None], conv.weight, conv.bias, stride=2, padding=1, groups=c)[0]
        for a in range(3):
            for b in range(3):
                f = F.layer_norm(features[:, a, b], (c,), norm.weight, norm.bias)
                moved = attn.offset[3].weight[:, :, 0, 0] @ F.gelu(f)
                if offset_range is not None:
                    moved = moved.tanh() * offset_range / 2
                points.append([min(1.0, max(-1.0, place(s, 3) + m.item())) for s, m in zip((a, b), moved, strict=True)])
    points = torch.tensor(points, dtype=torch.double).view(groups, 9, 2)
    torch.testing.assert_close(attn.points(x, grid=(height, width))[0], points)
    image = x[0].T.unflatten(1, (height, width))
    sampled = [
        torch.cat([between(image[g * c : (g + 1) * c], *points[g, p].tolist()) for g in range(groups)])
        for p in range(9)
    ]
    sampled, y = torch.stack(sampled), torch.empty(30, 8, dtype=torch.double)
    for h in range(2):
        part, of_head = slice(4 * h, 4 * h + 4), points[h * groups // 2]
        scores = q[:, part] @ attn.k(sampled)[:, part].T / 2
        for i in range(30):
            row, column = place(i // width, height), place(i % width, width)
            for p in range(9):
                apart = (row - of_head[p, 0].item()) / 2, (column - of_head[p, 1].item()) / 2
                scores[i, p] += between(attn.table[h : h + 1], *apart)[0]
        y[:, part] = scores.softmax(-1) @ attn.v(sampled)[:, part]
    torch.testing.assert_close(attn(x, grid=(height, width))[0], attn.out(y))


def attention_to(attn: DeformableAttention, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in (attn.q(x), attn.k(features), attn.v(features)))
    return attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_without_offsets_at_stride_one_it_is_full_attention():
    attn, x = still(stride=1), torch.randn(2, 30, 8, dtype=torch.double)
    torch.testing.assert_close(attn(x, grid=(6, 5)), attention_to(attn, x, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_without_offsets_it_attends_to_bilinear_samples_of_the_grid(groups):
    attn, x = still(groups=groups), torch.randn(2, 42, 8, dtype=torch.double)
    corners = F.interpolate(x.mT.unflatten(2, (6, 7)), (3, 4), mode="bilinear", align_corners=True)
    torch.testing.assert_close(attn(x, grid=(6, 7)), attention_to(attn, x, corners.flatten(2).mT))


def test_points_follow_the_input_and_stay_on_the_map():
    attn = layer(groups=2)
    x = 3 * torch.randn(2, 36, 8, dtype=torch.double)
    points = attn.points(x, grid=(6, 6))
    assert points.shape == (2, 2, 9, 2)
    assert points.abs().max() <= 1
    assert not torch.allclose(points[0], points[1])
    assert not torch.allclose(points[:, 0], points[:, 1])
    near = layer(offset_range=0.5)
    uniform = torch.cartesian_prod(*(torch.linspace(-1, 1, 3),) * 2)
    assert (near.points(x, grid=(6, 6)) - uniform).abs().max() <= 0.25 + 1e-9, "half of the distance between points"


def test_rows_of_the_matrix_sum_to_one_masked_or_not():
    attn, x = layer(groups=2), torch.randn(2, 36, 8, dtype=torch.double)
    keep = torch.ones(2, 36, dtype=torch.bool)
    keep[:, 10:] = False
    for mask in (None, keep):
        weights = attn.weights(x, grid=(6, 6), mask=mask)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 36).double())
    assert (weights[..., 10:] == 0).all()
    with pytest.raises(UnsupportedPattern, match="several groups"):
        attn.read(weights, x, grid=(6, 6))


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 24), ("small", 53), ("base", 94)])
def test_published_sizes(preset, millions):
    with torch.device("meta"):
        model = Network(**Network.presets[preset])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_the_network_alternates_and_reads_images_of_any_size():
    options = {"dim": 16, "depths": [2, 2, 2, 2], "head_dim": 8, "groups": [1, 2, 4, 8], "image": 64, "classes": 5}
    model = crosslight.create("dat-plus-plus", preset="tiny", **options)
    maps = model.features(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[1:]) for f in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    kinds = [
        [type(getattr(b.attend, "core", b.attend)) for b in stage if hasattr(b, "attend")] for stage in model.stages
    ]
    assert kinds == [[NeighbourhoodAttention, DeformableAttention]] * 3 + [[DeformableAttention] * 2]


def test_the_bias_is_read_between_the_entries_of_the_table():
    attn = still(stride=1)
    attn.table = torch.nn.Parameter(torch.zeros(2, 7, 7, dtype=torch.double))
    with torch.no_grad():
        attn.table[:] = torch.arange(7.0).double().view(7, 1)  # rises with the row of the query less that of the point
        attn.q.weight.zero_()
        attn.q.bias.zero_()
    x = torch.randn(1, 16, 8, dtype=torch.double)
    weights = attn.weights(x, grid=(4, 4))[0, 0]
    # A row further up is a step of one entry, e times the weight.
    assert (weights[15, 0] / weights[15, 4]).item() == pytest.approx(math.e)


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="groups: got 3, expected a divisor of heads = 2"):
        DeformableAttention(8, 2, groups=3)
