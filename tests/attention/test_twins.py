"""Twins: timm's layers and networks, limits in which both layers are plain attention, who reads whom."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight import testing
from crosslight.attention.twins import LSA, Network
from crosslight.errors import CrosslightError, UnsupportedPattern


def create(**options):
    return crosslight.create("twins", dim=12, heads=3, **options).double()


def split(name: str, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """qkv.* and kv.* of timm as q.*, k.*, v.*."""
    for joined in ("qkv", "kv"):
        start, found, end = name.rpartition(f"{joined}.")
        if found:
            return {f"{start}{p}.{end}": c for p, c in zip(joined, t.chunk(len(joined)), strict=True)}
    return {name: t}


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "attn.proj": "attend.out",
        "attn.sr": "attend.summaries.conv",
        "attn.norm": "attend.summaries.norm",
        "attn.": "attend.",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    own: dict[str, torch.Tensor] = {}
    for name, t in state.items():
        parts = name.split(".")
        if parts[0] == "patch_embeds":
            parts = ["stages", parts[1], {"proj": "patches", "norm": "norm"}[parts[2]], *parts[3:]]
        elif parts[0] == "pos_block":
            parts = ["stages", parts[1], "blocks", "0", "position", parts[-1]]
        elif parts[0] == "blocks":
            parts = ["stages", parts[1], "blocks", *parts[2:]]
        name = ".".join(parts)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        own |= split(name, t)
    return own


def layer_state(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        n.removeprefix("attend."): t
        for n, t in renamed({f"attn.{n}": t for n, t in theirs.state_dict().items()}).items()
    }


def test_equals_timms_layers():
    twins = pytest.importorskip("timm.models.twins")
    x = torch.randn(2, 48, 12).double()
    for options, theirs in (
        ({"window": 2}, twins.LocallyGroupedAttn(12, 3, ws=2)),
        ({"reduction": 2}, twins.GlobalSubSampleAttn(12, 3, sr_ratio=2)),
    ):
        attn, theirs = create(**options), theirs.double()
        attn.load_state_dict(layer_state(theirs))
        torch.testing.assert_close(attn(x, grid=(8, 6)), theirs(x, (8, 6)))


@pytest.mark.parametrize("name", ["svt_small", "pcpvt_small"])
def test_equals_timms_network(name):
    timm = pytest.importorskip("timm")
    sizes = {"embed_dims": [8, 16, 24, 32], "depths": [2, 2, 3, 2], "num_heads": [1, 2, 2, 4]}
    windows = {"wss": [2, 2, 2, 2]} if name == "svt_small" else {}
    theirs = timm.create_model(f"twins_{name}", num_classes=10, **sizes, **windows).eval()
    own = {"dims": sizes["embed_dims"], "depths": sizes["depths"], "heads": sizes["num_heads"]}
    preset = Network.presets[name] | own | ({"window": 2} if windows else {})
    model = Network(**preset, classes=10).eval()
    model.load_state_dict(renamed(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_a_window_as_large_as_the_map_and_a_reduction_of_one_are_plain_attention():
    x = torch.randn(2, 30, 12).double()
    for attn in (create(window=6), create(reduction=1)):
        q, k, v = (part(x).unflatten(2, (3, 4)).transpose(1, 2) for part in (attn.q, attn.k, attn.v))
        expected = attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attn(x, grid=(5, 6)), expected)


def reach(y: torch.Tensor, x: torch.Tensor, token: int) -> set[int]:
    slope = torch.autograd.grad(y[:, token].square().sum(), x, retain_graph=True)[0]
    return set(slope.abs().sum((0, 2)).nonzero().flatten().tolist())


def test_windows_read_themselves_and_summaries_join_all():
    x = torch.randn(1, 7 * 9, 12, dtype=torch.double, requires_grad=True)  # no multiple of the window
    local, wide = create(window=4), create(reduction=4)
    y = local(x, grid=(7, 9))
    assert reach(y, x, 9 * 5 + 6) == {9 * r + c for r in range(4, 7) for c in range(4, 8)}
    assert reach(y, x, 8) == {9 * r + 8 for r in range(4)}
    assert reach(wide(y, grid=(7, 9)), x, 0) == set(range(63))


@pytest.mark.parametrize("grid", [(6, 9), (7, 5)])
def test_local_attention_window_by_window(grid):
    n = grid[0] * grid[1]
    q, k, v = torch.randn(3, 2, 2, n, 4, dtype=torch.double).unbind()
    expected, cells = torch.empty_like(q), torch.arange(n).view(grid)
    for rows in cells.split(3):
        for window in rows.split(3, 1):
            index = window.flatten()
            expected[:, :, index] = F.scaled_dot_product_attention(q[:, :, index], k[:, :, index], v[:, :, index])
    torch.testing.assert_close(LSA(2, 4, window=3)(q, k, v, grid=grid), expected)


def test_the_weight_of_a_summary_is_spread_over_its_tokens():
    attn, x = create(reduction=2), torch.randn(1, 16, 12).double()
    keep = torch.ones(1, 16, dtype=torch.bool)
    keep[0, [0, 1, 2, 4, 5]] = False  # the first window, and one token of the second
    weights = attn.weights(x, grid=(4, 4), mask=keep)
    assert weights[..., [0, 1, 2, 4, 5]].eq(0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3, 16).double())
    torch.testing.assert_close(weights[..., 3], weights[..., 6])
    torch.testing.assert_close(attn.read(weights, x, grid=(4, 4), mask=keep), attn(x, grid=(4, 4), mask=keep))


def test_the_local_form_conforms():
    skip = ("published_sizes", "compiles")
    assert all(outcome.result != "failed" for outcome in testing.check(LSA, skip=skip))
    with pytest.raises(UnsupportedPattern, match="no noncausal-cross"):
        create(window=4)(torch.randn(1, 4, 12).double(), torch.randn(1, 4, 12).double())
    with pytest.raises(UnsupportedPattern, match="no causal-self"):
        create()(torch.randn(1, 4, 12).double(), causal=True)


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="reduction: got 0"):
        create(reduction=0)
    with pytest.raises(CrosslightError, match="window: got 0"):
        create(window=0)
