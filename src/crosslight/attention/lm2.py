"""LM2: a decoder's attention beside a bank of memory slots that is read by tokens and written through gates.

"LM2: Large Memory Models", 2025, arXiv 2502.06049.

    read     A = softmax(E W_Q (M W_K)^T / sqrt(d)),  E_mem = A M W_V           (n, slots), (n, dim)
             g_out = sigmoid(E_mem W_out),   Y = attention(E) + g_out * E_mem
    write    after each segment of E, with P = [M ; E] and C = softmax(M W_S (P W_K)^T / sqrt(d)) P W_V     (slots, dim)
             M <- sigmoid(mean(E) W_in) * tanh(C) + sigmoid(C W_forget) * M

The bank M (slots, dim) starts as the identity, square like the paper's 2048 x 2048 unless ``slots`` is given. A token
reads the bank as it was at the start of its segment, so causality holds. Attention is untouched by the memory: over
everything, as in the paper, or with ``local`` over the segment alone, where the bank is what reaches further and the
cost is linear. In cross-attention the attention reads the context, and the bank stays that of x. `weights` shows the
attention; the memory, which is no token, is added by `read`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, How, LayerCache
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Bank = Float[Tensor, "batch slots dim"]

CARD = Card(
    id="lm2",
    kind="token",
    group="recurrent",
    title="LM2: Large Memory Models",
    year=2025,
    paper="2502.06049",
    code="convergence-ai/lm2",
    summary="Attention with a gated bank of memory slots beside it, read by all tokens and written after each segment.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"segment": 4, "slots": 5},
    checked="the read and write equations slot by slot; grouped softmax attention where the output gate is shut",
    differs="The paper's equations do not say how rows of tokens become rows of slots in the write. Here slots ask "
    "over slots and tokens, as in a relational memory core, and the input gate sees the mean of the segment: a "
    "reconstruction, as are the forget bias of 1 and the segments of 128. The memory reads in one head.",
    evidence=Evidence(
        claim="with attention limited to a segment, pairs of the first are recalled in later ones through the memory",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.2,
        baseline="lm2",
        options={"segment": 8, "local": True, "slots": 16},
        baseline_options={"segment": 8, "local": True, "slots": 0},
    ),
)


class MemoryBank(nn.Module):
    """The slots of one layer: how tokens read them, and how a segment writes them.

    Args:
        dim: width of tokens and slots.
        slots: their number.
        segment: tokens between two writes.
        top_k: slots that a token reads, all if None.
    """

    def __init__(self, dim: int, slots: int, segment: int, top_k: int | None) -> None:
        super().__init__()
        self.dim, self.slots, self.segment, self.top_k = dim, slots, segment, top_k
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.ask = nn.Linear(dim, dim, bias=False)
        self.gate_out, self.gate_in, self.gate_forget = (nn.Linear(dim, dim) for _ in range(3))
        nn.init.ones_(self.gate_forget.bias)

    def start(self, x: Stream) -> Bank:
        return torch.eye(self.slots, self.dim, dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)

    def read(self, x: Stream, bank: Bank) -> Stream:
        """g_out * E_mem."""
        q, k, v = self.q(x).unsqueeze(1), self.k(bank).unsqueeze(1), self.v(bank).unsqueeze(1)
        if self.top_k is None:
            found = dense.attend(q, k, v).squeeze(1)
        else:
            s, chosen = dense.scores(q, k).squeeze(1).topk(self.top_k, -1)
            a = torch.zeros(*x.shape[:2], self.slots, dtype=x.dtype, device=x.device)
            found = a.scatter(2, chosen, s.softmax(-1)) @ v.squeeze(1)
        return self.gate_out(found).sigmoid() * found

    def write(self, x: Stream, bank: Bank, keep: Bool[Tensor, "batch n"] | None = None) -> Bank:
        """The bank after the segment ``x``."""
        both = torch.cat([bank, x], 1)
        seen = None
        if keep is not None:
            seen = masks.keys(F.pad(keep, (self.slots, 0), value=True))
            x = x.masked_fill(~keep.unsqueeze(-1), 0)
        q, k, v = (f(t).unsqueeze(1) for f, t in ((self.ask, bank), (self.k, both), (self.v, both)))
        candidate = dense.attend(q, k, v, mask=seen).squeeze(1)
        count = x.shape[1] if keep is None else keep.sum(1).clamp(min=1)[:, None, None]
        g_in = self.gate_in(x.sum(1, keepdim=True) / count).sigmoid()
        return g_in * candidate.tanh() + self.gate_forget(candidate).sigmoid() * bank

    def forward(self, x: Stream, keep: Bool[Tensor, "batch n"] | None = None) -> Stream:
        """Every segment reads the bank as it was at its start."""
        count, bank = -(-x.shape[1] // self.segment), self.start(x)
        banks = [bank]
        for s in range(count - 1):
            part = slice(s * self.segment, (s + 1) * self.segment)
            banks.append(self.write(x[:, part], banks[-1], None if keep is None else keep[:, part]))
        rows = F.pad(x, (0, 0, 0, count * self.segment - x.shape[1])).unflatten(1, (count, -1)).flatten(0, 1)
        y = self.read(rows, torch.stack(banks, 1).flatten(0, 1))
        return y.unflatten(0, (-1, count)).flatten(1, 2)[:, : x.shape[1]]


@dataclass
class LM2Cache:
    """The attention's cache, the tokens of the segment so far, and the bank at its start."""

    length: int
    attention: LayerCache
    tokens: Stream
    bank: Bank
    cross: bool


@register(CARD)
class LM2(AttentionLayer):
    """x (batch, n, dim), context (batch, m, context_dim).

    Args:
        slots: slots of the bank, dim unless given; 0 leaves the memory out.
        segment: tokens between two writes of the bank.
        local: attention stays inside the segment.
        top_k: slots that a token reads, all unless given.
        kv_heads, context_dim, bias, position: as for `AttentionLayer`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        slots: int | None = None,
        segment: int = 128,
        local: bool = False,
        top_k: int | None = None,
        kv_heads: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        position: str | nn.Module | None = "rope",
    ) -> None:
        expect(heads > 0 and dim % heads == 0, "dim", dim, f"a multiple of heads = {heads}")
        core = Softmax(heads, dim // heads)
        super().__init__(core, dim, kv_heads=kv_heads, context_dim=context_dim, bias=bias, position=position)
        slots = dim if slots is None else slots
        expect(slots >= 0, "slots", slots, "a number >= 0")
        expect(segment > 0, "segment", segment, "a positive int")
        expect(top_k is None or 0 < top_k <= slots, "top_k", top_k, f"a number from 1 to slots = {slots}, or None")
        self.segment, self.local = segment, local
        self.memory = MemoryBank(dim, slots, segment, top_k) if slots else None

    def _within(self, how: How) -> How:
        if not self.local or how.cross:
            return how
        return dataclasses.replace(how, mask=masks.join(masks.same_block(self.segment), how.mask))

    def _recall(self, x: Stream, how: How) -> Stream | float:
        if self.memory is None:
            return 0.0
        return self.memory(x, None if how.cross else masks.split(how.mask)[1])

    def _forward(self, x, context, how):
        return super()._forward(x, context, self._within(how)) + self._recall(x, how)

    def _weights(self, x, context, how):
        return super()._weights(x, context, self._within(how))

    def _read(self, weights, x, context, how):
        return super()._read(weights, x, context, how) + self._recall(x, how)

    def _step(self, x, cache: Any, context, how):
        length = 0 if cache is None else cache.length
        start, inner = length % self.segment == 0, None if cache is None else cache.attention
        if inner is not None and start and self.local and not how.cross:
            inner = LayerCache(0, None)  # the segment before is forgotten, its positions too; the bank remembers it
        y, inner = super()._step(x, inner, context, how)
        if self.memory is None:
            return y, LM2Cache(length + 1, inner, x[:, :0], x[:, :0], how.cross)
        bank = self.memory.start(x) if cache is None else cache.bank
        if cache is not None and start:
            bank = self.memory.write(cache.tokens, bank)
        tokens = x if start else torch.cat([cache.tokens, x], 1)
        return y + self.memory.read(x, bank), LM2Cache(length + 1, inner, tokens, bank, how.cross)
