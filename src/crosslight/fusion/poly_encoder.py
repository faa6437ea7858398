"""Poly-encoder: a context as a few vectors, among which each candidate chooses by attention.

Humeau, Shuster, Lachaux, Weston, "Poly-encoders: Transformer Architectures and Pre-training Strategies for Fast and
Accurate Multi-sentence Scoring", 2019, arXiv 1905.01969.

h_1 ... h_n are the context's hidden states, y the candidate's vector, c_1 ... c_m learned codes (all of width d):

    y_i    = sum_j softmax_j(c_i . h_j) h_j          (batch, m, d)    once for a context
    y_ctxt = sum_i softmax_i(y . y_i) y_i            (batch, candidates, d)
    score  = y_ctxt . y                              (batch, candidates)

No scaling and no projections. Without codes the y_i are the first or the last m hidden states. With m = 1 the score is
a bi-encoder's dot product. Contexts and candidates are encoded (and cached) apart; a pair costs m dot products, however
long the context is. As the score is sum_i u_i (y . y_i), all pairs come from one einsum. Training: cross-entropy with
the other candidates of the batch as negatives.

Streams: the first is the context (batch, n, d), the second the candidates (batch, candidates, d) or (batch, d). What is
written is the context as each candidate sees it, y_ctxt. Beside plain attention: the context is read through m learned
queries first, so that the part which depends on the candidate does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.errors import expect
from crosslight.fusion.base import Fusion
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Features = Float[Tensor, "batch codes dim"]

Source = Literal["learned", "first", "last"]

CARD = Card(
    id="poly-encoder",
    kind="fusion",
    group="late-interaction",
    title="Poly-encoders: Transformer Architectures and Pre-training Strategies for Fast and Accurate Multi-sentence "
    "Scoring",
    year=2019,
    paper="1905.01969",
    code="facebookresearch/ParlAI",
    summary="Scores candidates against a context through m learned codes: the context is read once, each candidate "
    "attends to the m results.",
    cost="n",
    checked="a loop over pairs and codes that states the equations; m = 1 equals the dot product of a bi-encoder",
    differs="The two encoders are the user's. The codes are drawn with variance 1 / width (the released code draws "
    "them uniformly from 0 to 1; the paper only says at random).",
    evidence=Evidence(
        claim="On contexts of several topics, more codes find the candidate more often than one vector does",
        task="topic-match",
        metric="recall@1",
        margin=0.05,
        baseline="poly-encoder",
        options={"codes": 16},
        baseline_options={"codes": 1},
    ),
)


@register(CARD)
class PolyEncoder(Fusion):
    """Context (batch, n, d) and candidates (batch, candidates, d) -> y_ctxt (batch, candidates, d).

    Args:
        streams: widths of the context and the candidates, in this order; equal.
        codes: m, the number of vectors that stand for a context.
        source: what they are: "learned" codes' readings, or the "first" or "last" m hidden states.
    """

    def __init__(self, streams: Mapping[str, int], *, codes: int = 64, source: Source = "learned") -> None:
        super().__init__(streams)
        expect(len(self.widths) == 2, "streams", ", ".join(self.widths), "two: the context, then the candidates")
        (self.context, dim), (self.candidate, other) = self.widths.items()
        expect(dim == other, f"streams[{self.candidate!r}]", other, f"{dim}, the width of {self.context}")
        expect(isinstance(codes, int) and codes > 0, "codes", codes, "a positive int")
        expect(source in get_args(Source), "source", repr(source), f"one of {', '.join(get_args(Source))}")
        self.source, self.count = source, codes
        self.codes = nn.Parameter(torch.randn(codes, dim) * dim**-0.5) if source == "learned" else None

    @property
    def flow(self):
        return {self.context: (self.context, self.candidate)}

    @classmethod
    def sample(cls, **options):
        block = cls(**{"streams": {"context": 16, "candidate": 16}, "codes": 4, **options})
        return block, {name: torch.randn(2, 7 - 3 * i, width) for i, (name, width) in enumerate(block.widths.items())}

    def features(
        self, context: Float[Tensor, "batch n dim"], mask: Bool[Tensor, "batch n"] | None = None
    ) -> tuple[Features, Bool[Tensor, "batch codes"] | None]:
        """The m vectors of a context, to be cached, and which of them exist (None: all)."""
        if self.codes is not None:
            return self._read(context, mask) @ context, None
        if mask is None:
            return (context[:, : self.count] if self.source == "first" else context[:, -self.count :]), None
        # A stable sort moves padding to the other end and keeps the order of the tokens.
        order = (~mask if self.source == "first" else mask).int().argsort(dim=1, stable=True)
        order = order[:, : self.count] if self.source == "first" else order[:, -self.count :]
        return context.gather(1, order.unsqueeze(-1).expand(-1, -1, context.shape[2])), mask.gather(1, order)

    def score(
        self,
        features: Features,
        candidates: Float[Tensor, "*batch candidates dim"],
        keep: Bool[Tensor, "batch codes"] | None = None,
    ) -> Float[Tensor, "batch candidates"]:
        """Scores of cached candidates for contexts as `features` returns them: candidates (candidates, d) are scored
        for every context, candidates (batch, candidates, d) for their own."""
        dots = self._dots(features, candidates)
        return (dense.softmax(dots, None if keep is None else keep.unsqueeze(1)) * dots).sum(-1)

    @staticmethod
    def loss(scores: Float[Tensor, "batch batch"]) -> Float[Tensor, ""]:
        """Cross-entropy of all pairs of a batch: candidate i belongs to context i, the others are negatives."""
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))

    def _read(self, context, mask):
        scores = self.codes @ context.transpose(1, 2)
        return dense.softmax(scores, None if mask is None else mask.unsqueeze(1))

    @staticmethod
    def _dots(features, candidates):
        return torch.einsum("bmd,cd->bcm" if candidates.dim() == 2 else "bmd,bcd->bcm", features, candidates)

    def _choose(self, streams, masks):
        features, keep = self.features(streams[self.context], masks.get(self.context))
        dots = self._dots(features, streams[self.candidate])
        return features, dense.softmax(dots, None if keep is None else keep.unsqueeze(1))

    def _forward(self, streams, masks):
        features, chosen = self._choose(streams, masks)
        return {self.context: chosen @ features}

    def _weights(self, streams, masks):
        """(candidate, "codes") and, with learned codes, ("codes", context); one head."""
        maps = {(self.candidate, "codes"): self._choose(streams, masks)[1].unsqueeze(1)}
        if self.codes is not None:
            maps["codes", self.context] = self._read(streams[self.context], masks.get(self.context)).unsqueeze(1)
        return maps

    def _checked(self, streams, masks):
        one = streams.get(self.candidate) if isinstance(streams, Mapping) else None
        if isinstance(one, Tensor) and one.dim() == 2:
            streams = {**streams, self.candidate: one.unsqueeze(1)}
        return super()._checked(streams, masks)
