"""Routing attention: tokens of one k-means cluster attend to each other, in some heads; the others attend locally.

Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers", 2020,
arXiv 2003.05997.

Routing heads, with k centroids mu_c each, which no gradient trains:

    Q, K  = LayerNorm(x W_q), LayerNorm(x W_k) without scale and shift; K = Q when causal    (batch, heads, n, d)
    I_c   = the w = n / k queries of largest mu_c . Q_i, in their order; J_c likewise of keys
    Y_c   = softmax(Q[I_c] K[J_c]^T / sqrt(d)) V[J_c]                                        (batch, heads, k, w, d)
    y_i   = mean of the rows of all Y_c that hold i; 0 if there is none
    mu_c <- 0.999 mu_c + 0.0005 (mean of the Q nearest to mu_c + mean of the K nearest to it)   in training

Local heads read their own block of ``window`` tokens and its neighbours, the previous one only when causal, with
relative positions: scores (q_i . k_j + q_i . r_{i-j}) / sqrt(d). Time is n k + n w: n sqrt(n) with k near sqrt(n).

The w best of a whole sequence depend on later tokens. With ``causal=True`` the layer takes what the paper defines
before it balances clusters: a token belongs to the one centroid nearest to it, and reads the last ``window`` tokens of
its cluster, itself included. In the order of clusters that is a band, which the sparse engine computes.
``lookahead=True`` is the paper's balanced form. In causal cross-attention a query reads the keys J_c of the centroid
nearest to it; in both cross patterns all heads route, as a query has no neighbours in another stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, LayerCache, head_width
from crosslight.attention.masformer import Spans
from crosslight.attention.precision import in_full
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, routed, sparse, tiles
from crosslight.engines.cache import KVCache
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    QKV = tuple[Tensor, Tensor, Tensor]

CARD = Card(
    id="routing-transformer",
    kind="token",
    group="sparse",
    title="Efficient Content-Based Sparse Attention with Routing Transformers",
    year=2020,
    paper="2003.05997",
    code="google-research/google-research",
    summary="Some heads attend within k-means clusters of queries and keys, the others within a local window.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n sqrt n",
    mask="keys",
    decode="kv",
    small={"clusters": 12, "window": 4},
    checked="clusters, local windows and relative positions written out token by token; dense attention with shared "
    "queries and keys at k = 1; the moving average of the centroids",
    differs="In the paper which tokens a cluster holds depends on later tokens, also in the causal model; here that "
    "needs `lookahead=True`, and the causal form is the paper's definition by the nearest centroid, cut at the last "
    "`window` members. Centroids follow the means as above; the released code averages sums and counts apart, and has "
    "a loss that draws tokens to their centroids. Cross patterns are ours. The cost holds for clusters near sqrt(n). "
    "Masked tokens are in no cluster.",
    evidence=Evidence(
        claim="Recall at any distance: heads that route by content beat a sliding window of twice as many keys",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.1,
        baseline="fused-neighborhood-attention",
        task_options={"length": 32, "pairs": 4, "power": 1.0},
        options={"clusters": 8, "window": 4},
        baseline_options={"kernel_size": 8},
    ),
)


@dataclass
class State:
    """What decoding carries: all keys and values, and the cluster of each in each routing head."""

    cache: KVCache
    cluster: Int[Tensor, "batch heads length"]


def _gathered(t: Float[Tensor, "batch heads n dim"], index: Int[Tensor, "batch heads clusters w"]) -> Tensor:
    """(batch, heads, clusters, w, dim)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, t.shape[3])
    return t.gather(2, flat).unflatten(2, index.shape[2:])


@register(CARD)
class RoutingAttention(AttentionLayer):
    """Local heads first, then routing heads.

    Args:
        dim, heads, head_dim, context_dim, bias: as in `AttentionLayer`.
        local_heads: heads that attend locally in self-attention; half of them unless given.
        clusters: k.
        window: tokens a block of the local heads; members of its cluster that a causal query reads at most.
        decay: of the centroids' moving average.
        lookahead: whether clusters are chosen from the whole sequence in the causal pattern too, as in the paper.
    """

    centroids: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        local_heads: int | None = None,
        clusters: int = 16,
        window: int = 256,
        decay: float = 0.999,
        lookahead: bool = False,
    ) -> None:
        expect(isinstance(clusters, int) and clusters >= 1, "clusters", clusters, "a number >= 1")
        expect(isinstance(window, int) and window >= 1, "window", window, "a number >= 1")
        expect(0 <= decay <= 1, "decay", decay, "a number between 0 and 1")
        super().__init__(Softmax(heads, head_width(dim, heads, head_dim)), dim, context_dim=context_dim, bias=bias)
        self.local = heads // 2 if local_heads is None else local_heads
        expect(0 <= self.local < heads, "local_heads", self.local, f"fewer than heads = {heads}")
        self.clusters, self.window, self.decay, self.lookahead = clusters, window, decay, lookahead
        self.register_buffer("centroids", torch.randn(heads, clusters, self.head_dim))
        if self.local:
            # r of the distances 1 - 2 window to 2 window - 1.
            self.relative = nn.Parameter(0.02 * torch.randn(self.local, 4 * window - 1, self.head_dim))

    # In at least float32: rounded to half precision first, tokens between two clusters would change sides. What is
    # read is rounded once clusters are chosen.
    def _queries(self, x):
        return self._split(in_full(self.q, x), self.heads)

    def _keys(self, context):
        return self._split(in_full(self.k, context), self.heads)

    # Clusters ---------------------------------------------------------------------------------------------------
    def _norm(self, t: Tensor) -> Tensor:
        return F.layer_norm(t, (self.head_dim,))

    def _likeness(self, t: Float[Tensor, "batch heads n dim"]) -> Float[Tensor, "batch heads n clusters"]:
        """mu . t, without gradient and in at least float32; the heads are the last ones of the layer."""
        wide = torch.promote_types(t.dtype, torch.float32)
        return t.detach().to(wide) @ self.centroids[-t.shape[1] :].to(wide).transpose(-1, -2)

    def nearest(self, t: Tensor, keep: Bool[Tensor, "batch n"] | None = None) -> Int[Tensor, "batch heads n"]:
        """The cluster of each token, k for masked ones."""
        nearest = self._likeness(t).argmax(-1)
        return nearest if keep is None else nearest.masked_fill(~keep[:, None], self.clusters)

    def _members(
        self, t: Tensor, keep: Tensor | None
    ) -> tuple[Int[Tensor, "batch heads clusters w"], Bool[Tensor, "batch heads clusters w"]]:
        """The w best tokens of each cluster in their order, and which of them are none."""
        count = math.ceil(t.shape[2] / self.clusters)
        likeness = self._likeness(t).transpose(-1, -2)
        if keep is not None:
            likeness = likeness.masked_fill(~keep[:, None, None], -math.inf)
        index = likeness.topk(count, -1).indices.sort(-1).values
        if keep is None:
            return index, torch.ones_like(index, dtype=torch.bool)
        return index, keep[:, None, None].expand(*index.shape[:3], -1).gather(3, index)

    @torch.no_grad()
    def _follow(self, *streams: tuple[Tensor, Tensor | None]) -> None:
        """The moving average: each of the streams has a share in the step towards the mean of its nearest tokens."""
        heads = streams[0][0].shape[1]
        step = torch.zeros_like(self.centroids[-heads:])
        for t, keep in streams:
            member = F.one_hot(self.nearest(t, keep), self.clusters + 1)[..., : self.clusters].to(t.dtype)
            count = member.sum((0, 2))[..., None]
            mean = torch.einsum("bhnc,bhnd->hcd", member, t.detach()) / count.clamp(min=1)
            change = torch.where(count > 0, mean - self.centroids[-heads:], 0.0)
            step = step + (1 - self.decay) / len(streams) * change
        self.centroids[-heads:] += step

    # Routing heads ----------------------------------------------------------------------------------------------
    def _balanced(self, q: Tensor, k: Tensor, keeps: tuple, causal: bool) -> tuple[Tensor, ...]:
        """Members of queries and of keys, which places are filled, and the mask between them."""
        (rows, asked), (columns, held) = self._members(q, keeps[0]), self._members(k, keeps[1])
        keep = held[..., None, :]
        if causal:
            keep = keep & (columns[..., None, :] <= rows[..., None])
        return rows, asked, columns, keep.expand(*rows.shape, -1)

    def _route_balanced(self, q: Tensor, k: Tensor, v: Tensor, keeps: tuple, causal: bool) -> Tensor:
        """The mean over the clusters that hold a query."""
        rows, asked, columns, keep = self._balanced(q, k, keeps, causal)
        q, k = q.to(v.dtype), k.to(v.dtype)
        parts = (_gathered(q, rows), _gathered(k, columns), _gathered(v, columns))
        some = masks.Pairs(keep.flatten(0, 1)) if causal or keeps[1] is not None else None
        y = dense.attend(*(t.flatten(0, 1) for t in parts), mask=some)
        y = y.unflatten(0, q.shape[:2])
        y = y if keeps[0] is None else y * asked[..., None]
        flat, share = rows.flatten(2), asked.flatten(2).to(y.dtype)
        total = torch.zeros_like(q).scatter_add(2, flat[..., None].expand(-1, -1, -1, q.shape[3]), y.flatten(2, 3))
        count = torch.zeros_like(q[..., 0]).scatter_add(2, flat, share)
        return total / count.clamp(min=1)[..., None]

    def _weigh_balanced(self, q: Tensor, k: Tensor, keeps: tuple, causal: bool) -> Tensor:
        rows, asked, columns, keep = self._balanced(q, k, keeps, causal)
        parts = (_gathered(q, rows).flatten(0, 1), _gathered(k, columns).flatten(0, 1))
        part = dense.weights(*parts, mask=masks.Pairs(keep.flatten(0, 1))).unflatten(0, q.shape[:2]) * asked[..., None]
        n, m = q.shape[2], k.shape[2]
        place = (rows[..., None] * m + columns[..., None, :]).flatten(2)
        total = part.new_zeros(*q.shape[:2], n * m).scatter_add(2, place, part.flatten(2)).unflatten(2, (n, m))
        count = torch.zeros_like(q[..., 0]).scatter_add(2, rows.flatten(2), asked.flatten(2).to(q.dtype))
        return total / count.clamp(min=1)[..., None]

    def _route_causal(self, q: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        """Each query on the last members of its cluster: a band, once tokens are in the order of clusters."""
        batch, heads = q.shape[:2]
        cluster, order = self.nearest(q, keep).flatten(0, 1).sort(stable=True)
        wide = order[:, None, :, None]
        q, v = (t.flatten(0, 1)[:, None].gather(2, wide.expand(-1, -1, -1, t.shape[3])) for t in (q.to(v.dtype), v))
        rule = masks.causal() & masks.window(self.window - 1) & masks.segments(cluster)
        if keep is not None:
            rule = rule & masks.Keys(keep.repeat_interleave(heads, 0).gather(1, order))
        y = sparse.attend(q, q, v, mask=rule)
        y = torch.zeros_like(y).scatter(2, wide.expand_as(y), y)
        return y.squeeze(1).unflatten(0, (batch, heads))

    def _weigh_causal(self, q: Tensor, keep: Tensor | None) -> Tensor:
        cluster = self.nearest(q, keep)
        read = _recent(cluster, self.window, self.clusters)
        return dense.weights(q, q, mask=masks.join(masks.Pairs(read), None if keep is None else masks.Keys(keep)))

    def _route_each(self, q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:
        """Queries on the members of the centroid nearest to them, (batch, heads, clusters, w, dim)."""
        size, filled = k.shape[3], held.flatten(0, 1).flatten(1)
        flat = (q.to(v.dtype), k.flatten(2, 3), v.flatten(2, 3))
        each_q, each_k, each_v = (t.flatten(0, 1)[:, None] for t in flat)
        nearest = self.nearest(q).flatten(0, 1)[:, None, :, None]
        y, _ = routed.attend(each_q, each_k, each_v, nearest, size, mask=masks.Keys(filled))
        return y.squeeze(1).unflatten(0, q.shape[:2])

    # Local heads ------------------------------------------------------------------------------------------------
    def _bias(self, q: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """q_i . r_{i-j} / sqrt(d), for i (rows, 1) and j (keys,); any number where i and j are too far apart."""
        by_distance = q @ self.relative.transpose(-1, -2) / math.sqrt(self.head_dim)
        place = (i - j + 2 * self.window - 1).clamp(0, 4 * self.window - 2)
        return by_distance.gather(-1, place.expand(*q.shape[:2], -1, -1))

    def _near(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool) -> Tensor:
        """Blocks of queries on the two or three blocks of keys around them."""
        size = min(self.window, q.shape[2])
        span = (2 if causal else 3) * size
        # r in the order of keys: from the first one's distance to the block's last query, to the last one's to the
        # first query.
        stop = 2 * (self.window + size) - 1
        r = F.pad(self.relative[:, stop - (span + size - 1) : stop].flip(1), (0, 0, 0, 1))
        return _Near.apply(q, k, v, r, keep, size, causal)

    def _weigh_near(self, q: Tensor, k: Tensor, mask: masks.Mask | None, causal: bool) -> Tensor:
        i = torch.arange(q.shape[2], device=q.device)
        bias = self._bias(q, i[:, None], i)
        return dense.weights(q, k, mask=masks.join(Spans(self.window), mask), causal=causal, bias=bias)

    # The layer --------------------------------------------------------------------------------------------------
    def _split_heads(self, x: Tensor, context: Tensor, how) -> tuple[QKV, QKV]:
        """q, k, v of the local heads, and of the routing heads; those have their queries as keys when causal."""
        local = 0 if how.cross else self.local
        streams = (self._queries(x), self._keys(context), self._values(context))
        # Cut as they lie, token by token, so that their gradients come together that way.
        cuts = (t.transpose(1, 2).split([local, self.heads - local], 2) for t in streams)
        (near_q, q), (near_k, k), (near_v, v) = ([part.transpose(1, 2) for part in cut] for cut in cuts)
        routing_q = self._norm(q)
        routing_k = routing_q if how.triangular else self._norm(k)
        return (near_q.to(v.dtype), near_k.to(v.dtype), near_v), (routing_q, routing_k, v)

    def _forward(self, x, context, how):
        near, (q, k, v) = self._split_heads(x, context, how)
        keep = masks.split(how.mask)[1]
        keeps = (None if how.cross else keep, keep)
        if self.training:
            self._follow((q, keeps[0]), (k, keep))
        if how.triangular and not self.lookahead:
            y = self._route_causal(q, v, keep)
        elif how.causal and how.cross:
            columns, held = self._members(k, keep)
            y = self._route_each(q, _gathered(k.to(v.dtype), columns), _gathered(v, columns), held)
        else:
            y = self._route_balanced(q, k, v, keeps, how.triangular)
        if near[0].shape[1]:
            near_by = self._near(*near, keep, how.causal)
            y = torch.cat([near_by.transpose(1, 2), y.transpose(1, 2)], 2).transpose(1, 2)  # as heads are joined
        return self._merge(y, x)

    def _weights(self, x, context, how):
        near, (q, k, v) = self._split_heads(x, context, how)
        keep = masks.split(how.mask)[1]
        if how.triangular and not self.lookahead:
            weights = self._weigh_causal(q, keep)
        elif how.causal and how.cross:
            columns, held = self._members(k, keep)
            read = torch.zeros(*columns.shape[:3], k.shape[2], dtype=torch.bool, device=k.device)
            read = read.scatter(3, columns, held)
            near_by = self.nearest(q)[..., None].expand(-1, -1, -1, k.shape[2])
            weights = dense.weights(q, k, mask=masks.Pairs(read.gather(2, near_by)))
        else:
            weights = self._weigh_balanced(q, k, (None if how.cross else keep, keep), how.triangular)
        weights = weights.to(v.dtype)
        if near[0].shape[1]:
            weights = torch.cat([self._weigh_near(*near[:2], how.mask, how.causal), weights], 1)
        return weights

    def _step(self, x, cache, context, how):
        offset = 0 if cache is None else cache.length
        length = offset + x.shape[1]
        if how.cross:
            if cache is None:
                _, (q, k, v) = self._split_heads(x, context, how)
                columns, held = self._members(k, masks.split(how.mask)[1])
                lists = (_gathered(k.to(v.dtype), columns), _gathered(v, columns), held)
            else:
                q, lists = self._norm(self._queries(x)), cache.state
            return self._merge(self._route_each(q, *lists), x), LayerCache(length, lists, cross=True)
        expect(not self.lookahead, "lookahead", True, "False: clusters look at tokens that are not there yet")
        (near_q, near_k, near_v), (q, k, v) = self._split_heads(x, x, how)
        cluster, q, k = self.nearest(q), q.to(v.dtype), k.to(v.dtype)
        keys, values = torch.cat([near_k, k], 1), torch.cat([near_v, v], 1)
        if cache is None:
            return self._forward(x, x, how), LayerCache(length, State(KVCache.start(keys, values), cluster))
        cluster = torch.cat([cache.state.cluster, cluster], 2)
        state = State(cache.state.cache.append(keys, values), cluster)
        keys, values, local = state.cache.keys, state.cache.values, near_q.shape[1]
        y = self._recall(q, keys[:, local:], values[:, local:], cluster)
        if local:
            start = max(0, offset // self.window - 1) * self.window  # nothing before is near
            i, j = (torch.arange(a, length, device=x.device) for a in (offset, start))
            near = dense.attend(
                near_q,
                keys[:, :local, start:],
                values[:, :local, start:],
                mask=Spans(self.window),
                causal=True,
                bias=self._bias(near_q, i[:, None], j),
                offset=offset - start,
            )
            y = torch.cat([near, y], 1)
        return self._merge(y, x), LayerCache(length, state)

    def _recall(self, q: Tensor, k: Tensor, v: Tensor, cluster: Int[Tensor, "batch heads length"]) -> Tensor:
        """The last queries on the last members of their clusters."""
        n, m = q.shape[2], k.shape[2]
        if n > 1:
            read = _recent(cluster, self.window, self.clusters)[:, :, m - n :]
            return dense.attend(q, k, v, mask=masks.Pairs(read))
        at = torch.where(cluster == cluster[..., -1:], torch.arange(m, device=q.device), -1)
        last = at.topk(min(self.window, m), -1).values
        index = last.clamp(min=0)[..., None].expand(-1, -1, -1, q.shape[3])
        return dense.attend(q, k.gather(2, index), v.gather(2, index), mask=masks.Pairs((last >= 0)[:, :, None]))


# Local heads without a matrix -----------------------------------------------------------------------------------
class _Blocks:
    """The blocks of queries of a call, and their scores on the blocks of keys around them, a few blocks at a time."""

    def __init__(self, q, k, v, r, keep, size: int, causal: bool) -> None:
        (self.batch, self.heads, n, dim), wide = q.shape, tiles.working_dtype(q.dtype)
        self.size, self.span, self.short, self.room = size, r.shape[1] - size, -n % size, tiles.Room()
        self.scale, self.r = 1 / math.sqrt(dim), r.to(wide).repeat(self.batch, 1, 1)
        self.q = self.cut(q.to(wide) * self.scale)
        beyond = (size, self.short + self.span - 2 * size)
        self.k, self.v = (F.pad(t.to(wide), (0, 0, *beyond)) for t in (k, v))
        self.plain = keep is None and not causal
        keep = F.pad(q.new_ones(1, n, dtype=torch.bool) if keep is None else keep, beyond)
        self.hidden = ~keep.unfold(1, self.span, size)[:, None, :, None]
        if causal:
            i, j = torch.arange(size, device=q.device)[:, None], torch.arange(self.span, device=q.device)
            self.later = j - size > i
        self.causal = causal

    def cut(self, t: Tensor) -> Tensor:
        """(batch, heads, blocks, size, dim)."""
        return F.pad(t, (0, 0, 0, self.short)).contiguous().unflatten(2, (-1, self.size))

    def chunks(self) -> Iterator[slice]:
        blocks = self.q.shape[2]
        scores = self.r.shape[0] * self.size * self.r.shape[1]
        count = max(1, (dense.CHUNK if self.q.is_cuda else sparse.CHUNK) // scores)
        return (slice(first, min(first + count, blocks)) for first in range(0, blocks, count))

    def flat(self, t: Tensor, chunk: slice) -> Tensor:
        """(batch * heads * blocks, size or 1, dim) of (batch, heads, all blocks, size or 1, dim)."""
        return t[:, :, chunk].flatten(0, 2)

    def around(self, t: Tensor, chunk: slice) -> Tensor:
        """(batch * heads * blocks, span, dim) of padded keys or values."""
        return t.unfold(2, self.span, self.size)[:, :, chunk].mT.flatten(0, 2)

    def table(self, name: str, chunk: slice) -> tuple[Tensor, Tensor]:
        """Room for a number for each query and row of r, and the view of it by query and key: rows that are read one
        number shorter than they are shift by one key from query to query, as distances do."""
        (rows, wide, _), size = self.r.shape, self.size
        table = self.room.take(name, self.r, rows, (chunk.stop - chunk.start) * size, wide)
        shifted = table.view(-1, size * wide)[:, size - 1 : -1].unflatten(1, (size, wide - 1))
        return table, shifted[..., : self.span]

    def weights(self, q: Tensor, k: Tensor, chunk: slice) -> Tensor:
        """softmax(q (k + r)^T), 0 in rows without keys."""
        table, scores = self.table("scores", chunk)
        torch.bmm(q.view(self.r.shape[0], -1, q.shape[-1]), self.r.mT, out=table)
        scores.baddbmm_(q, k.mT)
        if self.plain and chunk.start > 0 and chunk.stop < self.q.shape[2]:
            return scores.softmax(-1)
        hidden = self.hidden[:, :, chunk]
        if self.causal:
            hidden = hidden | self.later
        floor = hidden.to(scores.dtype).masked_fill_(hidden, -math.inf)
        scores.unflatten(0, (self.batch, self.heads, -1)).add_(floor)
        weights = scores.softmax(-1).unflatten(0, (self.batch, self.heads, -1))
        return weights.masked_fill_(hidden.all(-1, keepdim=True), 0).flatten(0, 2)


class _Near(torch.autograd.Function):
    """softmax(q (k + r)^T / sqrt(d)) v of blocks on the blocks around them, r by distance. As in the dense engine,
    weights of up to `dense.CHUNK` elements are kept for the backward pass, which computes more of them again."""

    @staticmethod
    def forward(ctx: Any, q, k, v, r, keep, size, causal):
        with torch.autocast(q.device.type, enabled=False):
            work, kept = _Blocks(q, k, v, r, keep, size, causal), {}
            few = any(ctx.needs_input_grad) and len(work.r) * q.shape[2] * work.span <= dense.CHUNK
            out = torch.empty_like(work.q)
            for chunk in work.chunks():
                weights = work.weights(work.flat(work.q, chunk), work.around(work.k, chunk), chunk)
                y = weights @ work.around(work.v, chunk)
                out[:, :, chunk] = y.unflatten(0, (work.batch, work.heads, -1))
                if few:
                    kept[chunk.start] = weights
            out = out.flatten(2, 3)[:, :, : q.shape[2]].to(q.dtype)
        ctx.save_for_backward(q, k, v, r, keep)
        ctx.how, ctx.kept = (size, causal), kept
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        q, k, v, r, keep = ctx.saved_tensors
        n, size = q.shape[2], ctx.how[0]
        with torch.autocast(q.device.type, enabled=False):
            work = _Blocks(q, k, v, r, keep, *ctx.how)
            grad = work.cut(grad.to(work.q.dtype))
            by_q, by_k, by_v, by_r = (torch.zeros_like(t) for t in (work.q, work.k, work.v, work.r))
            room, dim = work.room, q.shape[3]
            for chunk in work.chunks():
                q_, g_ = work.flat(work.q, chunk), work.flat(grad, chunk)
                k_, v_ = work.around(work.k, chunk), work.around(work.v, chunk)
                weights = ctx.kept.get(chunk.start)
                weights = work.weights(q_, k_, chunk) if weights is None else weights
                part_v = room.bmm("by_v", weights.mT, g_)
                by_weight = room.bmm("by_weight", g_, v_.mT)
                by_score = torch.ops.aten._softmax_backward_data(by_weight, weights, -1, weights.dtype)
                table, pairs = work.table("by_table", chunk)
                if chunk.start == 0:
                    table.zero_()  # and never anything else where no key is
                pairs.copy_(by_score)
                by_r.baddbmm_(table.mT, q_.view(len(by_r), -1, dim))
                part_q = room.bmm("by_q", table, work.r).view_as(q_).baddbmm_(by_score, k_)
                by_q[:, :, chunk] = part_q.unflatten(0, (work.batch, work.heads, -1))
                part_k = room.bmm("by_k", by_score.mT, q_)
                for total, part in ((by_k, part_k), (by_v, part_v)):
                    part = part.unflatten(0, (work.batch, work.heads, -1))
                    for begin in range(0, work.span, size):  # spans overlap, blocks do not
                        here = slice(chunk.start * size + begin, chunk.stop * size + begin)
                        total[:, :, here].unflatten(2, (-1, size)).add_(part[..., begin : begin + size, :])
            by_q = by_q.mul_(work.scale).flatten(2, 3)[:, :, :n].to(q.dtype)
            by_k, by_v = (t[:, :, size : size + n].to(q.dtype) for t in (by_k, by_v))
            by_r = by_r.unflatten(0, (work.batch, -1)).sum(0).to(r.dtype)
        return by_q, by_k, by_v, by_r, None, None, None


def _recent(cluster: Int[Tensor, "batch heads n"], window: int, clusters: int) -> Bool[Tensor, "batch heads n n"]:
    """Query i reads the last ``window`` members of its cluster, itself included."""
    rank = F.one_hot(cluster, clusters + 1).cumsum(2).gather(3, cluster[..., None])
    behind = rank - rank.transpose(2, 3)
    return (cluster[..., None] == cluster[:, :, None]) & (behind >= 0) & (behind < window)
