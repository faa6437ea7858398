"""Dynamic mask attention: the values say which keys are worth keeping, and each query reads the w best of its past.

Shi et al., "Trainable Dynamic Mask Sparse Attention", 2025, arXiv 2508.02124 (the attention of Doge).

    q, k = RoPE(RMSNorm(x W_q)), RoPE(RMSNorm(x W_k))       a head                  (batch, heads, n, d)
    m_j  = exp(A softplus([v_j^1 ; ... ; v_j^H] W_dt))      a key/value head        (batch, kv_heads, m)
    S_i  = the w keys j <= i of largest m_j                 all of them if i < w
    y_i  = softmax(q_i K[S_i]^T / sqrt(d) + m[S_i]) V[S_i]

The importance m depends on values alone, so a key's rank among the past only ever falls: once out of the best w it
stays out. A full pass is then a scan over chunks of queries, each reading the w keys that are left from before and
its own chunk; memory is n w and not n^2, and decoding needs no more than w keys and values. As m is a term of the
scores, A and W_dt are trained although the choice has no gradient. A starts at zero: of equal keys the later ones are
kept, so that the layer starts as a sliding window.

m enters as one more channel of the keys, [q / sqrt(d) ; 1] . [k ; m], so any softmax kernel computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.attention.base import AttentionLayer, LayerCache, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
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

#: Least queries of a chunk.
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
            y, _ = scan(q, k, v, rank, self.window)
        else:
            best = _best(rank, self.window)
            keep = masks.Pairs(_repeated(_take(rank, best) > -math.inf, self.heads)[:, :, None]) if how.mask else None
            y = attend(q, _take(k, best), _take(v, best), keep)
        return self._merge(y, x)

    def _weights(self, x, context, how):
        q, k, _, rank = self._parts(x, context, how)
        if how.triangular:
            keep = _among_best(rank, 0, self.window)
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
            y, state = scan(*self._parts(x, x, how, length), self.window, kept)
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
        keep = masks.Pairs(_repeated(state.importance > -math.inf, self.heads)[:, :, None])
        y = attend(q, state.keys, state.values, keep)
        return self._merge(y, x), LayerCache(length + x.shape[1], state, cross=True)


def scan(
    q: Tensor, k: Tensor, v: Tensor, rank: Float[Tensor, "batch kv_heads n"], window: int, kept: Kept | None = None
) -> tuple[Tensor, Kept]:
    """Causal attention of scaled queries on what was kept and on keys at their own positions, chunk by chunk."""
    if kept is None:
        kept = Kept(k[:, :, :0], v[:, :, :0], rank[:, :, :0])
    size, parts = max(CHUNK, window), []
    again = torch.is_grad_enabled() and q.shape[2] > size  # the backward pass computes chunks again
    for start in range(0, q.shape[2], size):
        here = slice(start, start + size)
        keys, values = torch.cat([kept.keys, k[:, :, here]], 2), torch.cat([kept.values, v[:, :, here]], 2)
        ranks = torch.cat([kept.importance, rank[:, :, here]], 2)
        old, queries = kept.keys.shape[2], q[:, :, here]
        if again:
            parts.append(checkpoint(_chunk, queries, keys, values, ranks, old, window, use_reentrant=False))
        else:
            parts.append(_chunk(queries, keys, values, ranks, old, window))
        best = _best(ranks, window)
        kept = Kept(_take(keys, best), _take(values, best), _take(ranks, best))
    return torch.cat(parts, 2), kept


def _chunk(q: Tensor, k: Tensor, v: Tensor, rank: Tensor, old: int, window: int) -> Tensor:
    """Queries on ``old`` keys, best last, and on as many new ones as there are queries."""
    keep = _among_best(rank, old, window)
    return attend(q, k, v, masks.Pairs(_repeated(keep, q.shape[1])))


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


def _among_best(
    rank: Float[Tensor, "batch kv_heads keys"], old: int, count: int
) -> Bool[Tensor, "batch kv_heads new keys"]:
    """Which keys are among the ``count`` best after each new one: ``old`` keys, best last, and then the new
    ones, in order of arrival. A later key wins over an equal one."""
    device, new = rank.device, rank.shape[2] - old
    arrivals, at = rank[:, :, old:], torch.arange(rank.shape[2], device=device)
    later = torch.arange(old, old + new, device=device)[:, None] > at
    # Row a, column j: does arrival a push key j down?
    wins = (arrivals[..., None] > rank[:, :, None]) | ((arrivals[..., None] == rank[:, :, None]) & later)
    above = wins.cumsum(2, dtype=torch.int32)
    if old:  # what was kept is sorted, and all of it came before an arrival
        best = rank[:, :, :old].contiguous()
        better = torch.arange(old - 1, -1, -1, device=device).expand_as(best)
        pushed = old - torch.searchsorted(best, arrivals.contiguous(), right=True)
        above = above + torch.cat([better, pushed], 2).to(torch.int32)[:, :, None]
    arrived = torch.arange(old, old + new, device=device)[:, None] >= at
    return (above < count) & arrived & (rank > -math.inf)[:, :, None]
