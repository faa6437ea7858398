"""Uni-Encoder's arrow attention: one context and many candidates in one sequence, candidates hidden from one another.

Song et al., "Uni-Encoder: A Fast and Accurate Response Selection Paradigm for Generation-Based Dialogue Systems",
2021, arXiv 2106.01263.

The sequence is [context ; candidate 1 ; ... ; candidate r], L + r c tokens, and p(t) the part that token t is in:

    M_ij = 1   if i or j is in the context, or p(i) = p(j);  else 0
    A = softmax(Q K^T / sqrt(d) over M = 1)                           (batch, heads, n, n)
    position(t) = t in the context,   L + (t - L) mod c in a candidate      every candidate restarts at L
    score of a candidate = linear(mean of its last states)            beside this layer

The context is encoded once for all candidates: one pass over L + r c tokens in place of r passes over L + c. With
positions that restart, the order of the candidates does not matter, and one candidate alone is plain attention (a
cross-encoder). Candidates touch only through the context, which reads them all; ``context_reads=False`` forbids that.
With ``candidates_read=False`` too, all parts are apart (the paper's "diag", a bi-encoder).

`Arrow` is the mask for parts of fixed length, `arrow` that for parts of any length, by the number of each token's part.
Any row takes either as ``mask=``; `Restarting` is the rotary position. As c and L do not grow with the number of
candidates, the work is linear in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer
from crosslight.attention.ruled import Ruled
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotary
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Int

CARD = Card(
    id="uni-encoder",
    kind="token",
    group="positions-masks",
    title="Uni-Encoder: A Fast and Accurate Response Selection Paradigm for Generation-Based Dialogue Systems",
    year=2021,
    paper="2106.01263",
    code="dll-wu/Uni-Encoder",
    summary="One context and many candidates in one sequence: candidates read the context and themselves, not each "
    "other.",
    patterns=("noncausal-self", "causal-self"),
    why_not="Context and candidates are parts of one sequence; between two streams nothing would be hidden.",
    cost="n",
    decode="kv",
    small={"context": 4, "candidate": 3},
    checked="softmax attention on [context ; candidate] apart for each candidate; scaled_dot_product_attention under "
    "the explicit matrix",
    differs="The paper is noncausal only. The mean over a candidate and its score are left to the model. The cost "
    "holds for a context and candidates of fixed length and a growing number of candidates. In the evidence the four "
    "pairs of the task are the context and every two tokens after them a candidate; the task is causal.",
    evidence=Evidence(
        claim="candidates that read the context recall what it holds; those of a bi-encoder, apart from it, do not",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.5,
        baseline="uni-encoder",
        options={"context": 8, "candidate": 2},
        baseline_options={"context": 8, "candidate": 2, "candidates_read": False},
    ),
)


@dataclass(frozen=True)
class Arrow(Mask):
    """The first ``context`` tokens and everything read one another; each ``candidate`` tokens after them are a part
    that reads itself.

    Attributes:
        context_reads: the context reads the candidates.
        candidates_read: candidates read the context.
    """

    context: int
    candidate: int
    context_reads: bool = True
    candidates_read: bool = True
    shared = True

    def part(self, token: Tensor) -> Tensor:
        """0 in the context, then 1, 2, ..."""
        return ((token - self.context) // self.candidate + 1).clamp(min=0)

    def visible(self, b, h, i, j):
        query, key = self.part(i), self.part(j)
        seen = query == key
        if self.context_reads:
            seen = seen | (query == 0)
        return seen | (key == 0) if self.candidates_read else seen

    def blocks(self, tile):
        i0, i1, j0, j1 = (self.part(t) for t in tile)
        some, every = (i0 <= j1) & (j0 <= i1), (i0 == i1) & (j0 == j1) & (i0 == j0)
        if self.context_reads:
            some, every = some | (i0 == 0), every | (i1 == 0)
        return (some | (j0 == 0), every | (j1 == 0)) if self.candidates_read else (some, every)


def arrow(parts: Int[Tensor, "batch n"]) -> Mask:
    """Arrow attention for parts of any length: ``parts`` is 0 in the context, and the candidate's number after it."""
    expect(parts.dim() == 2, "arrow(parts)", tuple(parts.shape), "(batch, n)")
    context = torch.zeros_like(parts)
    return masks.segments(parts) | masks.segments(parts, context) | masks.segments(context, parts)


class Restarting(Rotary):
    """Rotary positions that restart at ``context`` in each candidate."""

    def __init__(self, dim: int, context: int, candidate: int, base: float = 10_000.0) -> None:
        super().__init__(dim, base)
        self.context, self.candidate = context, candidate

    def positions(self, token):
        return torch.where(token < self.context, token, self.context + (token - self.context) % self.candidate)


class UniEncoderLayer(AttentionLayer):
    """The layer around `UniEncoder`, whose "rope" restarts in each candidate."""

    def __init__(self, core: UniEncoder, dim: int, *, position: str | nn.Module | None = None, **own: Any) -> None:
        if position == "rope":
            position = Restarting(core.head_dim, core.rule.context, core.rule.candidate)
        super().__init__(core, dim, position=position, **own)


@register(CARD)
class UniEncoder(Ruled):
    """softmax attention under `Arrow`.

    Args:
        context: tokens of the context, at the start of the sequence.
        candidate: tokens of each candidate; the last may be shorter.
        context_reads: the context reads the candidates.
        candidates_read: candidates read the context.
    """

    layer = UniEncoderLayer
    rule: Arrow

    def __init__(
        self,
        heads: int,
        head_dim: int,
        context: int = 128,
        candidate: int = 32,
        context_reads: bool = True,
        candidates_read: bool = True,
    ) -> None:
        expect(isinstance(context, int) and context >= 0, "context", context, "a number >= 0")
        expect(isinstance(candidate, int) and candidate >= 1, "candidate", candidate, "a number >= 1")
        super().__init__(heads, head_dim, Arrow(context, candidate, context_reads, candidates_read))
