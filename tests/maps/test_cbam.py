"""CBAM: parity with timm, parameter count, invariances of its two gates, the paper's ablations."""

import pytest
import torch

import crosslight
from crosslight.errors import CrosslightError
from crosslight.maps.cbam import ChannelGate, SpatialGate


def test_equals_timm():
    layers = pytest.importorskip("timm.layers.cbam")
    ours, theirs = crosslight.create("cbam", channels=32, reduction=8, norm=True), layers.CbamModule(32, rd_ratio=1 / 8)
    names = {
        "channel.fc1.weight": "channel.mlp.0.weight",
        "channel.fc2.weight": "channel.mlp.2.weight",
        "spatial.conv.conv.weight": "spatial.conv.weight",
    }
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            name: state[names.get(name, name.replace("spatial.conv.bn", "spatial.norm"))].view_as(t)
            for name, t in theirs.state_dict().items()
        }
    )
    x = torch.randn(2, 32, 6, 9)
    for train in (True, False):
        torch.testing.assert_close(ours.train(train)(x), theirs.train(train)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("norm", "extra"), [(False, 0), (True, 2)])
def test_parameter_count(norm, extra):
    gate = crosslight.create("cbam", channels=64, norm=norm)
    assert sum(p.numel() for p in gate.parameters()) == 2 * 64 * 64 // 16 + 2 * 7 * 7 + extra


def test_channel_gate_ignores_where_things_are():
    gate, x = ChannelGate(16, 4), torch.randn(2, 16, 4, 6)
    shuffled = x.flatten(2)[..., torch.randperm(24)].view_as(x)
    torch.testing.assert_close(gate.weights(shuffled), gate.weights(x))


def test_spatial_gate_ignores_the_order_of_channels():
    gate, x = SpatialGate(16), torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(gate.weights(x[:, torch.randperm(16)]), gate.weights(x))


def test_orders_are_what_they_say():
    x = torch.randn(2, 16, 5, 5)
    gates = {}
    for order in ("channel-spatial", "spatial-channel", "parallel", "channel", "spatial"):
        gates[order] = crosslight.create("cbam", channels=16, reduction=4, order=order)
        gates[order].load_state_dict(gates["channel-spatial"].state_dict(), strict=False)
    channel, spatial = gates["channel-spatial"].channel, gates["channel-spatial"].spatial
    expected = {
        "channel-spatial": spatial(channel(x)),
        "spatial-channel": channel(spatial(x)),
        "parallel": x * channel.weights(x) * spatial.weights(x),
        "channel": channel(x),
        "spatial": spatial(x),
    }
    for order, gate in gates.items():
        torch.testing.assert_close(gate(x), expected[order])


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_one_kind_of_pooling(pool):
    gate = ChannelGate(8, 2, pool=(pool,))
    x = torch.randn(2, 8, 4, 4)
    pooled = x.mean((2, 3)) if pool == "avg" else x.amax((2, 3))
    torch.testing.assert_close(gate.weights(x).flatten(1), gate.mlp(pooled).sigmoid())
    assert SpatialGate(8, pool=(pool,)).conv.in_channels == 1


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"order": "both"}, "order"), ({"pool": ("min",)}, "pool"), ({"reduction": 99}, "reduction")],
)
def test_wrong_options_are_refused(options, argument):
    with pytest.raises(CrosslightError, match=argument):
        crosslight.create("cbam", channels=16, **options)
