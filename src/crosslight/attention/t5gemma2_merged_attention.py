"""Merged attention: a decoder reads its own past and the encoder's output in one softmax, with one set of projections.

Zhang et al., "T5Gemma 2: Seeing, Reading, and Understanding Longer", 2025, arXiv 2512.14856.

Of decoder states X (batch, n, dim) and encoder states E (batch, m, dim), per head:

    Q = R norm(X W_q)      K = [R norm(X W_k) ; norm(E W_k)]      V = [X W_v ; E W_v]
    A = softmax(Q K^T / sqrt(d) + [causal or sliding window | padding of E])          (batch, heads, n, n + m)
    y = A V W_o                                                                       (batch, n, dim)

norm(x) = x / rms(x) * (1 + g) over a head's width, R the rotary position, which encoder keys do not have. It replaces
self- and cross-attention, so a decoder-only checkpoint becomes a decoder with no weights left over, and the attention
has half the parameters of the two. A row's weights over both parts sum to 1. Without a context it is self-attention.

`weights` with a context is the part over the context, (batch, heads, n, m), and `read` adds what comes from the past;
`joint` gives the whole, (batch, heads, n, n + m). `Beside` is the mask: a rule over the first keys, another over the
rest. Decoding carries the decoder's keys and values, cut to the window if there is one, and the encoder's, made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, How, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Bias
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Stream = Float[Tensor, "batch n dim"]
    Context = Float[Tensor, "batch m context_dim"]

CARD = Card(
    id="t5gemma2-merged-attention",
    kind="token",
    group="positions-masks",
    title="T5Gemma 2: Seeing, Reading, and Understanding Longer",
    year=2025,
    paper="2512.14856",
    summary="A decoder's self- and cross-attention as one softmax over its past and the encoder's output, with one set "
    "of projections.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="transformers T5Gemma2MergedAttention with the same weights, global and sliding; causal softmax attention "
    "without a context",
    differs="Projections have no biases and positions are rotary unless asked otherwise, as in the model. A context of "
    "another width, which the paper does not have, is projected to dim first. A mask is one of the context where there "
    "is one.",
    evidence=Evidence(
        claim="copies a sequence as well as with cross-attention of its own",
        task="copy",
        metric="accuracy",
        margin=-0.02,
    ),
)


@dataclass(frozen=True)
class Beside(Mask):
    """``first`` rules the first ``count`` keys, ``second`` those after them, counted from 0; None lets all through."""

    count: int
    first: Mask | None = None
    second: Mask | None = None

    @property
    def shared(self):
        return all(rule is None or rule.shared for rule in (self.first, self.second))

    def visible(self, b, h, i, j):
        seen = (i >= 0) & (j >= 0)
        if self.first is not None and self.count:
            near = self.first.visible(b, h, i, j.clamp(max=self.count - 1))
            seen = seen & (near | (j >= self.count))
        if self.second is not None:
            far = self.second.visible(b, h, i, (j - self.count).clamp(min=0))
            seen = seen & (far | (j < self.count))
        return seen

    def dense(self, batch, heads, n, m, *, device=None, offset=0):
        count, parts = min(self.count, m), []
        for rule, keys in ((self.first, count), (self.second, m - count)):
            if keys:  # each rule is asked about its own keys alone
                every = torch.ones(1, 1, n, keys, dtype=torch.bool, device=device)
                parts.append(every if rule is None else rule.dense(batch, heads, n, keys, device=device, offset=offset))
        size = torch.broadcast_shapes(*(part.shape[:2] for part in parts))
        return torch.cat([part.expand(*size, -1, -1) for part in parts], -1)

    def blocks(self, tile):
        i0, i1, j0, j1 = tile
        some, _ = super().blocks(tile)
        every, last = some, self.count - 1
        if self.first is not None and self.count:
            near, all_near = self.first.blocks((i0, i1, j0.clamp(max=last), j1.clamp(max=last)))
            some, every = some & (near | (j1 > last)), every & (all_near | (j0 > last))
        if self.second is not None:
            far, all_far = self.second.blocks((i0, i1, (j0 - self.count).clamp(min=0), (j1 - self.count).clamp(min=0)))
            some, every = some & (far | (j0 <= last)), every & (all_far | (j1 <= last))
        return some, every


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + g), in at least float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = torch.linalg.vecdot(wide, wide).unsqueeze(-1) / wide.shape[-1]
        wide = wide * torch.rsqrt(mean + self.eps)
        return (wide * (1 + self.weight)).to(x.dtype)


@dataclass
class MergedCache:
    """Keys and values of the decoder so far and of the encoder, the encoder's padding, and how many were decoded."""

    length: int
    own: KVCache
    other: tuple[Tensor, Tensor] | None
    mask: Mask | None
    cross: bool


@register(CARD)
class MergedAttention(AttentionLayer):
    """softmax attention over [x ; context].

    Args:
        dim, heads, kv_heads, head_dim, context_dim, bias: as in `AttentionLayer`.
        position: a rotation of queries and of the keys of x, "rope" unless given, or None.
        window: x reads itself at most ``window`` - 1 tokens away (local layers); all of the context stays visible.
    """

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
        window: int | None = None,
    ) -> None:
        expect(window is None or window >= 1, "window", window, "a number >= 1, or None")
        core = Softmax(heads, head_width(dim, heads, head_dim))
        super().__init__(core, dim, kv_heads=kv_heads, bias=bias, position=position)
        expect(not isinstance(self.position, Bias), "position", repr(position), "a rotation or None")
        self.window = window
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        if context_dim is not None and context_dim != dim:
            self.context_dim = context_dim
            self.widen = nn.Linear(context_dim, dim, bias=False)

    def _queries(self, x):
        return self.q_norm(super()._queries(x))

    def _keys(self, context):
        return self.k_norm(super()._keys(context))

    def _own(self, x: Stream, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        return super()._heads(x, x, How(), offset)

    def _other(self, context: Context) -> tuple[Tensor, Tensor]:
        z = self.widen(context) if self.context_dim != self.dim else context
        return self._keys(z), self._values(z)

    def _rule(self, causal: bool) -> Mask | None:
        window = None if self.window is None else masks.window(self.window - 1)
        return masks.join(masks.causal() if causal else None, window)

    def _merged(self, x: Stream, context: Context, how: How) -> tuple[Tensor, Tensor, Tensor, Mask | None]:
        """Queries, all keys, all values, and the mask over them."""
        q, k, v = self._own(x)
        rule = self._rule(how.causal)
        if not how.cross:
            return q, k, v, masks.join(rule, how.mask)
        other = self._other(context)
        k, v = (torch.cat(pair, 2) for pair in zip((k, v), other, strict=True))
        mask = None if rule is None and how.mask is None else Beside(x.shape[1], rule, how.mask)
        return q, k, v, mask

    def _forward(self, x, context, how):
        if how.cross and how.causal and how.mask is None and self.window is None:
            # After all of the context, x reads what plain causal queries read.
            q, *own = self._own(x)
            k, v = (torch.cat(pair, 2) for pair in zip(self._other(context), own, strict=True))
            return self._merge(dense.attend(q, k, v, causal=True, offset=context.shape[1]), x)
        q, k, v, mask = self._merged(x, context, how)
        return self._merge(self.core(q, k, v, mask=mask), x)

    def _joint(self, x: Stream, context: Context, how: How) -> Float[Tensor, "batch heads n keys"]:
        q, k, _, mask = self._merged(x, context, how)
        return dense.weights(q, k, mask=mask)

    def joint(
        self, x: Stream, context: Context | None = None, *, mask: Mask | Tensor | None = None, causal: bool = False
    ) -> Float[Tensor, "batch heads n keys"]:
        """The matrix over [x ; context], (batch, heads, n, n + m)."""
        return self._joint(*self._checked(x, context, mask, causal, None))

    def _weights(self, x, context, how):
        weights = self._joint(x, context, how)
        return weights[..., x.shape[1] :] if how.cross else weights

    def _read(self, weights, x, context, how):
        if how.cross:
            own = self._joint(x, context, how)[..., : x.shape[1]]
            weights = torch.cat([own, weights], -1)
        v = self._merged(x, context, how)[2]
        return self._merge(self.core.read(weights, v), x)

    def _step(self, x, cache, context, how):
        length = 0 if cache is None else cache.length
        q, k, v = self._own(x, length)
        if cache is None:
            own = KVCache.start(k, v)
            other, mask = (self._other(context), how.mask) if how.cross else (None, None)
        else:
            own, other, mask = cache.own.append(k, v), cache.other, cache.mask
        keys, values = own.keys, own.values
        # Positions count from the first key that is kept.
        rule = self._rule(True)
        offset = own.length - x.shape[1]
        if other is not None:
            rule = Beside(own.length, rule, mask)
            keys, values = torch.cat([keys, other[0]], 2), torch.cat([values, other[1]], 2)
        y = dense.attend(q, keys, values, mask=rule, offset=offset)
        if self.window is not None and own.length >= 2 * self.window:
            kept = own.length - self.window + 1  # what a later query can read
            own = KVCache.start(own.keys[:, :, kept:].contiguous(), own.values[:, :, kept:].contiguous())
        return self._merge(y, x), MergedCache(length + x.shape[1], own, other, mask, how.cross)
