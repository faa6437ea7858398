"""TransNeXt: the equations token by token, the shown matrix, cosine attention as a limit, memory, the network."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.transnext import AggregatedAttention, Cosine
from crosslight.errors import CrosslightError, UnsupportedPattern
from crosslight.testing import flops


def layer(dim: int = 8, heads: int = 2, **options) -> AggregatedAttention:
    attn = AggregatedAttention(dim, heads, **{"pool": 2, **options}).double()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return attn


def bins(side: int, cells: int) -> list[range]:
    """The tokens of each cell of a pooled axis; cells overlap where the side is no multiple."""
    return [range(c * side // cells, -(-(c + 1) * side // cells)) for c in range(cells)]


def spaced(offset: float, side: int) -> float:
    x = offset / (side - 1) * 8
    return math.copysign(math.log2(abs(x) + 1) / math.log2(8), x)


@pytest.mark.parametrize(("grid", "pool"), [((4, 6), 2), ((5, 7), 3)])
def test_equals_the_equations_token_by_token(grid, pool):
    attn, (height, width) = layer(pool=pool), grid
    x = torch.randn(1, height * width, 8, dtype=torch.double)
    cells = [(rows, columns) for rows in bins(height, pool) for columns in bins(width, pool)]
    features = F.gelu(x[0] @ attn.reduce.weight.T + attn.reduce.bias)
    pooled = [torch.stack([features[r * width + c] for r in rows for c in columns]).mean(0) for rows, columns in cells]
    pooled = attn.norm(torch.stack(pooled))
    y = torch.zeros(height * width, 8, dtype=torch.double)
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        q, k, v = (p(x[0])[:, part] for p in (attn.q, attn.k, attn.v))
        far_k, far_v = attn.k(pooled)[:, part], attn.v(pooled)[:, part]
        for i in range(height * width):
            near = [(i // width + p // 3 - 1, i % width + p % 3 - 1) for p in range(9)]
            inside = [p for p, (r, c) in enumerate(near) if 0 <= r < height and 0 <= c < width]
            index = [near[p][0] * width + near[p][1] for p in inside]
            unit = q[i] / q[i].norm()
            scaled = (unit + attn.embedding[h, 0]) * F.softplus(attn.temperature[h])[0]
            scaled = scaled * math.log(len(inside) + len(cells))
            local = k[index] / k[index].norm(dim=1, keepdim=True) @ scaled + attn.local_bias[h, 0, inside]
            offsets = [
                [
                    spaced(i // width - sum(rows) / len(rows), height),
                    spaced(i % width - sum(columns) / len(columns), width),
                ]
                for rows, columns in cells
            ]
            far = far_k / far_k.norm(dim=1, keepdim=True) @ scaled
            far = far + attn.position(torch.tensor(offsets, dtype=torch.double))[:, h]
            weights = torch.cat([local, far]).softmax(0)
            beside = (unit @ attn.tokens[h] + attn.tokens_bias[h, 0])[inside]
            y[i, part] = (weights[: len(inside)] + beside) @ v[index] + weights[len(inside) :] @ far_v
    torch.testing.assert_close(attn(x, grid=grid)[0], attn.out(y))


def test_shown_rows_sum_to_one_and_hold_the_window():
    attn, x = layer(), torch.randn(2, 30, 8, dtype=torch.double)
    weights = attn.weights(x, grid=(5, 6))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 30).double())
    assert (weights > 0).all(), "pooled cells cover the map"
    keep = torch.ones(2, 30, dtype=torch.bool)
    keep[:, ::3] = False
    weights = attn.weights(x, grid=(5, 6), mask=keep)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 30).double())
    assert (weights[..., ::3] == 0).all()
    with pytest.raises(UnsupportedPattern, match="read"):
        attn.read(weights, x, grid=(5, 6))


def test_an_unpooled_map_with_a_closed_window_is_scaled_cosine_attention():
    """The window's only key is closed by its bias, the pooled features are made the tokens themselves."""
    attn, grid = layer(window=1, pool=4), (4, 4)
    with torch.no_grad():
        attn.local_bias.fill_(-1e9)
        attn.tokens.zero_()
        attn.tokens_bias.zero_()
    attn._pooled = lambda x, keep, grid: x
    full = Cosine(8, 2).double()
    full.load_state_dict(attn.state_dict(), strict=False)
    with torch.no_grad():  # the closed key still counts: log 17 instead of log 16
        ratio = F.softplus(attn.temperature) * math.log(17) / math.log(16)
        full.temperature.copy_(ratio.expm1().log())
    x = torch.randn(2, 16, 8, dtype=torch.double)
    torch.testing.assert_close(attn(x, grid=grid), full(x, grid=grid))
    torch.testing.assert_close(attn.weights(x, grid=grid), full.weights(x, grid=grid))


def test_cosine_attention_equals_its_equation():
    attn = Cosine(8, 2).double()
    x, grid = torch.randn(1, 12, 8, dtype=torch.double), (3, 4)
    q, k, v = (p(x)[0].unflatten(1, (2, 4)).transpose(0, 1) for p in (attn.q, attn.k, attn.v))
    place = [(i // 4, i % 4) for i in range(12)]
    offsets = [[[spaced(a - c, 3), spaced(b - d, 4)] for c, d in place] for a, b in place]
    bias = attn.position(torch.tensor(offsets, dtype=torch.double)).permute(2, 0, 1)
    q = (q / q.norm(dim=-1, keepdim=True) + attn.embedding) * F.softplus(attn.temperature) * math.log(12)
    scores = q @ (k / k.norm(dim=-1, keepdim=True)).mT + bias
    y = attn.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(attn(x, grid=grid)[0], y)
    torch.testing.assert_close(attn.read(attn.weights(x, grid=grid), x, grid=grid), attn(x, grid=grid))


def test_memory_is_linear_at_a_fixed_pooled_size():
    attn = AggregatedAttention(8, 2, pool=4)
    largest = [
        flops.measure(lambda side=side: attn(torch.randn(1, side * side, 8), grid=(side, side))).largest
        for side in (16, 32)
    ]
    assert largest[1] <= 4.2 * largest[0]


def test_the_network_reads_images_of_several_sizes():
    model = crosslight.create("transnext", preset="tiny", dim=16, depths=[1, 1, 1, 1], head_dim=8, image=64, classes=5)
    maps = model.features(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[1:]) for f in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert [type(stage.attends[0]) for stage in model.stages] == [AggregatedAttention] * 3 + [Cosine]
    assert model.stages[0].attends[0].pool == 2


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="window: got 4, expected an odd number"):
        AggregatedAttention(8, 2, window=4)
