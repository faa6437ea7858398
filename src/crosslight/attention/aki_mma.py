"""Modality-mutual attention: in a causal sequence, image tokens also read the question that comes after them.

Wang et al., "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
2025, arXiv 2503.02597.

The sequence is [image tokens ; prompt ; answer]. Only the mask changes:

    M_ij = 1   if j <= i,   or if i is an image token and j a token of the prompt;   else 0
    A = softmax(Q K^T / sqrt(d) over M = 1)                  (batch, heads, n, n)

Under a plain causal mask the image is encoded before the question is known. Here image tokens are conditioned on it,
with no parameters and at the same cost. Rows of text are those of a causal mask, and answer tokens are read by no
token before them, so the next-token loss on the answer stays valid. In generation image and prompt are computed once,
and each token after them reads the cached keys and values: the first call of `step` takes image and prompt together.

`ModalityMutual` is the mask for image tokens at the start of the sequence, `mutual` that for tokens named one by one
(several images, prompts of different lengths). Any row takes either as ``mask=``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crosslight.attention.base import AttentionLayer, How
from crosslight.attention.ruled import Ruled
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool

CARD = Card(
    id="aki-mma",
    kind="token",
    group="positions-masks",
    title="Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
    year=2025,
    paper="2503.02597",
    code="sony/aki",
    summary="A causal mask in which image tokens also read the text of the prompt after them.",
    patterns=("noncausal-self",),
    why_not="Image tokens read the prompt after them: the mask is part of the mechanism, causal from the prompt on, "
    "and image and text are parts of one sequence.",
    cost="n^2",
    decode="kv",
    small={"images": 4},
    checked="scaled_dot_product_attention under the explicit matrix; rows of text against causal softmax; prefill and "
    "cached decoding against the full pass",
    differs="Image tokens are causal among themselves, as in the base mask; bidirectional=True lifts that. `step` "
    "takes image and prompt at its first call.",
    evidence=Evidence(
        claim="questions about an image are answered better when image tokens read the question than under a causal "
        "mask",
        task="image-question",
        metric="accuracy",
        margin=0.02,
        options={"images": 4},
    ),
)


@dataclass(frozen=True)
class ModalityMutual(Mask):
    """j <= i, or i is among the first ``images`` tokens and j in the prompt.

    Attributes:
        prompt: where the prompt ends, tokens of the image counted; None if all text is prompt.
        bidirectional: image tokens read all image tokens.
    """

    images: int
    prompt: int | None = None
    bidirectional: bool = False
    shared = True

    def _ahead(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys from ``first`` to ``last``: does the image read some of them, all of them, wherever it stands?"""
        low = 0 if self.bidirectional else self.images
        some, every = last >= low, first >= low
        if self.prompt is None:
            return some, every
        high = max(self.images, self.prompt)
        return some & (first < high), every & (last < high)

    def visible(self, b, h, i, j):
        return (j <= i) | ((i < self.images) & self._ahead(j, j)[0])

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        some, every = self._ahead(j0, j1)
        return (j0 <= i1) | ((i0 < self.images) & some), (j1 <= i0) | ((i1 < self.images) & every)


def mutual(image: Bool[Tensor, "batch n"], prompt: Bool[Tensor, "batch n"]) -> Mask:
    """Modality-mutual attention for tokens named one by one: where the image is, and what it may read ahead."""
    expect(image.shape == prompt.shape and image.dim() == 2, "mutual(image, prompt)", tuple(image.shape), "(batch, n)")
    return masks.causal() | masks.segments(image.long(), 2 - prompt.long())  # both are 1 where the image reads ahead


class PrefixLayer(AttentionLayer):
    """A layer whose first tokens read ahead: `step` takes all of them at its first call, then the next tokens."""

    def __init__(self, core: Any, dim: int, **own: Any) -> None:
        super().__init__(core, dim, **own)
        self.prefix: int = core.prefix

    def step(
        self, x: Tensor, cache: Any = None, *, context: Tensor | None = None, mask: Any = None
    ) -> tuple[Tensor, Any]:
        """Decode. The first call takes image and prompt together, each call after it the next token(s)."""
        expect(context is None, "context", "a tensor", "None: image and text are one sequence")
        expect(mask is None, "mask", type(mask).__name__, "None: nothing is padded while decoding")
        self._check_stream("x", x, self.dim)
        if cache is None:
            expect(
                x.shape[1] >= self.prefix, "x", f"{x.shape[1]} tokens", f"at first the {self.prefix} that read ahead"
            )
        return self._step(x, cache, None, How(causal=True))


@register(CARD)
class ModalityMutualAttention(Ruled):
    """softmax attention under `ModalityMutual`.

    Args:
        images: image tokens, at the start of the sequence.
        prompt: where the prompt ends, tokens of the image counted; all text is prompt unless given.
        bidirectional: image tokens read all image tokens.
    """

    layer = PrefixLayer

    def __init__(
        self, heads: int, head_dim: int, images: int = 144, prompt: int | None = None, bidirectional: bool = False
    ) -> None:
        expect(isinstance(images, int) and images >= 0, "images", images, "a number >= 0")
        expect(prompt is None or prompt >= images, "prompt", prompt, f"a place from images = {images} on, or None")
        super().__init__(heads, head_dim, ModalityMutual(images, prompt, bidirectional))
        self.prefix = max(images, prompt or 0, 1)  # tokens that read ahead or are read so

    def step(self, q, k, v, state, **extra):
        return super().step(q, k, v, state, causal=False, **extra)  # the rule says how far ahead tokens read
