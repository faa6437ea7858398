"""EE-MLLM's composite attention: text reads image and text, and an image token reads nothing but itself.

Ma, Zhou, Zhang, Yan, Li, He, Wu, Rao, Zhang, Sun, "EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large
Language Model", 2024, arXiv 2408.11795.

The sequence is [N visual tokens ; text], with the projections of a plain decoder and no parameter besides:

    y_t = W_o softmax(Q_t [K_v ; K_t]^T / sqrt(d) + causal) [V_v ; V_t]       text, over the image and the text so far
    y_v = W_o V_v                                                             each visual token, without attention

Queries are computed for the text only, so work grows with N as N * text, and no N x N tensor exists. The aligner is the
second line in a decoder layer, v' = v + W_o W_v norm(v) and v'' = v' + FFN(norm v'): visual tokens climb through the
layers by the weights of the layers, and text meets them at its own depth. It is ordinary attention under a mask in
which a visual token reads itself. EE-MLLM-F is this layer in the place of a trained one, with its weights.

`Alone` is that mask for visual tokens at the start of the sequence, `composite` the whole mask for tokens named one by
one (a prompt before the image, several images). Any row takes either as ``mask=``. Calls that are not causal let text
read the text after it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslight.attention.ruled import Ruled
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool

CARD = Card(
    id="ee-mllm",
    kind="token",
    group="positions-masks",
    title="EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model",
    year=2024,
    paper="2408.11795",
    summary="Text reads image and text by softmax; image tokens ask nothing and pass on their own values.",
    patterns=("noncausal-self", "causal-self"),
    why_not="Image and text are parts of one sequence that share the projections; a context alone would be softmax "
    "cross-attention.",
    cost="n^2",
    decode="kv",
    small={"images": 4},
    checked="scaled_dot_product_attention under the explicit matrix; a decoder layer of visual tokens written out "
    "without attention",
    differs="The paper is causal only. That visual tokens pass through the layer's own value and output projections is "
    "a reading of 'reusing the weights on each layer of LLM'. The cost is linear in the number of visual tokens.",
    evidence=Evidence(
        claim="questions about an image whose tokens attend to nothing are answered about as well as under full causal "
        "attention",
        task="image-question",
        metric="accuracy",
        margin=-0.02,
        options={"images": 4},
    ),
)


@dataclass(frozen=True)
class Alone(Mask):
    """Each of the first ``count`` queries reads itself only; the others read everything."""

    count: int
    shared = True

    def visible(self, b, h, i, j):
        return (i >= self.count) | (i == j)

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        own = (i0 <= j1) & (j0 <= i1)
        return (i1 >= self.count) | own, (i0 >= self.count) | ((i0 == i1) & (j0 == j1) & (i0 == j0))


def composite(image: Bool[Tensor, "batch n"]) -> Mask:
    """Composite attention for tokens named one by one: text is causal, and image tokens read themselves."""
    expect(image.dim() == 2 and image.dtype == torch.bool, "composite(image)", tuple(image.shape), "bool (batch, n)")
    text = masks.segments(image.long(), torch.zeros_like(image, dtype=torch.long))  # queries outside the image
    return masks.window(0) | (masks.causal() & text)


@register(CARD)
class CompositeAttention(Ruled):
    """[v_visual ; softmax(q_text k^T) v]; q (batch, heads, n, d), k and v (batch, kv_heads, n, d).

    Args:
        images: visual tokens, at the start of the sequence.
    """

    def __init__(self, heads: int, head_dim: int, images: int = 576) -> None:
        expect(isinstance(images, int) and images >= 0, "images", images, "a number >= 0")
        super().__init__(heads, head_dim, Alone(images))
        self.images = images

    def forward(self, q, k, v, *, mask=None, causal=False, bias=None, offset=0):
        if forced() == "reference":
            return self.read(self.weights(q, k, mask=mask, causal=causal, bias=bias, offset=offset), v)
        count = min(max(self.images - offset, 0), q.shape[2])  # queries of visual tokens
        parts = []
        if count:
            own = dense.repeat_heads(v[:, :, offset : offset + count], q.shape[1])
            parts.append(own if mask is None else own * self._may_read_itself(q, mask, offset, count))
        if count < q.shape[2]:
            how = {"mask": mask, "causal": causal, "bias": bias, "offset": offset + count}
            parts.append(dense.attend(q[:, :, count:], k, v, **how))
        return torch.cat(parts, 2)

    def _may_read_itself(self, q: Tensor, mask: Mask, offset: int, count: int) -> Tensor:
        """(#batch, #heads, count, 1): 1 where the mask lets a visual token read itself."""
        b, h = (torch.arange(size, device=q.device) for size in q.shape[:2])
        i = torch.arange(offset, offset + count, device=q.device)
        keep = mask.visible(b.view(-1, 1, 1), h.view(-1, 1), i, i)
        return keep.to(q.dtype).unsqueeze(-1)
