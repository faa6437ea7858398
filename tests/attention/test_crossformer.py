"""CrossFormer: the groups, the equations group by group, what reaches what, and the published sizes."""

import pytest
import torch

import crosslight
from crosslight import testing
from crosslight.attention import grouped
from crosslight.attention.base import How
from crosslight.attention.crossformer import CrossFormer, Network
from crosslight.attention.grouped import Cut
from crosslight.errors import UnsupportedPattern
from crosslight.testing import flops

HEADS, D = 2, 4


def heads(n: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 2, HEADS, n, D, dtype=torch.double).unbind()


def core(**options) -> CrossFormer:
    return CrossFormer(HEADS, D, **options).double()


def groups_of(height: int, width: int, size: int, long: bool) -> dict:
    """Tokens by group, with their place in it."""
    rows, columns = -(-height // size), -(-width // size)
    found: dict = {}
    for r in range(height):
        for c in range(width):
            group = (r % rows, c % columns) if long else (r // size, c // size)
            place = (r // rows, c // columns) if long else (r % size, c % size)
            found.setdefault(group, []).append((r * width + c, place))
    return found


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("grid", [(6, 9), (7, 5)])
def test_equals_the_equations_group_by_group(grid, long):
    attn, n = core(group=3, long=long), grid[0] * grid[1]
    q, k, v = heads(n)
    expected = torch.empty_like(q)
    for members in groups_of(*grid, 3, long).values():
        index = [token for token, _ in members]
        place = torch.tensor([p for _, p in members]).double()
        bias = attn.bias.layers(place[:, None] - place[None]).permute(2, 0, 1)
        scores = q[:, :, index] @ k[:, :, index].mT / D**0.5 + bias
        expected[:, :, index] = scores.softmax(-1) @ v[:, :, index]
    torch.testing.assert_close(attn(q, k, v, grid=grid), expected)
    torch.testing.assert_close(attn.weights(q, k, grid=grid) @ v, expected)


@pytest.mark.parametrize("spread", [False, True])
def test_groups_hold_every_token_once(spread):
    x = torch.randn(2, HEADS, 35, D)
    cut = Cut((5, 7), (3, 3), spread)
    members = cut.members(x.device)
    assert sorted(members.flatten().tolist()) == [-1] * (54 - 35) + list(range(35))
    assert torch.equal(grouped.put_back(grouped.take(x, members), members, 35), x)
    stream = x.transpose(1, 2).flatten(2)
    groups = cut.split(stream)
    listed = stream[:, members.clamp(min=0)].masked_fill((members < 0)[..., None], 0)
    assert torch.equal(groups, listed.flatten(0, 1))
    assert torch.equal(cut.join(groups), stream)


@pytest.mark.parametrize("long", [False, True])
def test_the_layer_cuts_its_stream_as_the_core_its_heads(long):
    attn = crosslight.create("crossformer", dim=8, heads=2, group=3, long=long).double()
    x = torch.randn(2, 54, 8).double()
    expected = attn.core(*attn._heads(x, x, How()), grid=(6, 9))
    torch.testing.assert_close(attn(x, grid=(6, 9)), attn._merge(expected, x))


def test_a_group_as_large_as_the_map_is_dense_attention():
    short, long = core(group=4), core(group=4, long=True)
    long.load_state_dict(short.state_dict())
    q, k, v = heads(16)
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    bias = short.bias.layers(place[:, None] - place[None]).permute(2, 0, 1)
    expected = (q @ k.mT / D**0.5 + bias).softmax(-1) @ v
    for attn in (short, long):
        torch.testing.assert_close(attn(q, k, v, grid=(4, 4)), expected)


def reach(y: torch.Tensor, x: torch.Tensor, token: int) -> set[int]:
    slope = torch.autograd.grad(y[:, token].sum(), x, retain_graph=True)[0]
    return set(slope.abs().sum((0, 2)).nonzero().flatten().tolist())


def test_windows_and_intervals_are_what_a_token_sees():
    x = torch.randn(1, 64, 8, dtype=torch.double, requires_grad=True)
    layers = [crosslight.create("crossformer", dim=8, heads=2, group=4, long=long).double() for long in (False, True)]
    token = 8 * 5 + 2  # row 5, column 2
    near = {8 * r + c for r in range(4, 8) for c in range(4)}
    far = {8 * r + c for r in range(1, 8, 2) for c in range(0, 8, 2)}
    assert reach(layers[0](x, grid=(8, 8)), x, token) == near
    assert reach(layers[1](x, grid=(8, 8)), x, token) == far
    both = layers[1](layers[0](x, grid=(8, 8)), grid=(8, 8))
    assert reach(both, x, token) == set(range(64)), "G^2 >= H, so a pair of layers joins all tokens"


@pytest.mark.parametrize("long", [False, True])
def test_work_and_memory_grow_with_the_map(long):
    attn = crosslight.create("crossformer", dim=8, heads=2, group=4, long=long)
    small, large = (
        flops.measure(lambda side=side: attn(torch.randn(1, side * side, 8), grid=(side, side))) for side in (16, 64)
    )
    assert flops.growth(small.flops, large.flops, 16) < 1.05
    assert large.largest <= 16 * small.largest


def test_the_long_form_conforms():
    checks = ("shapes_at_any_length", "fast_path_equals_weights", "causal_does_not_leak", "any_mask_is_honoured")
    report = testing.check("crossformer", only=checks, options={"long": True})
    assert all(outcome.result == "passed" for outcome in report)
    attn = crosslight.create("crossformer", dim=8, heads=2, group=2, long=True)
    with pytest.raises(UnsupportedPattern, match="long=True"):
        attn.step(torch.randn(1, 1, 8))


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 27.8), ("small", 30.7), ("base", 52.0), ("large", 92.0)])
def test_published_sizes(preset, millions):
    with torch.device("meta"):
        model = Network(**Network.presets[preset])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_the_network_reads_images_and_alternates():
    model = crosslight.create("crossformer", preset="tiny", dim=16, depths=[1, 2, 2, 1], heads=[1, 2, 2, 4], classes=5)
    assert [block.attend.core.long for block in model.stages[2].blocks] == [False, True]
    assert [tuple(f.shape[1:]) for f in model.features(torch.randn(1, 3, 64, 96))] == [
        (16, 16, 24),
        (32, 8, 12),
        (64, 4, 6),
        (128, 2, 3),
    ]
    assert [conv.out_channels for conv in model.stages[0].embed.convs] == [8, 4, 2, 2]
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 5)
