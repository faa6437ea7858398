"""Dual PatchNorm: a LayerNorm before and one after the patch embedding, and nothing else.

Kumar, Dehghani and Houlsby, "Dual PatchNorm", 2023, arXiv 2302.01327.

    p_i: patch i of the image, flattened           (batch, m, width), width = channels P^2
    e_i = LN_1(W LN_0(p_i) + b)                    (batch, m, dim); plain patch embedding is W p_i + b
    q, k, v = W_q e, W_k e, W_v e                  softmax attention, unchanged
    y = W_o [A_1 V_1 ; ... ; A_h V_h]              (batch, n, dim)

LN_0 takes brightness and contrast from each patch: the embedding, and so the attention, do not change when a patch
becomes a p + b, a > 0 (up to eps). It also brings the gradient of the embedding to the scale of that of other layers.
A strided convolution cannot normalise what it reads, so patches are unfolded first (`patches`).

The paper changes the stem, not the attention. The layer here is the smallest thing with that stem which one stream can
read: the stream that is read holds flattened patches (of ``context_dim``), and softmax attention reads their
embedding; in self-attention the queries come from it too. It has 2 width + 2 dim numbers more than the same layer
with the plain embedding. `ViT` is the network of the paper: a plain ViT on the embedded patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.backbone import Block, initialise
from crosslight.attention.base import AttentionLayer
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

Norms = Literal["dual", "pre", "post", "none"]

CARD = Card(
    id="dual-patchnorm",
    kind="token",
    group="scores",
    title="Dual PatchNorm",
    year=2023,
    paper="2302.01327",
    code="google-research/big_vision",
    summary="The tokens that attention reads are patches, normalised before and after they are embedded.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="vit-pytorch's patch embedding and timm's ViT (plain embedding) with the same weights; the parameter "
    "counts of timm's ViTs and the two norms",
    differs="The paper changes the embedding of a ViT and leaves attention as it is. To be a layer from stream to "
    "stream, the embedding comes with the softmax attention that reads it. The evidence trains the paper's network.",
    evidence=Evidence(
        claim="under changing brightness and contrast a ViT with both norms reads digits better than the plain ViT",
        task="jittered-digits",
        metric="accuracy",
        margin=0.01,
        baseline="dual-patchnorm",
        baseline_options={"norms": "none"},
    ),
)


class PatchEmbedding(nn.Module):
    """LN_1(W LN_0(p) + b): flattened patches (..., width) -> (..., dim).

    Args:
        norms: "dual", or an ablation: "pre" (LN_0 only), "post" (LN_1 only), "none".
        affine: whether the norms have scale and bias.
        rms: root-mean-square norms instead, without mean and bias.
    """

    def __init__(
        self, width: int, dim: int, norms: Norms = "dual", *, affine: bool = True, rms: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        expect(norms in get_args(Norms), "norms", repr(norms), f"one of {', '.join(get_args(Norms))}")
        make: Any = nn.RMSNorm if rms else nn.LayerNorm
        self.pre = make(width, eps, affine) if norms in ("dual", "pre") else nn.Identity()
        self.project = nn.Linear(width, dim)
        self.post = make(dim, eps, affine) if norms in ("dual", "post") else nn.Identity()

    def forward(self, patches: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch dim"]:
        return self.post(self.project(self.pre(patches)))


def patches(images: Float[Tensor, "batch channels height width"], size: int) -> Float[Tensor, "batch m features"]:
    """The size x size patches of images in reading order, each flattened channel by channel."""
    height, width = images.shape[2:]
    expect(height % size == 0 and width % size == 0, "images", (height, width), f"sides that are multiples of {size}")
    cut = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@register(CARD)
class DualPatchNorm(AttentionLayer):
    """softmax attention that reads patches through `PatchEmbedding`.

    Args:
        dim, heads, bias: as in `AttentionLayer`.
        context_dim: width of the patches that are read, dim unless given.
        norms, affine, rms, eps: as in `PatchEmbedding`.
    """

    network: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        context_dim: int | None = None,
        bias: bool = True,
        norms: Norms = "dual",
        affine: bool = True,
        rms: bool = False,
        eps: float = 1e-6,
    ) -> None:
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        super().__init__(Softmax(heads, dim // heads), dim, bias=bias)
        self.context_dim = dim if context_dim is None else context_dim
        self.embed = PatchEmbedding(self.context_dim, dim, norms, affine=affine, rms=rms, eps=eps)

    def _heads(self, x, context, how, offset=0):
        tokens = self.embed(context)
        return super()._heads(x if how.cross else tokens, tokens, how, offset)

    def _read(self, weights, x, context, how):
        return super()._read(weights, x, self.embed(context), how)


class ViT(nn.Module):
    """Images (batch, channels, side, side) -> logits (batch, classes): a plain pre-norm ViT on normalised patches.

    Args:
        image, patch: sides of the image and of a patch.
        norms: those of `PatchEmbedding`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"image": 8, "patch": 2, "dim": 32, "depth": 2, "heads": 4, "classes": 10, "channels": 1},
        "ti16": {"dim": 192, "heads": 3},
        "s16": {"dim": 384, "heads": 6},
        "b16": {"dim": 768, "heads": 12},
        "b32": {"dim": 768, "heads": 12, "patch": 32},
        "l16": {"dim": 1024, "heads": 16, "depth": 24},
    }
    #: timm's vit_*_patch*_224, and 2 * 3 P^2 + 2 dim.
    published: ClassVar[dict[str, int]] = {
        "ti16": 5_717_416 + 2 * 768 + 2 * 192,
        "s16": 22_050_664 + 2 * 768 + 2 * 384,
        "b16": 86_567_656 + 2 * 768 + 2 * 768,
        "b32": 88_224_232 + 2 * 3072 + 2 * 768,
        "l16": 304_326_632 + 2 * 768 + 2 * 1024,
    }

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        *,
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        norms: Norms = "dual",
    ) -> None:
        super().__init__()
        expect(image % patch == 0, "image", image, f"a multiple of patch = {patch}")
        self.patch = patch
        self.embed = PatchEmbedding(channels * patch**2, dim, norms)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image // patch) ** 2, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, Softmax.build(dim, heads), eps=1e-6) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        initialise(self)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x = self.embed(patches(images, self.patch))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        expect(x.shape[1] == self.positions.shape[1], "images", tuple(images.shape), "the side that the ViT has")
        x = x + self.positions
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x)[:, 0])


DualPatchNorm.network = ViT
