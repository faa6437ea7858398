"""Hierarchical attention for long documents: tokens read their segment, and the segments' first tokens one another.

Chalkidis, Dai, Fergadiotis, Malakasiotis, Elliott, "An Exploration of Hierarchical Attention Transformers for Efficient
Long Document Classification", 2022, arXiv 2210.05529.

The document is S segments of K tokens, each led by a CLS token of its own (tokens 0, K, 2 K, ...):

    y = W_o softmax(Q K^T / sqrt(d)) V      over the keys of a token's own segment          (batch, n, dim)
    u_s = norm(x_sK + y_sK + p_s)           the CLS of segment s with a learned place       (batch, S, dim)
    y_sK <- y_sK + attention(u)_s           the CLS read one another, with weights of their own

Cost is S K^2 + S^2 in place of (S K)^2. Words learn of other segments through their CLS, one layer later: in the layout
"interleaved", which the paper finds best, some layers read across and the others (``across=False``) only within.
`weights` is (batch, 2 heads, n, n): the matrices within segments, then those across, with rows and columns of the CLS
only. `Leaders` is the mask across, and `hierarchical` both in one mask, which any row takes as ``mask=``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Stream = Float[Tensor, "batch n dim"]
    Leading = Float[Tensor, "batch segments dim"]

CARD = Card(
    id="hat-long-document",
    kind="token",
    group="positions-masks",
    title="An Exploration of Hierarchical Attention Transformers for Efficient Long Document Classification",
    year=2022,
    paper="2210.05529",
    code="coastalcph/hierarchical-transformers",
    summary="Tokens attend inside their segment, and the first tokens of all segments attend to one another.",
    patterns=("noncausal-self",),
    why_not="The token that leads a segment sums up what comes after it, and segments are parts of one sequence.",
    cost="n",
    mask="keys",
    small={"segment": 16, "segments": 64},
    checked="scaled_dot_product_attention on the segments apart and on their first tokens; softmax under the masks",
    differs="In the paper the cross-segment encoder is a whole Transformer layer. Here it is the attention of one, and "
    "the MLP is the model's. The cost holds for a fixed length of segments, as long as S^2 is small beside S K^2. "
    "Segments are of equal length, and what a CLS token is called is up to the model.",
    evidence=Evidence(
        claim="an image read in four segments that meet in their first tokens is read about as well as all at once",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"segment": 16},
    ),
)


@dataclass(frozen=True)
class Leaders(Mask):
    """The first tokens of all blocks of ``size`` read one another; no other token reads or is read."""

    size: int
    shared = True

    @property
    def period(self):
        return self.size

    def visible(self, b, h, i, j):
        return (i % self.size == 0) & (j % self.size == 0)

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        some = (i1 // self.size * self.size >= i0) & (j1 // self.size * self.size >= j0)
        return some, some & (((i0 == i1) & (j0 == j1)) | (self.size == 1))


def hierarchical(size: int) -> Mask:
    """A token reads its own segment of ``size``, the first of a segment also the first of every other."""
    return masks.same_block(size) | Leaders(size)


@register(CARD)
class HierarchicalAttention(Mechanism):
    """Attention within segments, then across their first tokens.

    Args:
        dim, heads, head_dim, bias, position: as in `AttentionLayer`; the position is that within segments.
        segment: K, tokens of a segment, its CLS counted; the last segment may be shorter.
        segments: S at most.
        across: whether the CLS read one another.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
        segment: int = 128,
        segments: int = 32,
        across: bool = True,
    ) -> None:
        super().__init__(dim)
        expect(isinstance(segment, int) and segment >= 1, "segment", segment, "a number >= 1")
        expect(isinstance(segments, int) and segments >= 1, "segments", segments, "a number >= 1")
        self.heads, self.segment, self.segments = heads, segment, segments
        self.within = Softmax.build(dim, heads, head_dim=head_dim, bias=bias, position=position)
        self.across = Softmax.build(dim, heads, head_dim=head_dim, bias=bias) if across else None
        if across:
            self.norm, self.places = nn.LayerNorm(dim), nn.Parameter(0.02 * torch.randn(segments, dim))

    def _rule(self, how: How) -> Mask | None:
        return masks.join(masks.same_block(self.segment), how.mask)

    def _leading(self, x: Stream, y: Stream, how: How) -> tuple[Leading, Tensor | None]:
        """What the CLS ask with, and which of them lead a segment that is not empty."""
        lead = (x + y)[:, :: self.segment]
        expect(lead.shape[1] <= self.segments, "x", f"{lead.shape[1]} segments", f"at most segments = {self.segments}")
        keep = masks.split(how.mask)[1]
        return self.norm(lead + self.places[: lead.shape[1]]), None if keep is None else keep[:, :: self.segment]

    def _written(self, y: Stream, z: Leading) -> Stream:
        """y with z added in the places of the CLS."""
        return y + F.pad(z.unsqueeze(2), (0, 0, 0, self.segment - 1)).flatten(1, 2)[:, : y.shape[1]]

    def _forward(self, x, context, how):
        y = self.within(x, mask=self._rule(how))
        if self.across is None:
            return y
        lead, keep = self._leading(x, y, how)
        return self._written(y, self.across(lead, mask=keep))

    def _weights(self, x, context, how):
        within = self.within.weights(x, mask=self._rule(how))
        if self.across is None:
            return within
        lead, keep = self._leading(x, self.within(x, mask=self._rule(how)), how)
        across = torch.zeros_like(within)
        across[:, :, :: self.segment, :: self.segment] = self.across.weights(lead, mask=keep)
        return torch.cat([within, across], 1)

    def _read(self, weights, x, context, how):
        if self.across is None:
            return self.within.read(weights, x)
        within, across = weights.chunk(2, 1)
        y = self.within.read(within, x)
        lead, _ = self._leading(x, y, how)
        return self._written(y, self.across.read(across[:, :, :: self.segment, :: self.segment], lead))
