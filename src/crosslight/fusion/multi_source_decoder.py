"""Multi-source Transformer decoder: four ways in which one decoder reads several encoders.

Libovický, Helcl, Mareček, "Input Combination Strategies for Multi-Source Transformer Decoder", 2018, arXiv 1811.04716.

The block replaces the encoder-decoder attention sub-layer of a Transformer decoder. Q (batch, n, dim) are the decoder's
states, S_1 ... S_k the sources (batch, m_i, width_i), A_i multi-head attention, N LayerNorm:

    serial         Q <- Q + A_i(N_i(Q), S_i)                       for i = 1 ... k, one after another
    parallel       Q + sum_i A_i(N(Q), S_i)
    flat           Q + A(N(Q), [S_1 ; ... ; S_k])                  one softmax over the tokens of all sources
    hierarchical   c_i = A_i(N(Q), S_i);  Q + A'(N(Q), [c_1 ; ... ; c_k])     A' over k items, at each position

Streams: the first is the decoder, which is written; all others are sources, which are only read. Beside plain
multi-head attention: a decoder that reads more than one source, of widths of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.fusion.base import Fusion, mechanism
from crosslight.registry import register

Strategy = Literal["serial", "parallel", "flat", "hierarchical"]

CARD = Card(
    id="multi-source-decoder",
    kind="fusion",
    group="multi-source",
    title="Input Combination Strategies for Multi-Source Transformer Decoder",
    year=2018,
    paper="1811.04716",
    code="ufal/neuralmonkey",
    summary="A decoder reads several encoders in place of one: serially, in parallel, as one flat sequence, "
    "or hierarchically.",
    cost="n",
    checked="torch.nn.MultiheadAttention with the same weights, put together by the paper's equations",
    differs="LayerNorm stands before the attention, as in the released code. Flat: paper and code share one key and "
    "one value projection over the concatenated states, the catalogue has one per source; followed is the paper, with "
    "a linear map for sources whose width is not the decoder's. The second attention of the hierarchical strategy is "
    "always softmax, whichever mechanism reads the sources.",
    evidence=Evidence(
        claim="A decoder that needs both sources is right more often with a combination strategy than with one source",
        task="two-sources",
        metric="accuracy",
        margin=0.2,
        baseline="none",
        options={"strategy": "parallel"},
    ),
)


@register(CARD)
class MultiSourceDecoder(Fusion):
    """Q (batch, n, dim) reads k sources -> (batch, n, dim); residual and LayerNorm are part of the block.

    Args:
        streams: widths; the first stream is the decoder, the others are its sources.
        heads: heads of every attention.
        strategy: "serial", "parallel", "flat" or "hierarchical".
        attention: the mechanism that reads the sources, with ``attention_options``.
    """

    def __init__(
        self,
        streams: Mapping[str, int],
        heads: int = 8,
        *,
        strategy: Strategy = "parallel",
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(streams)
        expect(strategy in get_args(Strategy), "strategy", repr(strategy), f"one of {', '.join(get_args(Strategy))}")
        self.strategy = strategy
        self.decoder, *self.sources = self.widths
        dim, widths = self.widths[self.decoder], [self.widths[name] for name in self.sources]

        def reader(id: str, width: int, options: Mapping[str, Any] | None) -> Any:
            return mechanism(id, dim=dim, heads=heads, context_dim=width, pattern="noncausal-cross", options=options)

        flat = strategy == "flat"
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in (widths if strategy == "serial" else [dim]))
        self.attend = nn.ModuleList(reader(attention, w, attention_options) for w in ([dim] if flat else widths))
        self.align = nn.ModuleList(nn.Identity() if w == dim or not flat else nn.Linear(w, dim) for w in widths)
        self.combine: Any = reader("softmax", dim, None) if strategy == "hierarchical" else None

    @property
    def flow(self):
        return {self.decoder: (self.decoder, *self.sources)}

    @classmethod
    def sample(cls, **options):
        block = cls(**{"streams": {"decoder": 16, "text": 16, "image": 24}, "heads": 2, **options})
        return block, {name: torch.randn(2, 5 + i, width) for i, (name, width) in enumerate(block.widths.items())}

    def _forward(self, streams, masks):
        q, sources = streams[self.decoder], [streams[name] for name in self.sources]
        keep = [masks.get(name) for name in self.sources]
        if self.strategy == "serial":
            for norm, attend, s, mask in zip(self.norms, self.attend, sources, keep, strict=True):
                q = q + attend(norm(q), s, mask=mask)
            return {self.decoder: q}
        x = self.norms[0](q)
        if self.strategy == "flat":
            s, mask = self._concatenated(sources, keep)
            return {self.decoder: q + self.attend[0](x, s, mask=mask)}
        contexts = [attend(x, s, mask=mask) for attend, s, mask in zip(self.attend, sources, keep, strict=True)]
        if self.strategy == "parallel":
            return {self.decoder: q + torch.stack(contexts).sum(0)}
        return {self.decoder: q + self.combine(*self._per_position(x, contexts)).view_as(q)}

    def _weights(self, streams, masks):
        """("decoder", source) for each source; hierarchical also ("decoder", "sources"): (batch, heads, n, k)."""
        attend: Any
        q, sources = streams[self.decoder], [streams[name] for name in self.sources]
        keep = [masks.get(name) for name in self.sources]
        pairs = [(self.decoder, name) for name in self.sources]
        x = self.norms[0](q)
        if self.strategy == "flat":
            s, mask = self._concatenated(sources, keep)
            attend = self.attend[0]
            parts = attend.weights(x, s, mask=mask).split([t.shape[1] for t in sources], -1)
            return dict(zip(pairs, parts, strict=True))
        maps, contexts = {}, []
        for i, (attend, s, mask) in enumerate(zip(self.attend, sources, keep, strict=True)):
            if self.strategy == "serial":
                x = self.norms[i](q)
            maps[pairs[i]] = attend.weights(x, s, mask=mask)
            contexts.append(attend(x, s, mask=mask))
            q = q + contexts[-1]
        if self.strategy == "hierarchical":
            chosen = self.combine.weights(*self._per_position(x, contexts))
            maps[self.decoder, "sources"] = chosen.squeeze(2).unflatten(0, x.shape[:2]).transpose(1, 2)
        return maps

    def _concatenated(self, sources, keep):
        joined = torch.cat([align(s) for align, s in zip(self.align, sources, strict=True)], 1)
        if all(mask is None for mask in keep):
            return joined, None
        full = [
            s.new_ones(s.shape[:2], dtype=torch.bool) if m is None else m for s, m in zip(sources, keep, strict=True)
        ]
        return joined, torch.cat(full, 1)

    @staticmethod
    def _per_position(x, contexts):
        """Each position as an example of its own: (batch * n, 1, dim) and (batch * n, k, dim)."""
        return x.flatten(0, 1).unsqueeze(1), torch.stack(contexts, 2).flatten(0, 1)
