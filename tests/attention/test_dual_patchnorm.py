"""Dual PatchNorm: the embedding against vit-pytorch, the network against timm, what the two norms take away."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.dual_patchnorm import DualPatchNorm, PatchEmbedding, ViT, patches
from crosslight.errors import CrosslightError

DIM, HEADS, WIDTH = 16, 2, 12


def make(**options):
    return crosslight.create("dual-patchnorm", **{"dim": DIM, "heads": HEADS, **options}).double()


def test_embedding_is_that_of_vit_pytorch():
    theirs = pytest.importorskip("vit_pytorch").ViT(
        image_size=8, patch_size=4, num_classes=3, dim=DIM, depth=1, heads=2, mlp_dim=8, channels=2
    )
    rearrange, pre, linear, post = theirs.to_patch_embedding
    ours = PatchEmbedding(2 * 16, DIM, eps=pre.eps)
    for norm in (pre, post):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    ours.project.load_state_dict(linear.state_dict())
    ours.pre.load_state_dict(pre.state_dict())
    ours.post.load_state_dict(post.state_dict())
    images = torch.randn(3, 2, 8, 8)
    # Their patches are flattened pixel by pixel, ours channel by channel.
    theirs_flat = patches(images, 4).unflatten(2, (2, 16)).transpose(2, 3).flatten(2)
    assert torch.equal(rearrange(images), theirs_flat)
    assert torch.allclose(ours(theirs_flat), theirs.to_patch_embedding(images), atol=1e-6)


def test_patches_are_cut_out_in_reading_order():
    images = torch.randn(2, 3, 6, 9)
    cut = [images[:, :, i : i + 3, j : j + 3].flatten(1) for i in range(0, 6, 3) for j in range(0, 9, 3)]
    assert torch.equal(patches(images, 3), torch.stack(cut, 1))
    with pytest.raises(CrosslightError, match="images: got"):
        patches(images, 4)


def test_plain_network_is_timms_vit():
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=DIM, depth=2, num_heads=HEADS, num_classes=5
    ).eval()
    ours = ViT(DIM, 2, HEADS, image=16, patch=4, classes=5, norms="none").eval()
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("patch_embed.proj", "embed.project").replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
        name = name.replace("cls_token", "cls").replace("pos_embed", "positions").replace("attn.proj", "attend.out")
        if "qkv" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attend.{letter}")] = part
        else:
            state[name] = value.flatten(1) if name == "embed.project.weight" else value
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_parameters_grow_by_the_two_norms():
    def count(norms, context_dim):
        return sum(p.numel() for p in make(norms=norms, context_dim=context_dim).parameters())

    for width in (WIDTH, DIM):
        assert count("dual", width) - count("none", width) == 2 * width + 2 * DIM
        assert count("pre", width) - count("none", width) == 2 * width
        assert count("post", width) - count("none", width) == 2 * DIM


@pytest.mark.parametrize(("norms", "invariant"), [("dual", True), ("pre", True), ("post", False), ("none", False)])
def test_brightness_and_contrast_of_a_patch_do_not_matter(norms, invariant):
    attn = make(norms=norms, eps=1e-12)
    x = torch.randn(2, 7, DIM, dtype=torch.double)
    gain, offset = torch.rand(2, 7, 1).double() + 0.5, torch.randn(2, 7, 1).double()
    assert torch.allclose(attn(gain * x + offset), attn(x), atol=1e-9) == invariant


def test_network_does_not_see_contrast_of_the_image():
    torch.manual_seed(1)
    images = torch.rand(2, 1, 8, 8)
    for norms, invariant in (("dual", True), ("none", False)):
        torch.manual_seed(0)
        model = ViT(**(ViT.presets["tiny"] | {"norms": norms}))
        assert torch.allclose(model(0.5 * images + 0.2), model(images), atol=1e-4) == invariant


def test_layer_is_attention_over_patches_normalised_one_by_one():
    attn = make(context_dim=WIDTH)
    embed = attn.embed
    for norm in (embed.pre, embed.post):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x, z = torch.randn(2, 3, DIM).double(), torch.randn(2, 5, WIDTH).double()

    def normal(t, norm):
        return (t - t.mean()) / (t.var(unbiased=False) + 1e-6).sqrt() * norm.weight + norm.bias

    tokens = torch.stack(
        [
            torch.stack(
                [normal(embed.project.weight @ normal(p, embed.pre) + embed.project.bias, embed.post) for p in i]
            )
            for i in z
        ]
    )
    plain = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        plain.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        plain.out_proj.load_state_dict(attn.out.state_dict())
    assert torch.allclose(attn(x, z), plain(x, tokens, tokens)[0], atol=1e-10)


def test_patches_do_not_leak_into_each_other():
    embed = PatchEmbedding(WIDTH, DIM)
    p = torch.randn(4, WIDTH, requires_grad=True)
    # Not the sum of squares, which the norm holds constant.
    (slope,) = torch.autograd.grad(embed(p)[1].exp().sum(), p)
    assert torch.equal(slope.abs().sum(1) > 1e-3, torch.tensor([False, True, False, False]))


def test_norms_have_variants():
    assert not list(PatchEmbedding(WIDTH, DIM, affine=False).pre.parameters())
    assert isinstance(PatchEmbedding(WIDTH, DIM, rms=True).post, nn.RMSNorm)
    with pytest.raises(CrosslightError, match="norms: got 'both'"):
        DualPatchNorm(DIM, HEADS, norms="both")
