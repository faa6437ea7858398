"""Dynamic mask attention: the values say which keys are worth keeping, and each query reads the w best of its past.

Shi et al., "Trainable Dynamic Mask Sparse Attention", 2025, arXiv 2508.02124 (the attention of Doge).

    q, k = RoPE(RMSNorm(x W_q)), RoPE(RMSNorm(x W_k))       a head                  (batch, heads, n, d)
    m_j  = exp(A softplus([v_j^1 ; ... ; v_j^H] W_dt))      a key/value head        (batch, kv_heads, m)
    S_i  = the w keys j <= i of largest m_j                 all of them if i < w
    y_i  = softmax(q_i K[S_i]^T / sqrt(d) + m[S_i]) V[S_i]

The importance m depends on values alone, so a key's rank among the past only ever falls: once out of the best w it
stays out. A full pass is then a scan over blocks of queries, each on the w keys that are left from before and the
block's own, which are gathered once for all its queries. Their numbers are kept for the backward pass, which gathers
them and computes the weights again. Decoding needs no more than w keys and values. As m is a term of the
scores, A and W_dt are trained although the choice has no gradient. A starts at zero: of equal keys the later ones are
kept, so that the layer starts as a sliding window.

m enters as one more channel of the keys, [q / sqrt(d) ; 1] . [k ; m], so any softmax kernel computes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crosslight.attention.base import AttentionLayer, LayerCache, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse, tiles
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotation
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CARD = Card(
    id="dynamic-mask-attention",
    kind="token",
    group="sparse",
    title="Trainable Dynamic Mask Sparse Attention",
    year=2025,
    paper="2508.02124",
    code="SmallDoges/flash-dmattn",
    summary="Each query reads the few past keys that their values mark as most important.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    small={"window": 12},
    checked="transformers' DogeAttention with the same weights; the choice sorted out by hand for each query",
    differs="m is the paper's and transformers' exponential; later code of the authors takes its exponent "
    "(`exponential=False`). Without a causal mask, and in cross-attention, every query reads the same w keys. "
    "transformers leaves open which of equally important keys are kept, here the later ones; masked keys are never "
    "kept. The cost holds for a fixed w.",
    evidence=Evidence(
        claim="Multi-query recall: the quarter of the keys that the values mark beats a sliding window of as many",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.1,
        baseline="fused-neighborhood-attention",
        task_options={"length": 32, "pairs": 4, "power": 1.0},  # queries at any distance alike
        options={"window": 8},
        baseline_options={"kernel_size": 8},
    ),
)

#: Queries of a block; more of them on a GPU, where fewer calls matter most.
CHUNK = 128


@dataclass
class Kept:
    """The keys that later queries may still read, best last: at most w."""

    keys: Float[Tensor, "batch kv_heads kept dim"]
    values: Float[Tensor, "batch kv_heads kept value_dim"]
    importance: Float[Tensor, "batch kv_heads kept"]


@register(CARD)
class DynamicMaskAttention(AttentionLayer):
    """softmax over the w most important keys.

    Args:
        dim, heads, kv_heads, head_dim, context_dim, bias, position: as in `AttentionLayer`.
        window: w.
        exponential: whether m is the exponential of A softplus(.), as in the paper, or A softplus(.) itself.
    """

    exempt = {"heads_may_be_grouped": "W_dt reads all key/value heads, so its width is another with fewer of them"}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        position: str | nn.Module | None = "rope",
        window: int = 2048,
        exponential: bool = True,
    ) -> None:
        expect(isinstance(window, int) and window >= 1, "window", window, "a number >= 1")
        core = Softmax(heads, head_width(dim, heads, head_dim))
        super().__init__(core, dim, kv_heads=kv_heads, context_dim=context_dim, bias=bias, position=position)
        self.window, self.exponential = window, exponential
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6), nn.RMSNorm(self.head_dim, eps=1e-6)
        self.dt = nn.Linear(self.kv_heads * self.head_dim, self.kv_heads, bias)
        self.A = nn.Parameter(torch.zeros(self.kv_heads))

    def _queries(self, x):
        return self.q_norm(super()._queries(x))

    def _keys(self, context):
        return self.k_norm(super()._keys(context))

    def importance(self, v: Float[Tensor, "batch kv_heads m dim"]) -> Float[Tensor, "batch kv_heads m"]:
        """m of each key, in at least float32: keys are told apart by small differences."""
        wide = torch.promote_types(v.dtype, torch.float32)
        bias = None if self.dt.bias is None else self.dt.bias.to(wide)
        score = F.linear(v.transpose(1, 2).flatten(2).to(wide), self.dt.weight.to(wide), bias)
        score = self.A.to(wide)[:, None] * F.softplus(score.transpose(1, 2).contiguous())
        return score.exp() if self.exponential else score

    def _parts(self, x: Tensor, context: Tensor, how, offset: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled queries with a one, keys with m, values, and m without gradient, -inf where masked."""
        q, k, v = self._heads(x, context, how, offset)
        m = self.importance(v)
        q = _with_channel(q / math.sqrt(self.head_dim), q.new_ones(*q.shape[:3]))
        keep = masks.split(how.mask)[1]
        rank = m.detach() if keep is None else m.detach().masked_fill(~keep[:, None], -math.inf)
        return q, _with_channel(k, m.to(k.dtype)), v, rank

    def _forward(self, x, context, how):
        if forced() == "reference":
            return self._read(self._weights(x, context, how), x, context, how)
        q, k, v, rank = self._parts(x, context, how)
        if k.shape[2] <= self.window:
            y = attend(q, k, v, how.mask, how.triangular)
        elif how.triangular:
            y, _ = scan(q, k, v, rank, self.window, masked=how.mask is not None)
        else:
            best = _best(rank, self.window)
            keep = masks.Pairs(_repeated(_take(rank, best) > -math.inf, self.heads)[:, :, None]) if how.mask else None
            y = attend(q, _take(k, best), _take(v, best), keep)
        return self._merge(y, x)

    def _weights(self, x, context, how):
        q, k, _, rank = self._parts(x, context, how)
        if how.triangular:
            keep = _among_best(rank, self.window)
        else:
            keep = torch.zeros_like(rank, dtype=torch.bool).scatter(2, _best(rank, self.window), True)
            keep = (keep & (rank > -math.inf))[:, :, None]
        return dense.weights(q, k, mask=masks.Pairs(_repeated(keep, self.heads)), scale=1.0)

    def _read(self, weights, x, context, how):
        return self._merge(weights @ dense.repeat_heads(self._values(context), self.heads), x)

    def _step(self, x, cache, context, how):
        length = 0 if cache is None else cache.length
        if not how.cross:
            kept = None if cache is None else cache.state
            y, state = scan(*self._parts(x, x, how, length), self.window, kept, how.mask is not None)
            return self._merge(y, x), LayerCache(length + x.shape[1], state)
        if cache is None:
            _, k, v, rank = self._parts(x, context, how)
            best = _best(rank, self.window)
            state = Kept(_take(k, best), _take(v, best), _take(rank, best))
        else:
            state = cache.state
        q = self._queries(x)
        if isinstance(self.position, Rotation):
            q = self.position.rotate(q, offset=length)
        q = _with_channel(q / math.sqrt(self.head_dim), q.new_ones(*q.shape[:3]))
        y = _attend_all(q, state)
        return self._merge(y, x), LayerCache(length + x.shape[1], state, cross=True)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Float[Tensor, "batch kv_heads n"],
    window: int,
    kept: Kept | None = None,
    masked: bool = False,
) -> tuple[Tensor, Kept]:
    """Causal attention of scaled queries on what was kept and on keys at their own positions.

    ``masked``: whether ranks may be -inf.
    """
    if kept is not None:
        k, v = torch.cat([kept.keys, k], 2), torch.cat([kept.values, v], 2)
        rank, masked = torch.cat([kept.importance, rank], 2), True
    best = _best(rank, window)
    left = Kept(_take(k, best), _take(v, best), _take(rank, best))
    if q.shape[2] == 1:
        return _attend_all(q, left), left
    grouped = q.reshape(k.shape[0] * k.shape[1], -1, *q.shape[2:])
    k, v, size = k.contiguous(), v.contiguous(), CHUNK if q.device.type == "cpu" else 8 * CHUNK
    y = _Scan.apply(grouped, k.flatten(0, 1), v.flatten(0, 1), rank.flatten(0, 1), window, size, masked)
    return y.view(*q.shape[:3], -1), left


def _attend_all(q: Tensor, kept: Kept) -> Tensor:
    keep = masks.Pairs(_repeated(kept.importance > -math.inf, q.shape[1])[:, :, None])
    return attend(q, kept.keys, kept.values, keep)


class _Scan(torch.autograd.Function):
    """Queries (heads, group, n, dim) on keys (heads, m, dim), the last n at the queries' positions. For the backward
    pass it keeps which keys a block reads, and computes the weights again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rank: Tensor, window: int, size: int, masked: bool
    ) -> Tensor:
        blocks, out = _blocks(rank, q.shape[2], window, size, masked), q.new_empty(*q.shape[:3], v.shape[2])
        for at, _, tile in _tiles(q, k, v, size, blocks):
            out[at] = tiles.forward(*tile, False)[0].squeeze(1)
        ctx.save_for_backward(q, k, v, out, *(t for block in blocks for t in block))
        ctx.size = size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        wide = tiles.working_dtype(q.dtype)
        delta = torch.linalg.vecdot(grad.to(wide), out.to(wide))
        by_q, by_k, by_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for at, keys, tile in _tiles(q, k, v, ctx.size, list(zip(kept[::2], kept[1::2], strict=True))):
            y = tiles.backward(*tile, grad[at].to(wide).unsqueeze(1), delta[at].unsqueeze(1))
            by_q[at] = y[0].squeeze(1)
            by_k.flatten(0, 1).index_add_(0, keys, y[1].flatten(0, 2))
            by_v.flatten(0, 1).index_add_(0, keys, y[2].flatten(0, 2))
        return by_q, by_k.to(k.dtype), by_v.to(v.dtype), None, None, None, None


def _blocks(
    rank: Float[Tensor, "heads m"], n: int, window: int, size: int, masked: bool
) -> list[tuple[Tensor, Tensor]]:
    """For each block of the last ``n`` positions the keys that any of its queries reads, (heads, keys) of all heads'
    keys in one list: those at its own positions, then those left from before, the worst first. And for the first of
    these, (heads, some), the query of the block at which they are out of the best; the others stay in."""
    order = rank.argsort(stable=True)
    place = order.argsort()  # as `rank`, but no two are equal, and the later ones win
    first_key = torch.arange(len(rank), device=rank.device)[:, None] * rank.shape[1]
    kept, blocks = place[:, :-n], []
    for new in place[:, -n:].split(size, 1):
        low, rest = kept[:, : new.shape[1]], kept[:, new.shape[1] :]  # of which arrivals can push out none
        some = torch.cat([new, low], 1)
        lead = window - kept.shape[1] + torch.searchsorted(low.contiguous(), some, right=True)
        beaten = (new[:, None] > some[..., None]).cumsum(2)
        until = torch.searchsorted(beaten, lead[..., None]).squeeze(2)
        keys = order.gather(1, torch.cat([some, rest], 1))
        if masked:
            until = F.pad(until, (0, rest.shape[1]), value=size).masked_fill(rank.gather(1, keys) == -math.inf, 0)
        blocks.append((keys + first_key, until))
        kept = torch.cat([kept, new], 1).sort().values[:, -window:]
    return blocks


def _tiles(
    q: Tensor, k: Tensor, v: Tensor, size: int, blocks: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor, tuple[Tensor, Tensor, Tensor, tiles.Hidden, tiles.Room]]]:
    """A few heads of a block at a time: where its queries are, its keys, and what `tiles.forward` takes."""
    room, dtype = tiles.Room(), tiles.working_dtype(q.dtype)
    limit = sparse.CHUNK if q.device.type == "cpu" else 64 * sparse.CHUNK
    most = max(1, limit // (q.shape[1] * size * blocks[-1][0].shape[1]))

    def read(name: str, t: Tensor, keys: Tensor) -> Tensor:
        taken = room.rows(name, t.flatten(0, 1), keys.flatten()).to(dtype)
        return taken.view(keys.shape[0], 1, keys.shape[1], t.shape[2])

    for first in range(0, q.shape[0], most):
        heads = slice(first, first + most)
        for start, (keys, until) in zip(range(0, q.shape[2], size), blocks, strict=True):
            at, keys, until = (heads, slice(None), slice(start, start + size)), keys[heads], until[heads, None]
            row = torch.arange(min(size, q.shape[2] - start), device=q.device)
            since = F.pad(row, (0, until.shape[2] - len(row)))  # other keys than its own are there from the start
            seen = (since <= row[:, None]) & (row[:, None] < until)
            hidden = tiles.Hidden.of(seen[:, None, None], dtype)
            queries = q[at].to(dtype).unsqueeze(1)
            yield at, keys.flatten(), (queries, read("k", k, keys), read("v", v, keys), hidden, room)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T) v, with values as wide as the keys: the fast kernels ask for one width."""
    wider = F.pad(v, (0, k.shape[3] - v.shape[3]))
    return dense.attend(q, k, wider, mask=mask, causal=causal, scale=1.0)[..., : v.shape[3]]


def _with_channel(t: Tensor, last: Tensor) -> Tensor:
    """t with one more channel, and zeros up to a width that kernels take."""
    return F.pad(torch.cat([t, last[..., None]], -1), (0, -(t.shape[-1] + 1) % 8))


def _best(rank: Float[Tensor, "batch kv_heads m"], count: int) -> Int[Tensor, "batch kv_heads best"]:
    """The most important keys, best last; of equals the later ones, and these last."""
    return rank.sort(stable=True).indices[:, :, -count:]


def _take(t: Tensor, index: Int[Tensor, "batch kv_heads best"]) -> Tensor:
    return t.gather(2, index) if t.dim() == 3 else t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[3]))


def _repeated(keep: Tensor, heads: int) -> Tensor:
    return keep if keep.shape[1] == heads else keep.repeat_interleave(heads // keep.shape[1], 1)


def _among_best(rank: Float[Tensor, "batch kv_heads m"], count: int) -> Bool[Tensor, "batch kv_heads m m"]:
    """Which keys are among the ``count`` best after each arrival. A later key wins over an equal one."""
    at = torch.arange(rank.shape[2], device=rank.device)
    arrival, key = rank[..., None], rank[:, :, None]
    wins = (arrival > key) | ((arrival == key) & (at[:, None] > at))
    return (wins.cumsum(2, dtype=torch.int32) < count) & (at[:, None] >= at) & (key > -math.inf)
