"""Halo attention: timm's layer and network, the equations pixel by pixel, limits, downsampling, published sizes."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.halonet import Halo, Network
from crosslight.errors import CrosslightError

D = 4


def heads(n: int, batch: int = 2, count: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, batch, count, n, D, dtype=torch.double).unbind()


def pixel_by_pixel(core: Halo, q, k, v, grid, *, causal: bool = False, stride: int = 1) -> torch.Tensor:
    """The equations with loops; the map goes on with `halo` zeros."""
    (height, width), b, h = grid, core.block, core.halo
    zero, out, origin = torch.zeros_like(k[:, :, 0]), [], core.block + 3 * core.halo - 1
    for r in range(0, height, stride):
        for c in range(0, width, stride):
            top, left = r // b * b - h, c // b * b - h
            keys, values, scores, ask = [], [], [], q[:, :, r * width + c]
            for i in range(top, min(top + b + 2 * h, height + h)):
                for j in range(left, min(left + b + 2 * h, width + h)):
                    if causal and (i, j) > (r, c):
                        continue
                    inside = 0 <= i < height and 0 <= j < width
                    keys.append(k[:, :, i * width + j] if inside else zero)
                    values.append(v[:, :, i * width + j] if inside else torch.zeros_like(v[:, :, 0]))
                    relative = core.rows[origin + i - r] + core.columns[origin + j - c]
                    scores.append((ask * keys[-1]).sum(-1) / D**0.5 + ask @ relative)
            share = torch.stack(scores, -1).softmax(-1)
            out.append((share.unsqueeze(-1) * torch.stack(values, 2)).sum(2))
    return torch.stack(out, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("grid", "block", "halo"), [((4, 6), 2, 1), ((5, 7), 3, 2), ((3, 4), 2, 0), ((4, 4), 4, 1)])
def test_equals_the_equations(grid, block, halo, causal):
    core = Halo(2, D, block=block, halo=halo).double()
    q, k, v = heads(grid[0] * grid[1])
    expected = pixel_by_pixel(core, q, k, v, grid, causal=causal)
    torch.testing.assert_close(core(q, k, v, grid=grid, causal=causal), expected)
    torch.testing.assert_close(core.weights(q, k, grid=grid, causal=causal) @ v, expected)


@pytest.mark.parametrize("width", [2, 3 * D, 40])
def test_values_may_be_of_another_width(width):
    core, (q, k, _), v = Halo(2, D, block=2, halo=1).double(), heads(12), torch.randn(2, 2, 12, width).double()
    torch.testing.assert_close(core(q, k, v, grid=(3, 4)), pixel_by_pixel(core, q, k, v, (3, 4)))


@pytest.mark.parametrize("grid", [(4, 8), (6, 5)])
def test_downsampling_asks_every_other_query(grid):
    core = Halo(2, D, block=4, halo=1).double()
    q, k, v = heads(grid[0] * grid[1])
    y = core(q, k, v, grid=grid, stride=2)
    torch.testing.assert_close(y, pixel_by_pixel(core, q, k, v, grid, stride=2))
    kept = core(q, k, v, grid=grid).unflatten(2, grid)[:, :, ::2, ::2].flatten(2, 3)
    torch.testing.assert_close(y, kept)
    torch.testing.assert_close(core.weights(q, k, grid=grid, stride=2) @ v, y)


def test_blocks_of_the_whole_map_without_halo_are_full_attention_with_relative_positions():
    core = Halo(2, D, block=4, halo=0).double()
    q, k, v = heads(16)
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    relative = core.rows[row - row[:, None] + 3] + core.columns[column - column[:, None] + 3]
    bias = torch.einsum("bhid,ijd->bhij", q, relative)
    torch.testing.assert_close(core(q, k, v, grid=(4, 4)), F.scaled_dot_product_attention(q, k, v, bias))


def test_a_block_sees_its_halo_and_nothing_else():
    x = torch.randn(1, 8 * 12, 8, dtype=torch.double, requires_grad=True)
    for halo in (0, 2):
        attn = crosslight.create("halonet", dim=8, heads=2, block=4, halo=halo).double()
        y = attn(x, grid=(8, 12)).unflatten(1, (8, 12))[:, 4:8, 4:8]
        seen = torch.autograd.grad(y.square().sum(), x)[0].abs().sum(-1).unflatten(1, (8, 12))[0] > 0
        expected = torch.zeros(8, 12, dtype=torch.bool)
        expected[4 - halo :, 4 - halo : 8 + halo] = True
        assert torch.equal(seen, expected)


def test_shifts_by_a_block_carry_over_and_others_do_not():
    core = Halo(2, D, block=4, halo=1).double()
    q, k, v = (t.unflatten(2, (4, 16)) for t in heads(64))

    def shifted(by: int) -> float:
        """How far the output of the inner columns is from that of the shifted map."""
        y = core(*(t.flatten(2, 3) for t in (q, k, v)), grid=(4, 16)).unflatten(2, (4, 16))
        moved = core(*(t.roll(by, 3).flatten(2, 3) for t in (q, k, v)), grid=(4, 16)).unflatten(2, (4, 16))
        return (moved.roll(-by, 3) - y)[:, :, :, 4:8].abs().max().item()

    assert shifted(4) < 1e-12
    assert shifted(1) > 1e-3


def attention_state(state: dict[str, torch.Tensor], heads: int, dim: int) -> dict[str, torch.Tensor]:
    """Of timm's HaloAttn, for q, k, v and the tables. Its kv holds, head by head, keys and then values."""
    kv = state["kv.weight"].flatten(1).unflatten(0, (heads, -1))
    return {
        "q.weight": state["q.weight"].flatten(1),
        "k.weight": kv[:, :dim].flatten(0, 1),
        "v.weight": kv[:, dim:].flatten(0, 1),
        "core.rows": state["pos_embed.height_rel"],
        "core.columns": state["pos_embed.width_rel"],
    }


def test_equals_timms_layer():
    halo_attn = pytest.importorskip("timm.layers.halo_attn")
    theirs = halo_attn.HaloAttn(12, num_heads=3, dim_head=4, block_size=4, halo_size=2).double()
    attn = crosslight.create("halonet", dim=12, heads=3, block=4, halo=2, bias=False).double()
    attn.load_state_dict(attention_state(theirs.state_dict(), 3, 4) | {"out.weight": torch.eye(12)})
    x = torch.randn(2, 12, 8, 12).double()
    torch.testing.assert_close(attn(x.flatten(2).mT, grid=(8, 12)), theirs(x).flatten(2).mT)


def test_equals_timms_network(monkeypatch):
    byobnet = pytest.importorskip("timm.models.byobnet")
    # timm counts the offsets of strided queries as if these were neighbours.
    monkeypatch.setattr(Halo, "places", lambda self, count, stride, device: torch.arange(count, device=device))
    count, dim = 2, 8
    stages = [
        byobnet.ByoBlockCfg(
            type="self_attn",
            d=depth,
            c=dim << i,
            s=2 if i else 1,
            gs=0,
            br=1.0,
            self_attn_layer="halo",
            self_attn_kwargs={"block_size": 4, "halo_size": 1, "num_heads": count << i, "dim_head": dim // count},
        )
        for i, depth in enumerate((3, 3, 1, 3))
    ]
    config = byobnet.ByoModelCfg(blocks=stages, stem_chs=dim, stem_type="7x7", stem_pool="maxpool", num_features=20)
    theirs = byobnet.ByobNet(config, num_classes=5).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)  # the last of a block starts at zero
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    model = Network(dim, block=4, halo=1, depth=1, final=20, head_dim=dim // count, classes=5).eval()
    model.load_state_dict(renamed(theirs.state_dict(), count, dim // count))
    images = torch.randn(2, 3, 128, 256)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=1e-4)


def renamed(state: dict[str, torch.Tensor], heads: int, dim: int) -> dict[str, torch.Tensor]:
    parts = {"conv1_1x1": "enter", "conv3_1x1": "leave", "shortcut": "shortcut"}
    own: dict[str, torch.Tensor] = {}
    attention: dict[str, dict[str, torch.Tensor]] = {}
    for name, t in state.items():
        first, *rest = name.replace(".conv.weight", ".0.weight").replace(".bn.", ".1.").split(".")
        if first == "head":
            own[f"head.{rest[-1]}"] = t
        elif first in ("stem", "final_conv"):
            rest = rest[1:] if rest[0] == "conv" and len(rest) > 2 else rest
            own[".".join([{"stem": "stages.0.0.0", "final_conv": "last.0"}[first], *rest[-2:]])] = t
        else:
            block = f"stages.{rest[0]}.{int(rest[1]) + (rest[0] == '0')}"
            if rest[2] == "self_attn":
                attention.setdefault(block, {})[".".join(rest[3:])] = t
            elif rest[2] == "post_attn":
                own[f"{block}.norm.{rest[-1]}"] = t
            else:
                own[".".join([block, parts[rest[2]], *rest[3:]])] = t
    for block, held in attention.items():
        found = attention_state(held, heads << int(block.split(".")[1]), dim)
        own |= {f"{block}.attend.{name}": t for name, t in found.items()}
    return own


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("h0", 5.5), ("h1", 8.1), ("h2", 9.4), ("h3", 11.8), ("h4", 19.1), ("h5", 30.7), ("h6", 43.4), ("h7", 67.4)],
)
def test_published_sizes(preset, millions):
    with torch.device("meta"):
        model = Network(**Network.presets[preset])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_the_network_reads_images():
    model = crosslight.create("halonet", preset="h5", dim=16, block=4, halo=1, depth=1, final=24, classes=5).eval()
    maps = model.features(torch.randn(1, 3, 96, 128))
    assert [tuple(f.shape[1:]) for f in maps] == [(32, 24, 32), (64, 12, 16), (128, 6, 8), (256, 3, 4)]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="halo: got -1"):
        Halo(2, D, halo=-1)
    with pytest.raises(CrosslightError, match="stride: got 3, expected a divisor of block = 4"):
        Halo(2, D, block=4)(*(t.float() for t in heads(16)), grid=(4, 4), stride=3)
