"""MODA: modular duplex attention, whose keys of one modality are moved by what the other modality's keys stand for.

Zhang, Xia, Zhao, Zhou, Liu, Zhu, Qin, Wan, Zhang, Yang, "MODA: MOdular Duplex Attention for Multimodal Perception,
Cognition, and Emotion Understanding", 2025, arXiv 2507.04635.

The sequence is [N visual tokens ; text]. First align, for each head, with k after the rotation:

    u = (k + 1e-6) / |k + 1e-6|                                    unit keys, (n, d)
    G_t = U_t^T V_t,   G_v = U_v^T V_v,   rows of length 1         bases of text and image, (heads, d, d)
    k_v <- W_v (k_v + r_v * u_v G_t)                               image keys, into the text's space
    k_t <- W_t (k_t + r_t * u_t G_v)                               text keys, into the image's space

then correct: A = softmax(Q K^T / sqrt(d) + M), with a mask of its own for each pair of modalities. r starts at 0 and W
at the identity, so that the layer starts as attention under M alone. Text alone (N = 0) is left as it is. The bases do
not grow with the sequence: aligning is linear in it, and needs no further matrix of n x n.

As image keys depend on the text behind them, the text of the basis ends at ``prompt``; answer tokens after it are read
by no token before them, and the next-token loss on the answer is valid. The first call of `step` takes image and prompt
together. `Modular` is the mask: a rule for each pair of modalities, which any row takes as ``mask=``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.aki_mma import PrefixLayer
from crosslight.attention.base import head_width
from crosslight.attention.ruled import Ruled
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Keys = Float[Tensor, "batch kv_heads n head_dim"]
    Basis = Float[Tensor, "batch kv_heads head_dim head_dim"]

CARD = Card(
    id="moda",
    kind="token",
    group="positions-masks",
    title="MODA: MOdular Duplex Attention for Multimodal Perception, Cognition, and Emotion Understanding",
    year=2025,
    paper="2507.04635",
    code="KwaiVGI/MODA",
    summary="Keys of image and text are mapped into each other's space by a Gram matrix of keys and values before "
    "softmax, under a mask for each pair of modalities.",
    patterns=("noncausal-self",),
    why_not="Image keys depend on the prompt after them: the mask is part of the mechanism, causal from the prompt on, "
    "and image and text are parts of one sequence.",
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"images": 4},
    checked="the aligner written out one head and token at a time; causal scaled_dot_product_attention at r = 0 and "
    "W = 1; prefill and cached decoding against the full pass",
    differs="The released code maps image keys only (duplex=False), though the paper describes both directions. It "
    "also takes all text of a training sequence into the basis, the answer too; ``prompt`` ends it. Its mask is "
    "causal, which is the default; how the paper's mask adapts is in no code that was read. W starts at the identity.",
    evidence=Evidence(
        claim="questions about an image are answered better when the keys of image and text are mapped into each "
        "other's space than under the causal mask alone",
        task="image-question",
        metric="accuracy",
        margin=0.02,
        options={"images": 4},
    ),
)

EPS = 1e-6


@dataclass(frozen=True)
class Modular(Mask):
    """A rule for each pair of modalities: the first ``images`` tokens are visual, those after them text.

    Attributes:
        visual: for visual queries and keys; None lets all through.
        visual_text: for visual queries and text keys.
        text_visual: for text queries and visual keys.
        text: for text queries and keys.
    """

    images: int
    visual: Mask | None = None
    visual_text: Mask | None = None
    text_visual: Mask | None = None
    text: Mask | None = None

    @property
    def shared(self):
        rules = (self.visual, self.visual_text, self.text_visual, self.text)
        return all(rule is None or rule.shared for rule in rules)

    def visible(self, b, h, i, j):
        everything = (i >= 0) & (j >= 0)

        def of(rule: Mask | None) -> Tensor:
            return everything if rule is None else rule.visible(b, h, i, j)

        image = torch.where(j < self.images, of(self.visual), of(self.visual_text))
        return torch.where(i < self.images, image, torch.where(j < self.images, of(self.text_visual), of(self.text)))


class ModularSoftmax(Ruled):
    """softmax under ``rule``; ``prefix`` tokens are to be decoded at once."""

    def __init__(self, heads: int, head_dim: int, rule: Mask, prefix: int) -> None:
        super().__init__(heads, head_dim, rule)
        self.prefix = prefix


@dataclass
class ModaCache:
    """How many tokens were decoded, their aligned keys and values, and the basis of the image."""

    length: int
    state: KVCache
    basis: Tensor | None


@register(CARD)
class ModularDuplexAttention(PrefixLayer):
    """softmax attention over aligned keys.

    Args:
        dim, heads, kv_heads, head_dim, bias, position: as in `AttentionLayer`.
        images: visual tokens, at the start of the sequence.
        prompt: where the text of the basis ends, visual tokens counted; all text is in it unless given.
        duplex: map text keys too.
        bidirectional: visual tokens read all visual tokens; the mask is causal otherwise.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
        images: int = 576,
        prompt: int | None = None,
        duplex: bool = True,
        bidirectional: bool = False,
    ) -> None:
        expect(isinstance(images, int) and images >= 0, "images", images, "a number >= 0")
        expect(prompt is None or prompt >= images, "prompt", prompt, f"a place from images = {images} on, or None")
        causal = masks.causal()
        rule = Modular(images, None, causal, causal, causal) if bidirectional else causal
        core = ModularSoftmax(heads, head_width(dim, heads, head_dim), rule, max(images, prompt or 0, 1))
        super().__init__(core, dim, kv_heads=kv_heads, bias=bias, position=position)
        self.images, self.prompt, self.duplex = images, prompt, duplex
        self.ratio_v, self.fuse_v = self._fusion()
        if duplex:
            self.ratio_t, self.fuse_t = self._fusion()

    def _fusion(self) -> tuple[nn.Parameter, nn.Linear]:
        fuse = nn.Linear(self.head_dim, self.head_dim, bias=False)
        nn.init.eye_(fuse.weight)
        return nn.Parameter(torch.zeros(self.head_dim)), fuse

    def basis(self, k: Keys, v: Keys, keep: Bool[Tensor, "batch n"] | None = None) -> Basis:
        """U^T V with rows of length 1 (0 where there is no token)."""
        u = _unit(k)
        if keep is not None:
            u = u * keep[:, None, :, None].to(u.dtype)
        return F.normalize(u.transpose(-1, -2) @ v, dim=-1)

    def _aligned(self, k: Keys, v: Keys, keep: Tensor | None) -> tuple[Keys, Basis | None]:
        """The aligned keys of a whole sequence, and the basis of its image."""
        if not self.images:
            return k, None
        image, text, told = slice(self.images), slice(self.images, None), slice(self.images, self.prompt)
        of_text = self.basis(k[:, :, told], v[:, :, told], None if keep is None else keep[:, told])
        seen = self.fuse_v(k[:, :, image] + self.ratio_v * (_unit(k[:, :, image]) @ of_text))
        if not self.duplex:
            return torch.cat([seen, k[:, :, text]], 2), None
        of_image = self.basis(k[:, :, image], v[:, :, image], None if keep is None else keep[:, image])
        return torch.cat([seen, self._aligned_text(k[:, :, text], of_image)], 2), of_image

    def _aligned_text(self, k: Keys, basis: Basis) -> Keys:
        return self.fuse_t(k + self.ratio_t * (_unit(k) @ basis))

    def _heads(self, x, context, how, offset=0):
        q, k, v = super()._heads(x, context, how, offset)
        return q, self._aligned(k, v, masks.split(how.mask)[1])[0], v

    def _step(self, x, cache, context, how):
        length = 0 if cache is None else cache.length
        q, k, v = super()._heads(x, x, how, offset=length)
        if cache is None:
            k, basis = self._aligned(k, v, None)
            state = KVCache.start(k, v)
        else:
            basis = cache.basis
            state = cache.state.append(k if basis is None else self._aligned_text(k, basis), v)
        # A rule asks where the query stands.
        y = self.core(q, state.keys, state.values, offset=length, **self._extra(how))
        return self._merge(y, x), ModaCache(length + x.shape[1], state, basis)


def _unit(k: Keys) -> Keys:
    return F.normalize(k + EPS, dim=-1)
