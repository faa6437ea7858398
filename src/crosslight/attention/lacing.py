"""LACING's dual attention: images and text are each read by a softmax of their own, and the two outputs are added.

Zhao et al., "Looking Beyond Text: Reducing Language bias in Large Vision-Language Models via Multimodal Dual-Attention
and Soft-Image Guidance", 2024, arXiv 2411.14279.

The sequence is [N visual tokens ; text], with one set of projections:

    o_v = softmax(Q K_v^T / sqrt(d)) V_v                  over the visual tokens, all of them for every query
    o_t = softmax(Q K_t^T / sqrt(d) + causal) V_t         over the text up to the query
    y = W_o (c o_v + o_t)                                 (batch, n, dim), c = 1

In one softmax over both, text takes what it gets from the image. Here the image has a row sum of its own. Visual tokens
see one another in both directions and no text; without any, the layer is causal attention. `weights` is
(batch, 2 heads, n, n): first the matrices over the image, then those over the text. The masks are parts that exist:
`masks.sink(N)`, and `masks.causal() & ~masks.sink(N)`.

Soft-image guidance is beside the layer: `SoftImage`, a learned prompt, stands for the image in some training samples,
so that the model learns what language alone would say, and `guided` takes that out while decoding:

    log p = (1 + w) log p(y | image, x) - w log p(y | soft image, x)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosslight.attention.aki_mma import PrefixLayer
from crosslight.attention.base import Core
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.cache import KVCache
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

CARD = Card(
    id="lacing",
    kind="token",
    group="positions-masks",
    title="Looking Beyond Text: Reducing Language bias in Large Vision-Language Models via Multimodal Dual-Attention "
    "and Soft-Image Guidance",
    year=2024,
    paper="2411.14279",
    summary="Visual and text tokens of one sequence are read by a softmax each, so that text takes no weight from the "
    "image.",
    patterns=("noncausal-self",),
    why_not="Visual tokens see one another in both directions: the mask is part of the mechanism, causal in the text, "
    "and image and text are parts of one sequence.",
    cost="n^2",
    decode="kv",
    small={"images": 4},
    checked="scaled_dot_product_attention on the visual and on the text keys apart, added; causal softmax attention "
    "without images",
    differs="How the two are joined (a sum), that visual tokens read no text, and how often the soft image stands in "
    "are not taken from released code. `step` takes the image at its first call.",
    evidence=Evidence(
        claim="where nine questions in ten of the training give the answer away, two softmaxes still look at the image "
        "better than one",
        task="image-question",
        metric="accuracy",
        margin=0.02,
        task_options={"prior": 0.9},
        options={"images": 4},
    ),
)


@register(CARD)
class DualAttention(Core):
    """c softmax(q k_v^T) v_v + softmax(q k_t^T) v_t; q (batch, heads, n, d), k and v (batch, kv_heads, n, d).

    Args:
        images: visual tokens, at the start of the sequence.
        visual: c, the weight of what is read from them.
    """

    grouped = True
    takes_bias = True
    layer = PrefixLayer

    def __init__(self, heads: int, head_dim: int, images: int = 144, visual: float = 1.0) -> None:
        super().__init__(heads, head_dim)
        expect(isinstance(images, int) and images >= 0, "images", images, "a number >= 0")
        self.images, self.visual, self.prefix = images, visual, max(images, 1)
        image = masks.sink(images)
        self.rules = (image, masks.causal() & ~image)
        self.softmax = Softmax(heads, head_dim)

    def forward(self, q, k, v, *, mask=None, causal=False, bias=None, offset=0):
        see, read = (
            self.softmax(q, k, v, mask=masks.join(rule, mask), bias=bias, offset=offset) for rule in self.rules
        )
        return self.visual * see + read

    def weights(self, q, k, *, mask=None, causal=False, bias=None, offset=0):
        both = (dense.weights(q, k, mask=masks.join(rule, mask), bias=bias, offset=offset) for rule in self.rules)
        return torch.cat(list(both), 1)

    def read(self, weights, v):
        see, read = weights.chunk(2, 1)
        v = dense.repeat_heads(v, see.shape[1])
        return self.visual * (see @ v) + read @ v

    def step(self, q, k, v, state, **extra):
        state = KVCache.start(k, v) if state is None else state.append(k, v)
        extra["offset"] = state.length - q.shape[2]
        return self(q, state.keys, state.values, **extra), state


class SoftImage(nn.Module):
    """A learned prompt that stands for the image in some samples of a batch.

    Args:
        tokens, dim: those of the image.
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(0.02 * torch.randn(tokens, dim))

    def forward(
        self, image: Float[Tensor, "batch tokens dim"], replace: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The image, or the prompt where ``replace`` is True."""
        return torch.where(replace[:, None, None], self.prompt, image)


def guided(
    logits: Float[Tensor, "*batch vocab"], prior: Float[Tensor, "*batch vocab"], w: float = 1.0, cut: float = 0.0
) -> Float[Tensor, "*batch vocab"]:
    """log p of the guided distribution, from logits with the image and with the soft image (``prior``).

    Args:
        w: how strongly the prior is taken out; 0 is plain decoding.
        cut: tokens that are less likely than ``cut`` times the likeliest one, by ``logits``, are left out.
    """
    expect(0 <= cut <= 1, "cut", cut, "a number from 0 to 1")
    plain = logits.log_softmax(-1)
    out = (1 + w) * plain - w * prior.log_softmax(-1)
    if cut:
        out = out.masked_fill(plain < plain.amax(-1, keepdim=True) + math.log(cut), -math.inf)
    return out.log_softmax(-1)
