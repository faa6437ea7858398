"""Parity with timm, published parameter counts, and the invariants of the fusion block."""

import pytest
import torch

import crosslight
from crosslight.errors import CrosslightError
from crosslight.fusion.crossvit import CrossFusion, CrossViT

ATTENTION = {"wq": "q", "wk": "k", "wv": "v", "proj": "out"}


def from_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's parameters under this library's names."""
    out = {}
    for name, t in state.items():
        part, *rest = name.split(".")
        if part.startswith(("cls_token_", "pos_embed_")):
            out[("class_token." if part.startswith("cls") else "position.") + part[-1]] = t
        elif part == "patch_embed":
            out[".".join(["embed", rest[0], *rest[2:]])] = t
        elif part in ("norm", "head"):
            out[".".join([part + "s", *rest])] = t
        else:
            stage, kind, branch, *rest = rest
            if kind == "blocks":
                to = f"stages.{stage}.branches.{branch}.{rest[0]}."
                if rest[2] == "qkv":
                    for own, piece in zip("qkv", t.chunk(3), strict=True):
                        out[f"{to}attend.{own}.{rest[3]}"] = piece
                else:
                    leaf = {"attn": "attend.out.", "mlp": f"mlp.{0 if rest[2] == 'fc1' else 2}."}
                    out[to + leaf.get(rest[1], f"{rest[1]}.") + rest[-1]] = t
            else:
                to = f"stages.{stage}.fusion.crossings.{branch}."
                if kind == "fusion":
                    leaf = "norms.0" if rest[0] == "norm1" else f"attend.0.{ATTENTION[rest[1]]}"
                    out[f"{to}{leaf}.{rest[-1]}"] = t
                else:
                    out[f"{to}{'into' if kind == 'projs' else 'back'}.{rest[0]}.{rest[1]}"] = t
    return out


@pytest.mark.parametrize("preset", ["tiny_240", "9_dagger_240"])
def test_logits_equal_timm(preset):
    timm = pytest.importorskip("timm")
    theirs, ours = timm.create_model(f"crossvit_{preset}").eval(), crosslight.create("crossvit", preset=preset).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # norms and biases too must be told apart
            p.add_(0.02 * torch.randn_like(p))
        ours.load_state_dict(from_timm(theirs.state_dict()))
        images = torch.randn(2, 3, 240, 240)
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", CrossViT.presets)
def test_published_parameter_counts(preset):
    with torch.device("meta"):
        ours = crosslight.create("crossvit", preset=preset)
    assert sum(p.numel() for p in ours.parameters()) == CrossViT.published[preset]
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(f"crossvit_{preset}")
    assert sum(p.numel() for p in theirs.parameters()) == CrossViT.published[preset]


def test_patches_pass_bit_identical_and_class_tokens_change():
    block, streams = CrossFusion.sample()
    for name, y in block(streams).items():
        assert torch.equal(y[:, 1:], streams[name][:, 1:])
        assert not torch.equal(y[:, :1], streams[name][:, :1])


def test_maps_have_one_query_and_the_other_branchs_patches():
    block, streams = CrossFusion.sample()
    maps = block.weights(streams)
    assert maps["small", "large"].shape == (2, 2, 1, 1 + 5)
    assert maps["large", "small"].shape == (2, 2, 1, 1 + 6)


def test_without_rounds_the_branches_never_meet():
    small = {"image_size": (24, 16), "patch_size": (6, 8), "dims": (8, 16), "heads": (2, 2), "blocks": (1, 1)}
    images = torch.randn(1, 3, 24, 24)
    for rounds, meets in ((0, False), (1, True)):
        net = crosslight.create("crossvit", **small, stages=1, rounds=rounds, classes=5)
        first, _ = net.branches(images)
        grad = torch.autograd.grad(first.sum(), net.position[1], allow_unused=True)[0]
        assert (grad is not None) == meets
        assert net(images).shape == (1, 5)


def test_create_tells_the_block_from_the_network():
    block = crosslight.create("crossvit", streams={"a": 8, "b": 16}, heads=(2, 4), rounds=2)
    assert isinstance(block, CrossFusion)
    assert block.crossings[0].attend[0].heads == 4
    with pytest.raises(CrosslightError, match=r"got classes, expected with streams only heads, rounds"):
        crosslight.create("crossvit", streams={"a": 8, "b": 16}, classes=4)
    with pytest.raises(CrosslightError, match="image_size"):
        crosslight.create("crossvit", image_size=(250, 224))
    with pytest.raises(CrosslightError, match=r"images: got \(1, 1, 240, 240\)"):
        crosslight.create("crossvit", stages=1)(torch.zeros(1, 1, 240, 240))
