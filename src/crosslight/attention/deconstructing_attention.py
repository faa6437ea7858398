"""Deconstructing attention: what is left when the scores know less than the hidden states.

"Deconstructing Attention: Investigating Design Principles for Effective Language Modeling", 2025, arXiv 2510.11602.

    A_i = softmax_j((W_q s_i) . (W_k s_j) / sqrt(d)) for each head,  y = W_o A W_v z       (batch, n, dim)

    standard      s = x, the hidden states of the layer (keys: z)
    StaticEmbQK   s = the model's input embeddings, in every layer       weights know the tokens, not their states
    RndEmbQK      s = frozen random embeddings of the tokens             the same, with nothing learned in s
    FixedSeqQK    s = one frozen random sequence                         weights know positions only
    Uniform       A_ij = 1 / number of keys that i may read              weights know nothing

Values always come from the layer's input. StaticEmbQK and RndEmbQK are the standard form scored by a stream that the
model has and the layer has not:

    with attn.scored_by(embeddings):        # (batch, n, dim), the tokens of x
        y = attn(x, causal=True)

No mixing at all is the entrant "none" of `compare`. A model may use a variant in all layers or in every other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, LayerCache
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

Variant = Literal["fixed", "uniform", "standard"]

CARD = Card(
    id="deconstructing-attention",
    kind="token",
    group="scores",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    year=2025,
    paper="2510.11602",
    summary="Scores come from a frozen random sequence, from static or random embeddings, or there are none: they know "
    "less than the hidden states.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    small={"max_length": 1024},
    checked="torch.nn.MultiheadAttention with the sequence as query and key; means over the visible keys",
    differs="The variants that change the form of the scores are not here: we had no access to their definitions. "
    "Cross-attention is ours: the fixed sequence then stands for queries and keys alike, each from position 0 on.",
    evidence=Evidence(
        claim="weights that know positions only are far better than no mixing",
        task="language",
        metric="bits_per_byte",
        margin=0.1,
        baseline="none",
    ),
)


@register(CARD)
class DeconstructedAttention(AttentionLayer):
    """softmax attention whose scores come from somewhere else.

    Args:
        dim, heads, context_dim, bias: as in `AttentionLayer`.
        variant: "fixed", "uniform" or "standard".
        max_length: tokens of the frozen sequence of "fixed".
    """

    sequence: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        context_dim: int | None = None,
        bias: bool = True,
        variant: Variant = "fixed",
        max_length: int = 1024,
    ) -> None:
        expect(variant in get_args(Variant), "variant", repr(variant), f"one of {', '.join(get_args(Variant))}")
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(max_length > 0, "max_length", max_length, "a positive int")
        super().__init__(Softmax(heads, dim // heads), dim, context_dim=context_dim, bias=bias)
        self.variant = variant
        self._source: Tensor | None = None
        if variant == "uniform":
            del self.q, self.k
        elif variant == "fixed":
            self.k = nn.Linear(dim, dim, bias)
            self.register_buffer("sequence", torch.randn(max_length, dim))

    @contextmanager
    def scored_by(self, stream: Float[Tensor, "batch n dim"]) -> Iterator[None]:
        """Inside, self-attention takes queries and keys from ``stream`` (in `step`: that of the new tokens)."""
        expect(self.variant == "standard", "variant", repr(self.variant), "'standard', to be scored by a stream")
        before, self._source = self._source, stream
        try:
            yield
        finally:
            self._source = before

    def _fixed(self, start: int, count: int, like: Tensor) -> Float[Tensor, "batch count dim"]:
        end, longest = start + count, len(self.sequence)
        expect(end <= longest, "x", f"position {end}", f"at most max_length = {longest} tokens in x and context")
        return self.sequence[start:end].expand(len(like), -1, -1)

    def _heads(self, x, context, how, offset=0):
        if self.variant == "standard":
            if self._source is None:
                return super()._heads(x, context, how, offset)
            got = tuple(self._source.shape)
            expect(not how.cross and got == tuple(x.shape), "stream", got, f"{tuple(x.shape)} as x, in self-attention")
            return self._queries(self._source), self._keys(self._source), self._values(context)
        v = self._values(context)
        if self.variant == "uniform":
            return v.new_zeros(len(x), self.heads, x.shape[1], 1), v.new_zeros(*v.shape[:3], 1), v
        k = self._keys(self._fixed(0 if how.cross else offset, context.shape[1], x))
        return self._queries(self._fixed(offset, x.shape[1], x)), k, v

    def _step(self, x, cache, context, how):
        if not how.cross or cache is None or self.variant == "standard":
            return super()._step(x, cache, context, how)
        k, v, mask = cache.state
        if self.variant == "uniform":
            q = v.new_zeros(len(x), self.heads, x.shape[1], 1)
        else:
            q = self._queries(self._fixed(cache.length, x.shape[1], x))
        return self._merge(self.core(q, k, v, mask=mask), x), LayerCache(cache.length + x.shape[1], cache.state, True)
