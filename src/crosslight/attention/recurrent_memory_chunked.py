"""Recurrent memory with chunked attention: a token reads its segment, its chunk, and a bank carried over segments.

"Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context Language Modeling", 2025,
arXiv 2507.00453.

    y_full  = softmax(Q_f K_f^T / sqrt(d)) V_f      over the segment, RoPE on each head
    y_chunk = softmax(Q_c K_c^T / sqrt(d)) V_c      over the chunk of the segment, RoPE on each head
    y_mem   = softmax(Q_m K_m^T / sqrt(d)) V_m      K_m, V_m of the bank (slots, dim), without position
    Y = W_o [g_1 y_full + g_2 y_chunk + g_3 y_mem]   g = softmax of three learned numbers a head, or 1, 1, 1
                                                                                        (batch, n, dim)
    after a segment, for each of its chunks (the mean or the last of its tokens, x):
    u = W_u x,   g = sigmoid(W_g [u ; m_old] + b),   m_new = g * u + (1 - g) * m_old

m_old is the slot that m_new pushes out of the bank (first in, first out), or 0 while the bank has room: with g = 1 the
bank is a plain queue, with g = 0 its content stays. Attention is quadratic in the segment and linear in the number of
segments; decoding carries the segment and the bank. `weights` shows the matrices of the segment's heads, then those
of the chunk's, each with its share g; the memory, which is no token, is added by `read`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotary
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Weights = Float[Tensor, "batch heads n n"]
    Bank = Float[Tensor, "batch slots dim"]

CARD = Card(
    id="recurrent-memory-chunked",
    kind="token",
    group="recurrent",
    title="Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context Language Modeling",
    year=2025,
    paper="2507.00453",
    summary="Each token reads its segment, its chunk and a gated first-in-first-out memory carried over segments.",
    patterns=("noncausal-self", "causal-self"),
    why_not="The memory is written by the stream that reads it, segment by segment; a second stream shares none.",
    cost="n",
    mask="keys",
    decode="state",
    small={"segment": 8, "chunk": 4, "slots": 3},
    checked="the three paths and the bank written out segment by segment; softmax attention with RoPE and the same "
    "weights where memory and chunks are off",
    differs="A reconstruction from the abstract, which names the parts only. Ours: projections of its own for each "
    "path, the gate of the merge, one slot a chunk, W_g's inputs, and that the slots are made of the layer's input. "
    "Gradients flow through the memory unless `detach`. Without `causal` a segment reads itself both ways and memory "
    "still comes from earlier segments.",
    evidence=Evidence(
        claim="pairs of the first segment, asked in later ones, are recalled with the memory and not without",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.2,
        baseline="recurrent-memory-chunked",
        options={"segment": 8, "chunk": 2, "slots": 16},
        baseline_options={"segment": 8, "chunk": 2, "slots": 0},
    ),
)


@dataclass
class MemoryCache:
    """The tokens of the segment so far, their keys and values for both paths, and the bank of earlier segments."""

    length: int
    tokens: Stream
    full: KVCache
    near: KVCache | None
    bank: Bank


class Path(nn.Module):
    """Queries, keys and values of one path, (batch, heads, n, head_dim) each."""

    def __init__(self, dim: int, heads: int, bias: bool, rope: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias) for _ in range(3))
        self.rope = Rotary(dim // heads) if rope else None

    def _split(self, t: Tensor, offset: int | None) -> Heads:
        t = t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return t if self.rope is None or offset is None else self.rope.rotate(t, offset=offset)

    def queries(self, x: Stream, offset: int = 0) -> Heads:
        return self._split(self.q(x), offset)

    def keys(self, x: Stream, offset: int = 0) -> Heads:
        return self._split(self.k(x), offset)

    def values(self, x: Stream) -> Heads:
        return self._split(self.v(x), None)


@register(CARD)
class RecurrentMemoryChunked(Mechanism):
    """x (batch, n, dim).

    Args:
        segment: tokens a segment, after which the bank is written.
        chunk: tokens a chunk, a divisor of segment; None leaves the chunk path out.
        slots: slots of the bank, at least as many as a segment writes; 0 leaves the memory out.
        merge: "gate" or "sum" of the three paths.
        pool: "mean" or "last", the token that a chunk writes.
        detach: no gradient through the bank.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        segment: int = 256,
        chunk: int | None = 32,
        slots: int = 32,
        merge: str = "gate",
        pool: str = "mean",
        detach: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim)
        expect(heads > 0 and dim % heads == 0, "dim", dim, f"a multiple of heads = {heads}")
        expect(segment > 0, "segment", segment, "a positive int")
        expect(chunk is None or (chunk > 0 and segment % chunk == 0), "chunk", chunk, f"a divisor of {segment} or None")
        expect(merge in ("gate", "sum"), "merge", repr(merge), "'gate' or 'sum'")
        expect(pool in ("mean", "last"), "pool", repr(pool), "'mean' or 'last'")
        written = 1 if chunk is None else segment // chunk
        expect(slots == 0 or slots >= written, "slots", slots, f"0, or at least the {written} that a segment writes")
        self.heads, self.segment, self.chunk, self.slots = heads, segment, chunk, slots
        self.written, self.pool, self.detach = written, pool, detach
        self.full = Path(dim, heads, bias, rope=True)
        self.near = None if chunk is None else Path(dim, heads, bias, rope=True)
        self.memory = Path(dim, heads, bias, rope=False) if slots else None
        self.write = nn.Linear(dim, dim) if slots else None
        self.write_gate = nn.Linear(2 * dim, dim) if slots else None
        self.share = nn.Parameter(torch.zeros(3, heads)) if merge == "gate" else None
        self.out = nn.Linear(dim, dim, bias)

    # The bank ---------------------------------------------------------------------------------------------------
    def pooled(self, x: Stream, keep: Bool[Tensor, "batch n"] | None = None) -> Float[Tensor, "batch segments w dim"]:
        """What each chunk of the whole segments of ``x`` writes."""
        n = x.shape[1] // self.segment * self.segment
        parts = x[:, :n].unflatten(1, (-1, self.written, self.segment // self.written))
        if keep is None:
            return parts.mean(3) if self.pool == "mean" else parts[:, :, :, -1]
        kept = keep[:, :n].unflatten(1, parts.shape[1:4]).unsqueeze(-1)
        if self.pool == "last":  # the last one that is kept
            kept = kept & (kept.flip(3).cumsum(3).flip(3) == 1)
        return parts.masked_fill(~kept, 0).sum(3) / kept.sum(3).clamp(min=1)

    def update(self, bank: Bank, pooled: Float[Tensor, "batch w dim"]) -> Bank:
        """The bank after one more segment, the oldest slot first."""
        assert self.write is not None
        assert self.write_gate is not None
        fresh = self.write(pooled)
        out = max(0, bank.shape[1] + self.written - self.slots)
        old = F.pad(bank[:, :out], (0, 0, self.written - out, 0))
        g = self.write_gate(torch.cat([fresh, old], -1)).sigmoid()
        bank = torch.cat([bank[:, out:], old + g * (fresh - old)], 1)
        return bank.detach() if self.detach else bank

    def _recall(self, x: Stream, keep: Tensor | None) -> Heads | None:
        """y_mem: every segment reads the bank as it was at its start."""
        count = -(-x.shape[1] // self.segment)
        if self.memory is None or count == 1:
            return None
        pooled, bank = self.pooled(x, keep), x[:, :0]
        banks, filled = [], []
        for s in range(count):
            filled.append(bank.shape[1])
            banks.append(F.pad(bank, (0, 0, 0, self.slots - bank.shape[1])))
            if s + 1 < count:
                bank = self.update(bank, pooled[:, s])
        seen = torch.arange(self.slots, device=x.device) < torch.tensor(filled, device=x.device)[:, None]
        rows = F.pad(x, (0, 0, 0, count * self.segment - x.shape[1])).unflatten(1, (count, -1)).flatten(0, 1)
        stacked = torch.stack(banks, 1).flatten(0, 1)
        q, k, v = self.memory.queries(rows), self.memory.keys(stacked), self.memory.values(stacked)
        y = dense.attend(q, k, v, mask=masks.keys(seen.repeat(x.shape[0], 1)))
        return y.unflatten(0, (x.shape[0], count)).transpose(1, 2).flatten(2, 3)[:, :, : x.shape[1]]

    # The three paths --------------------------------------------------------------------------------------------
    def _shares(self, remembers: Bool[Tensor, " n"]) -> Float[Tensor, "3 heads n 1"] | None:
        """g of each path, at tokens that have a bank to read and at those that have none."""
        if self.share is None:
            return None
        there = torch.stack([torch.full_like(remembers, p) for p in (True, self.near is not None)] + [remembers])
        logits = self.share.unsqueeze(-1).masked_fill(~there.unsqueeze(1), torch.finfo(self.share.dtype).min)
        return logits.softmax(0).unsqueeze(-1)

    def _remembers(self, x: Stream, offset: int = 0) -> Tensor:
        place = torch.arange(offset, offset + x.shape[1], device=x.device)
        return (place >= self.segment) & (self.slots > 0)

    def _merge(self, full: Heads, near: Heads | None, memory: Heads | None, g: Tensor | None) -> Stream:
        parts = [full, near, memory]
        shared = [y if g is None else g[i] * y for i, y in enumerate(parts) if y is not None]
        return self.out(sum(shared).transpose(1, 2).flatten(2))  # type: ignore[union-attr]

    def _blocks(self, how: How, size: int) -> Mask:
        mask = masks.join(masks.same_block(size), how.mask)
        assert mask is not None
        return mask

    def _forward(self, x, context, how):
        def read(path: Path, size: int) -> Heads:
            q, k, v = path.queries(x), path.keys(x), path.values(x)
            return sparse.attend(q, k, v, mask=self._blocks(how, size), causal=how.causal)

        near = None if self.near is None else read(self.near, self.chunk or 1)
        memory = self._recall(x, masks.split(how.mask)[1])
        return self._merge(read(self.full, self.segment), near, memory, self._shares(self._remembers(x)))

    def _weights(self, x, context, how):
        g, found = self._shares(self._remembers(x)), []
        for i, (path, size) in enumerate(((self.full, self.segment), (self.near, self.chunk))):
            if path is not None:
                a = dense.weights(path.queries(x), path.keys(x), mask=self._blocks(how, size or 1), causal=how.causal)
                found.append(a if g is None else g[i] * a)
        return torch.cat(found, 1)

    def _read(self, weights, x, context, how):
        y = weights[:, : self.heads] @ self.full.values(x)
        if self.near is not None:
            y = y + weights[:, self.heads :] @ self.near.values(x)
        memory, g = self._recall(x, masks.split(how.mask)[1]), self._shares(self._remembers(x))
        if memory is not None:
            y = y + (memory if g is None else g[2] * memory)
        return self.out(y.transpose(1, 2).flatten(2))

    def _step(self, x, cache, context, how):
        length = 0 if cache is None else cache.length
        start = length % self.segment == 0
        bank, tokens = (x[:, :0], x) if cache is None else (cache.bank, x)
        if not start:
            tokens = torch.cat([cache.tokens, x], 1)
        elif cache is not None and self.slots:
            bank = self.update(bank, self.pooled(cache.tokens)[:, 0])

        def read(path: Path, kv: KVCache | None, fresh: bool) -> tuple[Heads, KVCache]:
            k, v = path.keys(x, length), path.values(x)
            kv = KVCache.start(k, v) if kv is None or fresh else kv.append(k, v)
            return dense.attend(path.queries(x, length), kv.keys, kv.values), kv

        full, full_kv = read(self.full, None if cache is None else cache.full, start)
        near = near_kv = memory = None
        if self.near is not None and self.chunk is not None:
            near, near_kv = read(self.near, None if cache is None else cache.near, length % self.chunk == 0)
        if self.memory is not None and bank.shape[1]:
            memory = dense.attend(self.memory.queries(x), self.memory.keys(bank), self.memory.values(bank))
        y = self._merge(full, near, memory, self._shares(self._remembers(x, length)))
        return y, MemoryCache(length + 1, tokens, full_kv, near_kv, bank)
