"""Neural attention search: every token learns how long it is needed, and its key is dropped after that.

Deng and Lindauer, "Neural Attention Search", 2025, arXiv 2502.13251.

    type_j = argmax(W_t x_j), a key/value head: global, local or sliding            (batch, kv_heads, n, 3)
    e_j    = the first global token at or after j
    key j is read by the queries i >= j with

        any i            if j is global
        i <= e_j         if j is local: up to the next global token
        i - j < w        if j is sliding

    y_i = softmax(q_i K[S_i]^T / sqrt(d)) V[S_i]                                    (batch, heads, n, d)

The first token is global. In training types are drawn, by a hard Gumbel-softmax with straight-through gradients at
temperature 1. The matrix M_ij of what is alive has no gradient by itself; the paper takes

    dL/dM_ij = P_ij (dL/dy_i . v_j - dL/dy_i . y_i),      P = softmax under the causal mask alone

and adds it up over the entries that each type of token j controls: i > e_j for global, i <= e_j for local, i - j < w
for sliding. `alive_share` is what a loss should add, at a small weight, so that types become cheap. Decoding evicts:
the cache holds the keys that are alive, and no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, LayerCache, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotation
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CARD = Card(
    id="nats",
    kind="token",
    group="sparse",
    title="Neural Attention Search",
    year=2025,
    paper="2502.13251",
    code="automl/NeuralAttentionSearch",
    summary="Each token learns its type: kept for good, until the next such token, or for a few queries only.",
    patterns=("causal-self",),
    why_not="How long a key lives is counted in the queries that come after it in its own stream.",
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"window": 3},
    checked="the rule of the three types written out pair by pair; causal attention where all are global, a sliding "
    "window where all are sliding; the paper's gradient of types in loops; the evicting cache",
    differs="The released code reads w + 1 keys of a sliding token, the paper w. What a token changes in the life of "
    "earlier local tokens by being global has no gradient here. The last token of a training sequence is not forced "
    "to be global, as no query follows it. A masked token ends no life. Distillation of a trained model is the "
    "user's training procedure. The evidence trains without the term for sparsity.",
    evidence=Evidence(
        claim="A byte language model that learns which keys to drop is at most 0.05 bits worse than one with all",
        task="language",
        metric="bits_per_byte",
        margin=-0.05,
        options={"window": 8},
    ),
)

GLOBAL, LOCAL, SLIDING = range(3)
#: A position after all others.
NEVER = 1 << 30


@dataclass(frozen=True, eq=False)
class Alive(Mask):
    """Query i reads the keys j <= i that live until i or longer: i <= ``until[b, h, j]``."""

    until: Int[Tensor, "batch heads m"]

    def visible(self, b, h, i, j):
        return (j <= i) & (i <= self.until[b, h, j])

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        some, every = super().blocks(tile)
        # The longest life in a span of keys is that of two spans, of a power of two keys, that cover it.
        table = [self.until.amax((0, 1))]
        while 2 << len(table) - 1 <= len(table[0]):
            last, step = table[-1], 1 << len(table) - 1
            table.append(torch.maximum(last[:-step], last[step:]))
        levels = torch.stack([F.pad(t, (0, len(table[0]) - len(t))) for t in table])
        powers = 1 << torch.arange(len(table), device=j0.device)
        level = ((j1 - j0 + 1)[..., None] >= powers).sum(-1) - 1
        longest = torch.maximum(levels[level, j0.long()], levels[level, j1.long() + 1 - (1 << level)])
        return some & (j0 <= i1) & (longest >= i0), every


@dataclass
class Cache:
    """The keys that are alive, the places of a head that has fewer of them filled up with dead ones."""

    keys: Float[Tensor, "batch kv_heads places dim"]
    values: Float[Tensor, "batch kv_heads places dim"]
    position: Int[Tensor, "batch kv_heads places"]
    until: Int[Tensor, "batch kv_heads places"]
    #: Local, and no global token has come yet.
    open: Bool[Tensor, "batch kv_heads places"]

    @property
    def size(self) -> Int[Tensor, "batch kv_heads"]:
        """Keys that the last query read."""
        return (self.until >= self.position.amax(2, keepdim=True)).sum(2)


@register(CARD)
class NeuralAttentionSearch(AttentionLayer):
    """softmax over the keys that are alive.

    Args:
        dim, heads, kv_heads, head_dim, bias, position: as in `AttentionLayer`.
        window: w, the queries that read a sliding token.
        temperature: of the Gumbel-softmax in training.
    """

    exempt = {"heads_may_be_grouped": "a key/value head has types of its own, with weights of their own"}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
        window: int = 256,
        temperature: float = 1.0,
    ) -> None:
        expect(isinstance(window, int) and window >= 1, "window", window, "a number >= 1")
        expect(temperature > 0, "temperature", temperature, "a number > 0")
        core = Softmax(heads, head_width(dim, heads, head_dim))
        super().__init__(core, dim, kv_heads=kv_heads, bias=bias, position=position)
        self.window, self.temperature = window, temperature
        self.to_types = nn.Linear(dim, 3 * self.kv_heads, bias=False)

    def _logits(self, x: Tensor) -> Float[Tensor, "batch kv_heads n 3"]:
        return self.to_types(x).unflatten(2, (self.kv_heads, 3)).transpose(1, 2)

    def types(self, x: Float[Tensor, "batch n dim"], offset: int = 0) -> Int[Tensor, "batch kv_heads n"]:
        """The type of each token, the first of the sequence global; ``offset`` is the position of the first of x."""
        kind = self._logits(x).argmax(-1)
        return kind.masked_fill(torch.arange(offset, offset + x.shape[1], device=x.device) == 0, GLOBAL)

    def _ends(
        self, kind: Int[Tensor, "batch kv_heads n"], keep: Bool[Tensor, "batch n"] | None = None, offset: int = 0
    ) -> Int[Tensor, "batch kv_heads n"]:
        """e: the next global token, or `NEVER`."""
        at = torch.arange(offset, offset + kind.shape[2], device=kind.device)
        ends = kind == GLOBAL if keep is None else (kind == GLOBAL) & keep[:, None]
        return torch.where(ends, at, NEVER).flip(2).cummin(2).values.flip(2)

    def _until(self, kind: Tensor, ends: Tensor, offset: int = 0) -> Int[Tensor, "batch kv_heads n"]:
        at = torch.arange(offset, offset + kind.shape[2], device=kind.device)
        until = torch.where(kind == LOCAL, ends, NEVER)
        return torch.where(kind == SLIDING, at + self.window - 1, until)

    def alive_share(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, ""]:
        """The share of all causal pairs that the types of x are expected to keep alive."""
        n = x.shape[1]
        at = torch.arange(n, device=x.device)
        life = torch.stack(
            [
                (n - at).expand(x.shape[0], self.kv_heads, -1),
                self._ends(self.types(x)).clamp(max=n - 1) - at + 1,
                (n - at).clamp(max=self.window).expand(x.shape[0], self.kv_heads, -1),
            ],
            -1,
        )
        share = (self._logits(x).softmax(-1) * life).sum(-1)
        return share.masked_fill(at == 0, n).sum(2).mean() / (n * (n + 1) / 2)  # the first one is global

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        keep = masks.split(how.mask)[1]
        if self.training and torch.is_grad_enabled():
            return self._merge(self._search(x, q, k, v, keep), x)
        kind = self.types(x)
        until = dense.repeat_heads(self._until(kind, self._ends(kind, keep))[..., None], self.heads)[..., 0]
        return self._merge(sparse.attend(q, k, v, mask=masks.join(Alive(until), how.mask)), x)

    def _search(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        """Attention with drawn types, whose gradient is the paper's."""
        drawn = F.gumbel_softmax(self._logits(x), tau=self.temperature, hard=True)
        at = torch.arange(x.shape[1], device=x.device)
        # The first token is global whatever was drawn, so its draw has no gradient.
        drawn = torch.where((at == 0)[:, None], F.one_hot(torch.full_like(at, GLOBAL), 3).to(drawn.dtype), drawn)
        kind = drawn.detach().argmax(-1)
        ends = self._ends(kind, keep)
        drawn, k, v = (dense.repeat_heads(t, self.heads) for t in (drawn, k, v))
        ends, until = (dense.repeat_heads(t[..., None], self.heads)[..., 0] for t in (ends, self._until(kind, ends)))

        def part(start: int, stop: int) -> Tensor:
            i, j = at[start:stop, None], at[:stop]
            causal = (j <= i).expand(x.shape[0], 1, -1, -1)
            if keep is not None:
                causal = causal & keep[:, None, None, :stop]
            value, end = v[:, :, :stop], ends[:, :, None, :stop]
            scores = dense.scores(q[:, :, start:stop], k[:, :, :stop])
            y = dense.softmax(scores, causal & (i <= until[:, :, None, :stop])) @ value
            to = drawn[:, :, None, :stop]
            alive = to[..., GLOBAL] * (i > end) + to[..., LOCAL] * (i <= end) + to[..., SLIDING] * (i - j < self.window)
            # Zero, with the gradient P (dy . v - dy . y) by the entries of M.
            change = (alive - alive.detach()) * dense.softmax(scores.detach(), causal)
            return y + change @ value.detach() - change.sum(-1, keepdim=True) * y.detach()

        return dense.by_rows(part, q.shape[2], q.shape[0] * q.shape[1] * k.shape[2])

    def _weights(self, x, context, how):
        q, k, _ = self._heads(x, context, how)
        kind = self.types(x)
        until = self._until(kind, self._ends(kind, masks.split(how.mask)[1]))
        alive = Alive(dense.repeat_heads(until[..., None], self.heads)[..., 0])
        return dense.weights(q, k, mask=masks.join(alive, how.mask))

    def _step(self, x, cache, context, how):
        length = 0 if cache is None else cache.length
        q, k = self._queries(x), self._keys(x)
        if isinstance(self.position, Rotation):
            q, k = self.position.rotate(q, offset=length), self.position.rotate(k, offset=length)
        v, kind = self._values(x), self.types(x, length)
        ends = self._ends(kind, offset=length)
        position = torch.arange(length, length + x.shape[1], device=x.device).expand_as(kind)
        until = self._until(kind, ends, length)
        is_open = (kind == LOCAL) & (until == NEVER)
        if cache is not None:
            old = self._evicted(cache.state, length)
            first = ends[:, :, :1]
            parts = (
                (old.keys, k),
                (old.values, v),
                (old.position, position),
                (torch.where(old.open, first, old.until), until),
                (old.open & (first == NEVER), is_open),
            )
            k, v, position, until, is_open = (torch.cat(pair, 2) for pair in parts)
        i = torch.arange(length, length + x.shape[1], device=x.device)[:, None]
        keep = (position[:, :, None] <= i) & (i <= until[:, :, None])
        rule = masks.Pairs(keep.repeat_interleave(self.heads // self.kv_heads, 1))
        y = dense.attend(q, k, v, mask=rule)
        return self._merge(y, x), LayerCache(length + x.shape[1], Cache(k, v, position, until, is_open))

    def _evicted(self, cache: Cache, now: int) -> Cache:
        """What queries from ``now`` on may read, moved together."""
        alive = cache.until >= now
        places = int(alive.sum(2).amax())  # the one number that decoding has to know
        order = (~alive).sort(stable=True).indices[:, :, :places]
        wide = order[..., None]
        return Cache(
            cache.keys.gather(2, wide.expand(-1, -1, -1, cache.keys.shape[3])),
            cache.values.gather(2, wide.expand(-1, -1, -1, cache.values.shape[3])),
            cache.position.gather(2, order),
            cache.until.gather(2, order),
            cache.open.gather(2, order),
        )
