"""Dual attention: timm's layer and network, invariances of the channel attention, what carries a change how far."""

import pytest
import torch

import crosslight
from crosslight.attention.davit import ChannelGroups, Network
from crosslight.attention.twins import LSA
from crosslight.testing import flops


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "cpe1.proj": "position1",
        "cpe2.proj": "position2",
        "attn.proj": "attend.out",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
        "head.norm": "norm",
        "head.fc": "head",
    }
    own = {}
    for name, t in state.items():
        parts = name.split(".")
        channel = False
        if parts[0] == "stem":
            parts = ["stages", "0", "0", *parts[1:]]
        elif parts[0] == "stages" and parts[2] == "downsample":
            parts = [*parts[:2], "0", *parts[3:]]
        elif parts[0] == "stages":  # stages.i.blocks.pair.which
            channel = parts[4] == "1"
            parts = [*parts[:2], str(1 + 2 * int(parts[3]) + int(parts[4])), *parts[5:]]
        name = ".".join(parts)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "attn.qkv" in name:
            for part, chunk in zip("vqk" if channel else "qkv", t.chunk(3), strict=True):
                own[name.replace("attn.qkv", f"attend.{part}")] = chunk
        else:
            own[name] = t
    return own


def test_equals_timms_layer():
    theirs = pytest.importorskip("timm.models.davit").ChannelAttention(12, num_heads=3, qkv_bias=True).double()
    attn = crosslight.create("davit", dim=12, heads=3).double()
    own = renamed({f"stages.0.blocks.0.1.attn.{name}": t for name, t in theirs.state_dict().items()})
    attn.load_state_dict({name.removeprefix("stages.0.2.attend."): t for name, t in own.items()})
    x = torch.randn(2, 20, 12).double()
    torch.testing.assert_close(attn(x), theirs(x))


def test_equals_timms_network():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dims": (8, 16, 32, 64), "num_heads": (2, 4, 8, 16), "depths": (1, 2, 1, 1)}
    theirs = timm.create_model("davit_tiny", window_size=2, num_classes=10, **sizes).eval()
    model = Network(8, (1, 2, 1, 1), window=2, head_dim=4, classes=10).eval()
    model.load_state_dict(renamed(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 126)  # the width is filled up to a multiple of 4
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_channels_do_not_care_where_positions_are():
    core, order = ChannelGroups(2, 4).double(), torch.randperm(20)
    q, k, v = torch.randn(3, 2, 2, 20, 4, dtype=torch.double).unbind()
    torch.testing.assert_close(core.channels(q[:, :, order], k[:, :, order]), core.channels(q, k))
    moved = core(q[:, :, order], k[:, :, order], v[:, :, order])
    torch.testing.assert_close(moved, core(q, k, v)[:, :, order])
    for n in (1, 7, 20):
        assert core.channels(q[:, :, :n], k[:, :, :n]).shape == (2, 2, 4, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_equations_channel_by_channel(causal):
    core = ChannelGroups(1, 3).double()
    q, k, v = torch.randn(3, 1, 1, 6, 3, dtype=torch.double).unbind()
    y = core(q, k, v, causal=causal)[0, 0]
    for i in range(6):
        seen = slice(0, i + 1) if causal else slice(None)
        for c in range(3):
            alike = torch.stack([q[0, 0, seen, c] @ k[0, 0, seen, other] for other in range(3)]) / 3**0.5
            torch.testing.assert_close(y[i, c], alike.softmax(0) @ v[0, 0, i])


def test_a_change_stays_in_its_window_until_channels_spread_it():
    x = torch.randn(1, 64, 8).double()
    changed = x.clone()
    changed[0, 0] += 1
    spatial, channel = LSA.build(8, 2, window=4).double(), crosslight.create("davit", dim=8, heads=2).double()
    before, after = spatial(x, grid=(8, 8)), spatial(changed, grid=(8, 8))
    inside = {8 * r + c for r in range(4) for c in range(4)}
    assert set((before - after)[0].abs().sum(-1).nonzero().flatten().tolist()) == inside
    spread = channel(before, grid=(8, 8)) - channel(after, grid=(8, 8))
    assert (spread[0].abs().sum(-1) > 0).all()


def test_work_grows_with_the_pixels():
    model = Network(8, (1, 1, 1, 1), window=2, head_dim=4, classes=5)
    work = [flops.measure(lambda s=s: model(torch.randn(1, 3, s, s))).flops for s in (64, 256)]
    assert flops.growth(work[0], work[1], 16) < 1.05


def test_blocks_alternate():
    model = crosslight.create("davit", preset="tiny", dim=32, depths=[1, 1, 2, 1], classes=3)
    kinds = [type(block.attend.core) for block in list(model.stages[2])[1:]]
    assert kinds == [LSA, ChannelGroups, LSA, ChannelGroups]
    assert [tuple(f.shape[1:]) for f in model.features(torch.randn(1, 3, 70, 64))] == [
        (32, 18, 16),
        (64, 9, 8),
        (128, 5, 4),
        (256, 3, 2),
    ]
