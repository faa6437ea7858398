"""Cross-layer attention: layers in groups, of which only the first makes keys and values.

Brandon, Mishra, Nrusimha, Panda and Ragan-Kelley, "Reducing Transformer Key-Value Cache Size with Cross-Layer
Attention", 2024, arXiv 2405.12981.

    layers l = 0 .. L-1 in groups of s;  g(l) = s floor(l / s), the first layer of the group of l
    Q_l = x_l W_q,l                                   every layer             (batch, heads, n, d)
    K_g = x_g W_k,g,   V_g = x_g W_v,g                the first of a group    (batch, kv_heads, m, d)
    y_l = W_o,l [softmax(Q_l K_g(l)^T / sqrt(d)) V_g(l)]                      (batch, n, dim)

CLA2 (s = 2) halves the cache of keys and values, on top of what multi-query or grouped-query attention saves:
ceil(L / s) 2 kv_heads d numbers a token. The other layers have no W_k and W_v. The study's best is CLA2 with one
key/value head, the default here.

What is shared is a value that the caller hands on; no layer remembers anything:

    first = crosslight.create("cla", dim=256, heads=8)
    second = first.follower()
    shared = first.share(x)                           # keys and values, once for the group; rotations once too
    x = x + first(x, shared, causal=True)             # as first(x, causal=True), which makes its own
    x = x + second(x, shared, causal=True)

A decoding step of the group is ``y, cache = first.step(x_t, cache)``, then ``second.step(x_t, cache)`` with the cache
of the first. `CrossLayerAttention.stack` builds the layers of a whole model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, How, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.engines.positions import Rotation
from crosslight.errors import CrosslightError, UnsupportedPattern, expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

CARD = Card(
    id="cla",
    kind="token",
    group="heads",
    title="Reducing Transformer Key-Value Cache Size with Cross-Layer Attention",
    year=2024,
    paper="2405.12981",
    summary="Layers in groups share the keys and values of the first: a cache smaller by the size of the groups.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="multi-query attention with the same weights; a group whose layers all have the first one's W_k and W_v",
    differs="The paper is causal self-attention; a group may share a context as well.",
    evidence=Evidence(
        claim="A byte language model of six layers that makes keys and values in every second one (CLA2) loses little "
        "against plain multi-query attention",
        task="language-stack",
        metric="bits_per_byte",
        margin=-0.05,
        baseline="mqa",
        budget={"steps": 400},
    ),
)


@dataclass(frozen=True, eq=False)
class Shared:
    """Keys and values of a group of layers, positions included. ``cross``: they come from a context."""

    keys: Float[Tensor, "batch kv_heads m head_dim"]
    values: Float[Tensor, "batch kv_heads m head_dim"]
    cross: bool


@register(CARD)
class CrossLayerAttention(AttentionLayer):
    """softmax attention whose keys and values may be those of another layer.

    Wherever a layer takes ``context``, it also takes what `share` of the group's first layer gave; a follower takes
    nothing else.

    Args:
        dim, heads, head_dim, context_dim, bias, position: as in `AttentionLayer`.
        kv_heads: key/value heads; 1, as in the study's best models, unless given.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = 1,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
    ) -> None:
        core = Softmax(heads, head_width(dim, heads, head_dim))
        super().__init__(core, dim, kv_heads=kv_heads, context_dim=context_dim, bias=bias, position=position)
        #: Whether this is the first layer of a group, which has W_k and W_v.
        self.leads = True

    def follower(self) -> CrossLayerAttention:
        """Another layer of the group: fresh W_q and W_o, no W_k and W_v."""
        other = CrossLayerAttention(
            self.dim,
            self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            context_dim=self.context_dim,
            bias=self.q.bias is not None,
            position=copy.deepcopy(self.position),  # a learned bias belongs to a layer
        )
        del other.k, other.v
        other.leads = False
        return other.to(self.q.weight)

    @classmethod
    def stack(cls, depth: int, share: int = 2, **options: Any) -> nn.ModuleList:
        """``depth`` layers in groups of ``share``; ``options`` are those of a layer. The last group may be smaller."""
        expect(depth >= 1, "depth", depth, "a positive int")
        expect(share >= 1, "share", share, "a positive int")
        layers: list[CrossLayerAttention] = []
        for i in range(depth):
            layers.append(layers[i - i % share].follower() if i % share else cls(**options))
        return nn.ModuleList(layers)

    def share(self, x: Tensor, context: Tensor | None = None) -> Shared:
        """The keys and values that this layer would read in ``attn(x, context)``, for all layers of its group."""
        expect(self.leads, "share", "a follower", "the first layer of a group")
        x, context, how = self._checked(x, context, None, False, None)
        keys = self._keys(context)
        if isinstance(self.position, Rotation):
            keys = self.position.rotate(keys)
        return Shared(keys, self._values(context), how.cross)

    def _checked(self, x, context, mask, causal, grid):
        if not isinstance(context, Shared):
            if not self.leads:
                raise CrosslightError(
                    f"context: got {'None' if context is None else 'a tensor'}, "
                    "expected what `share` of the first layer of the group gave"
                )
            return super()._checked(x, context, mask, causal, grid)
        self._check_stream("x", x, self.dim)
        batch, heads, m, width = context.keys.shape
        expect(
            (batch, heads, width) == (x.shape[0], self.kv_heads, self.head_dim),
            "context",
            f"shared keys {tuple(context.keys.shape)}",
            f"(batch, kv_heads, m, head_dim) = ({x.shape[0]}, {self.kv_heads}, m, {self.head_dim})",
        )
        rule = masks.as_mask(mask, batch=batch, heads=self.heads, n=x.shape[1], m=m)
        return x, context, How(rule, causal, context.cross, grid)

    def _heads(self, x, context, how, offset=0):
        if not isinstance(context, Shared):
            return super()._heads(x, context, how, offset)
        return self._rotated(x, how, offset), context.keys, context.values

    def _rotated(self, x, how, offset):
        q = self._queries(x)
        return self.position.rotate(q, offset=offset, grid=how.grid) if isinstance(self.position, Rotation) else q

    def _values(self, context):
        return context.values if isinstance(context, Shared) else super()._values(context)

    def step(self, x, cache=None, *, context=None, mask=None):
        """As in `Mechanism`; a follower takes the cache that the group's first layer gave for the same token, and
        gives it back as it is."""
        if self.leads:
            if isinstance(context, Shared):
                raise UnsupportedPattern("context: got shared keys, expected a stream; a cache is shared by its value")
            return super().step(x, cache, context=context, mask=mask)
        expect(cache is not None, "cache", None, "that of the first layer of the group, after this token")
        return super().step(x, cache)

    def _step(self, x, cache, context, how):
        if self.leads:
            return super()._step(x, cache, context, how)
        offset = cache.length - x.shape[1]
        kv = cache.state if cache.cross else (cache.state.keys, cache.state.values, None)
        extra = self._offset(self._extra(how), offset)
        y = self.core(self._rotated(x, how, offset), kv[0], kv[1], mask=kv[2], **extra)
        return self._merge(y, x), cache
