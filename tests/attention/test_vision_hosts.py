"""The hosts with their own attention in them: timm's DeiT, Swin and PVTv2, and who reads whom in shifted windows."""

import pytest
import torch

from crosslight.attention.softmax import Softmax
from crosslight.attention.twins import Twins
from crosslight.attention.vision_hosts import Host, Stripes, Windows
from crosslight.errors import CrosslightError

DIMS, DEPTHS, HEADS = [8, 16, 24, 32], [2, 1, 2, 1], [1, 2, 2, 4]


def shuffle(model: torch.nn.Module) -> None:
    """Weights at which biases, norms and positions matter."""
    for p in model.parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1), 0.2)


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    own: dict[str, torch.Tensor] = {}
    for name, t in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name.endswith("relative_position_index") or name.endswith("attn_mask"):
            continue
        if name.endswith("table"):  # (offsets, heads), rows first
            side = int(len(t) ** 0.5)
            t = t.T.unflatten(1, (side, side))
        for joined in ("qkv", "kv"):
            start, found, end = name.rpartition(f".{joined}.")
            if found:
                own |= {f"{start}.{p}.{end}": c for p, c in zip(joined, t.chunk(len(joined)), strict=True)}
                break
        else:
            own[name] = t
    return own


def close(model: torch.nn.Module, theirs: torch.nn.Module, state: dict[str, torch.Tensor], side: int) -> None:
    model.load_state_dict(state)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), theirs.eval()(images), atol=1e-4, rtol=1e-4)


def test_deit_is_timms():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, num_classes=10, embed_dim=12, depth=2, num_heads=3, patch_size=8
    )
    shuffle(theirs)

    def attend(stage, number, dim, heads, grid):
        assert grid == (4, 4)
        return Softmax.build(dim, heads)

    model = Host("deit", attend, [12], [2], [3], [4], image=32, patch=8, classes=10)
    names = {"cls_token": "stages.0.cls", "pos_embed": "stages.0.places", "patch_embed.proj": "stages.0.patches"}
    names |= {"blocks.": "stages.0.blocks.", "attn.proj": "attn.out", "attn.": "attend."}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    close(model, theirs, renamed(theirs.state_dict(), names), 32)
    assert [m.shape for m in model.features(torch.randn(2, 3, 32, 32))] == [(2, 12, 4, 4)]


def test_swin_is_timms():
    timm = pytest.importorskip("timm")
    dims = [8, 16, 32, 64]
    sizes = {"embed_dim": 8, "depths": DEPTHS, "num_heads": HEADS, "window_size": 2}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=10, **sizes)
    shuffle(theirs)

    def attend(stage, number, dim, heads, grid):
        return Windows(dim, heads, grid, window=2, shift=number % 2 if grid[0] > 2 else 0)

    model = Host("swin", attend, dims, DEPTHS, HEADS, [4] * 4, image=64, classes=10)
    names = {"patch_embed": "stages.0.coarser", "layers.": "stages.", "downsample": "coarser", "head.fc": "head"}
    names |= {"reduction": "project", "coarser.proj.": "coarser.conv.", "attn.": "attend.attend."}
    names |= {"relative_position_bias_table": "position.table", "attend.proj": "attend.out"}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    close(model, theirs, renamed(theirs.state_dict(), names), 64)


def test_pvtv2_is_timms():
    timm = pytest.importorskip("timm")
    ratios = [4, 4, 2, 2]
    sizes = {"embed_dims": DIMS, "depths": DEPTHS, "num_heads": HEADS, "mlp_ratios": ratios}
    theirs = timm.create_model("pvt_v2_b0", num_classes=10, **sizes)
    shuffle(theirs)

    def attend(stage, number, dim, heads, grid):
        return Twins(dim, heads, reduction=8 >> stage)

    model = Host("pvtv2", attend, DIMS, DEPTHS, HEADS, ratios, image=64, classes=10)
    names = {"patch_embed": "stages.0.coarser", "downsample": "coarser", "coarser.proj.": "coarser.conv."}
    names |= {"attn.proj": "attn.out", "attn.sr": "attn.summaries.conv", "attn.norm": "attn.summaries.norm"}
    names |= {"attn.": "attend.", "mlp.fc1": "mlp.into", "mlp.fc2": "mlp.out", "mlp.dwconv": "mlp.conv"}
    own = renamed(theirs.state_dict(), names)
    close(model, theirs, own, 64)


def test_pvt_adds_positions_before_its_blocks():
    def attend(stage, number, dim, heads, grid):
        return Twins(dim, heads, reduction=1)

    model = Host("pvt", attend, [8, 16], [0, 0], [1, 2], [4, 4], image=16, classes=0)
    images = torch.randn(2, 3, 16, 16)
    first, second = model.stages
    x = first.coarser(images)[0] + first.places
    x = second.coarser(x.mT.unflatten(2, (4, 4)))[0] + second.places
    torch.testing.assert_close(model(images), x.mean(1))


@pytest.mark.parametrize(("token", "read"), [(0, {0}), (1, {1, 2}), (5, {5, 6, 9, 10}), (15, {15}), (7, {7, 11})])
def test_shifted_windows_end_at_the_border(token, read):
    attn, x = Windows(8, 2, (4, 4), window=2, shift=1), torch.randn(2, 16, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(attn(x, (4, 4))[:, token].square().sum(), x)
    assert set(slope.abs().sum((0, 2)).nonzero().flatten().tolist()) == read


def test_stripes_half_by_half():
    """Columns of two tokens' width for the first half of the heads, rows of that height for the second."""
    attn, x = Stripes(8, 4, (4, 4), stripe=2), torch.randn(2, 16, 8)
    q, k, v = (p(x).unflatten(1, (4, 4)) for p in (attn.q, attn.k, attn.v))
    y = torch.zeros(2, 4, 4, 8)
    for half, conv in enumerate(attn.convs):
        c = slice(4 * half, 4 * half + 4)
        for i in (0, 2):
            stripe = (slice(None), slice(None), slice(i, i + 2), c) if half == 0 else (slice(None), slice(i, i + 2))
            parts = [t[stripe] if half == 0 else t[stripe][..., c] for t in (q, k, v)]
            shape = parts[0].shape
            heads = [t.flatten(1, 2).unflatten(2, (2, 2)).transpose(1, 2) for t in parts]
            read = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(shape)
            read = read + conv(parts[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            if half == 0:
                y[:, :, i : i + 2, c] = read
            else:
                y[:, i : i + 2, :, c] = read
    torch.testing.assert_close(attn(x, (4, 4)), attn.out(y.flatten(1, 2)))
    assert len(Stripes(8, 4, (2, 2), stripe=2).convs) == 1


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="window: got 3"):
        Windows(8, 2, (4, 4), window=3)
    with pytest.raises(CrosslightError, match="stripe: got 3"):
        Stripes(8, 2, (4, 4), stripe=3)
    with pytest.raises(CrosslightError, match="heads: got 3"):
        Stripes(9, 3, (4, 4), stripe=2)
    with pytest.raises(CrosslightError, match="image: got 20"):
        Host("swin", lambda *_: torch.nn.Identity(), [8, 16], [1, 1], [1, 1], [4, 4], image=20)
    with pytest.raises(CrosslightError, match="dims: got"):
        Host("deit", lambda *_: torch.nn.Identity(), [8, 16], [1, 1], [1, 1], [4, 4])
