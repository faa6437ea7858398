"""GET: both attentions window by window, the groups, the histograms of events, the network."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.get_event_transformer import (
    GroupAggregation,
    GroupEmbedding,
    GroupEventAttention,
    Network,
    histograms,
)
from crosslight.errors import CrosslightError

DIM, HEADS, W, GROUPS = 12, 2, 4, 3


def layer() -> GroupEventAttention:
    attn = GroupEventAttention(DIM, HEADS, window=W, groups=GROUPS).double()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn


def spaced(offset: float, side: int) -> float:
    x = 8 * offset / (side - 1)
    return math.copysign(math.log2(abs(x) + 1) / math.log2(8), x)


def bias(mlp, places: list[tuple[int, int]], sides: tuple[int, int]) -> torch.Tensor:
    pairs = [[[spaced(a - c, sides[0]), spaced(b - d, sides[1])] for c, d in places] for a, b in places]
    return 16 * mlp.fall(mlp.rise(torch.tensor(pairs, dtype=torch.double)).relu()).sigmoid().permute(2, 0, 1)


def windows_of(height: int, width: int) -> list[list[tuple[int, int]]]:
    """(token, place) of each window; places beyond the map are left out."""
    return [
        [
            (r * width + c, (r - top) * W + c - left)
            for r in range(top, min(top + W, height))
            for c in range(left, min(left + W, width))
        ]
        for top in range(0, height, W)
        for left in range(0, width, W)
    ]


@pytest.mark.parametrize("grid", [(8, 4), (6, 7)])
def test_equals_the_equations_window_by_window(grid):
    attn, n = layer(), grid[0] * grid[1]
    x = torch.randn(2, n, DIM, dtype=torch.double)
    of_places = bias(attn.bias, [(p // W, p % W) for p in range(W * W)], (W, W))
    of_channels = bias(attn.group_bias, [(c % 4, c // 4) for c in range(DIM)], (4, 3))
    y, y_groups = torch.empty_like(x), torch.empty_like(x)
    unit = lambda t: t / t.norm(dim=-1, keepdim=True)  # noqa: E731
    for window in windows_of(*grid):
        tokens, places = (list(part) for part in zip(*window, strict=True))
        q, k, v = (p(x[:, tokens]).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
        scores = unit(q) @ unit(k).mT * attn.scale.exp() + of_places[:, places][:, :, places]
        y[:, tokens] = attn.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        full = torch.zeros(2, W * W, DIM, dtype=torch.double)
        full[:, places] = y[:, tokens]
        q, k, v = (p(full.mT).unflatten(2, (W, -1)).transpose(1, 2) for p in (attn.group_q, attn.group_k, attn.group_v))
        weights = (unit(q) @ unit(k).mT + of_channels).softmax(-1)
        y_groups[:, tokens] = attn.group_out((weights @ v).transpose(1, 2).flatten(2)).mT[:, places]
    close = {"atol": 1e-6, "rtol": 1e-6}
    for found, expected in zip(attn.both(x, grid=grid), (y, y_groups), strict=True):
        torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(attn(x, grid=grid), y + y_groups, **close)
    torch.testing.assert_close(attn.read(attn.weights(x, grid=grid), x, grid=grid), attn(x, grid=grid))


def test_the_attention_of_channels_has_a_matrix_a_window_and_head():
    attn, x = layer(), torch.randn(2, 48, DIM, dtype=torch.double)
    weights = attn.group_weights(x, grid=(8, 6))
    assert weights.shape == (2, 4, W, DIM, DIM)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, W, DIM).double())


def test_the_scale_is_at_most_a_hundred():
    attn, x = layer(), torch.randn(1, 16, DIM, dtype=torch.double)
    torch.nn.init.constant_(attn.scale, math.log(100))
    at_most = attn.weights(x, grid=(4, 4))
    torch.nn.init.constant_(attn.scale, 50.0)
    torch.testing.assert_close(attn.weights(x, grid=(4, 4)), at_most)


def groups_read(module: torch.nn.Module, channels: int, old: int, new: int) -> list[set[int]]:
    """The groups of the input that each group of the output depends on."""
    x = torch.randn(1, channels, 4, 4, requires_grad=True)
    parts = module(x).unflatten(1, (new, -1))
    slopes = [torch.autograd.grad(parts[:, j].square().sum(), x, retain_graph=True)[0] for j in range(new)]
    return [set(s.unflatten(1, (old, -1)).abs().sum((0, 2, 3, 4)).nonzero().flatten().tolist()) for s in slopes]


def test_group_convolutions_read_their_own_groups():
    embed = GroupEmbedding(24, 8, 4, hidden=32)
    assert groups_read(embed.conv, 24, 4, 4) == [{0}, {1}, {2}, {3}]
    aggregate = GroupAggregation(12, 6)
    aggregate.norm = torch.nn.Identity()  # which joins all channels
    assert groups_read(aggregate, 12, 6, 3) == [{0, 1}, {1, 2, 3}, {3, 4, 5}]
    assert GroupAggregation(12, 6)(torch.randn(1, 12, 8, 6)).shape == (1, 24, 4, 3)


def some_events(count: int) -> torch.Tensor:
    t = torch.rand(count) * 1000
    return torch.stack([t, *(torch.randint(0, high, (count,)).float() for high in (16, 8, 2))], 1)


def test_histograms_count_every_event_once_in_any_order():
    events = [some_events(50), some_events(7)]
    found = histograms(events, (8, 16))
    assert found.shape == (2, 12 * 2 * 16, 2, 4)
    kinds = found.unflatten(1, (12, 2, 16))
    assert kinds[:, :, 0].sum((1, 2, 3, 4)).tolist() == [50, 7]
    shuffled = [each[torch.randperm(len(each))] for each in events]
    torch.testing.assert_close(histograms(shuffled, (8, 16)), found)
    t = (events[0][:, 0] - events[0][:, 0].min()) / (events[0][:, 0].max() - events[0][:, 0].min())
    torch.testing.assert_close(kinds[0, :, 1].sum(), t.sum())


def test_an_event_lands_in_its_slice_polarity_pixel_and_patch():
    events = torch.tensor([[0.0, 0, 0, 0], [100.0, 5, 2, 1], [45.0, 15, 7, 1]])
    kinds = histograms([events], (8, 16)).unflatten(1, (6, 2, 2, 16))[0]
    assert kinds.nonzero().tolist() == [
        [0, 0, 0, 0, 0, 0],
        [2, 1, 0, 15, 1, 3],
        [2, 1, 1, 15, 1, 3],
        [5, 1, 0, 9, 0, 1],
        [5, 1, 1, 9, 0, 1],
    ]
    assert kinds[2, 1, 1, 15, 1, 3].item() == pytest.approx(0.45)
    assert histograms([events[:0]], (8, 16)).eq(0).all()


def test_the_dual_block_changes_one_stream_by_the_mlp():
    block = Network(dim=24, depths=[1, 1, 1]).stages[0].blocks[0].double()
    for norm in (block.norm1, block.norm2):
        torch.nn.init.ones_(norm.weight)
    x, x_groups = torch.randn(2, 1, 64, 24, dtype=torch.double).unbind()
    y, y_groups = block.attend.both(x, grid=(8, 8))
    first = x + F.layer_norm(y, (24,), eps=1e-6)
    second = x_groups + F.layer_norm(y_groups, (24,), eps=1e-6)
    expected = first + F.layer_norm(block.mlp(first + second), (24,), eps=1e-6)
    for found, wanted in zip(block(x, x_groups, (8, 8)), (expected, second), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_network_reads_events():
    model = crosslight.create("get-event-transformer", preset="tiny")
    images = histograms([some_events(200), some_events(30)], (64, 32))
    assert [tuple(f.shape[1:]) for f in model.features(images)] == [(24, 16, 8), (48, 8, 4), (96, 4, 2)]
    assert model(images).shape == (2, 10)
    assert [stage.blocks[0].attend.groups for stage in model.stages] == [12, 6, 3]


def test_convolutions_begin_as_linear_layers_do():
    model = crosslight.create("get-event-transformer", preset="base")
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 3
    for conv in convolutions:
        assert not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="groups: got 5, expected a divisor of dim = 12"):
        GroupEventAttention(12, 2, groups=5)
