"""Multi-token attention: scores are convolved over queries, keys and heads before they decide what is read.

Golovneva, Wang, Weston and Sukhbaatar, "Multi-Token Attention", 2025, arXiv 2504.00927.

    S = Q K^T / sqrt(d), 0 where masked                                                     (batch, heads, n, m)
    S'_ij = sum_{0 <= a < c_q} sum_{|b| <= (c_k - 1) / 2} theta_{a,b} S_{i-a, j-b}          a convolution for each head
    A = softmax(S'), masked
    A'^g = sum_{h in group} w_gh A^h                                                        groups of c_h heads
    y = W_o [gate(norm(A'_1 V_1)) ; ... ],  norm = RMSNorm over a head's d channels,  gate(t) = t sigmoid(w . t + b)

A weight then depends on several queries and keys at once, so that a head can find where two things stand together. The
convolution looks at earlier queries only, and scores of the future are zero before it and masked after it: output i
knows nothing of tokens behind i. All kernels start as the identity. ``conv`` and ``mixing`` say whether each stands
before or after the softmax; "post" weights, and mixed ones, need not sum to 1. The paper convolves keys and queries in
every fourth layer only, and mixes heads in all: ``query_kernel=1, key_kernel=1`` and ``mix=1`` switch one off.

Decoding keeps the last c_q - 1 queries beside keys and values. Time and, in training, memory are those of a dense n x m
map; rows are taken in chunks with the c_q - 1 rows above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core, LayerCache
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.backend import forced
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotation
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads n dim"]

Place = Literal["pre", "post"]

CARD = Card(
    id="mta",
    kind="token",
    group="scores",
    title="Multi-Token Attention",
    year=2025,
    paper="2504.00927",
    code="facebookresearch/RAM",
    summary="Convolves attention scores over neighbouring queries, keys and heads, so that several tokens decide "
    "together what is read.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    mask="keys",
    decode="kv",
    checked="causal multi-head attention with identity kernels; the sums written out score by score; shifted maps",
    differs="The paper is causal self-attention; in the other patterns the convolution looks at earlier queries all "
    "the same. Norm and gate follow the released configuration; the depth-dependent scale of the paper is `depth`.",
    evidence=Evidence(
        claim="A byte language model with convolved scores and mixed heads is better than one with plain attention",
        task="language",
        metric="bits_per_byte",
        margin=0.02,
    ),
)


class MultiTokenLayer(AttentionLayer):
    """The layer around `MultiTokenAttention`: norm and gate of each head; the last queries in decoding."""

    core: MultiTokenAttention

    def __init__(self, core: MultiTokenAttention, dim: int, **own: Any) -> None:
        super().__init__(core, dim, **own)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5) if core.norm else None
        self.gate = nn.Linear(self.head_dim, 1) if core.gate else None

    def _merge(self, y, x):
        if self.norm is not None:
            y = self.norm(y) * self.core.depth_scale
        if self.gate is not None:
            y = y * self.gate(y).sigmoid()
        return super()._merge(y, x)

    def _step(self, x, cache, context, how):
        if not how.cross:
            return super()._step(x, cache, context, how)
        if cache is None:
            q, k, v = self._heads(x, context, how)
            state = Recent(KVCache.start(k, v), q[:, :, :0], how.mask)
        else:
            q, state = self._queries(x), cache.state
            if isinstance(self.position, Rotation):
                q = self.position.rotate(q, offset=cache.length)
        y, state = self.core.decode(q, state, causal=False)
        return self._merge(y, x), LayerCache((cache.length if cache else 0) + x.shape[1], state, True)


@dataclass
class Recent:
    """Keys and values, the last c_q - 1 queries, and the mask of a context."""

    kv: KVCache
    queries: Float[Tensor, "batch heads recent dim"]
    mask: Mask | None = None


@register(CARD)
class MultiTokenAttention(Core):
    """(mixed softmax of convolved scores) v; q (batch, heads, n, d), k and v (batch, heads, m, d).

    Args:
        query_kernel: c_q, the query and those before it.
        key_kernel: c_k, an odd number of keys around each.
        mix: c_h, heads that are mixed in a group; 2, or 1 where the number of heads is odd.
        conv: the key-query convolution "pre" or "post" softmax.
        mixing: the head mixing "pre" or "post" softmax.
        norm: RMSNorm of each head's output.
        gate: a sigmoid gate for each head's output.
        depth: index of the layer, for the norm's scale 1 - lambda with lambda = 0.8 - 0.6 exp(-0.3 depth); no scale
            if None.
    """

    layer = MultiTokenLayer

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        query_kernel: int = 6,
        key_kernel: int = 11,
        mix: int | None = None,
        conv: Place = "pre",
        mixing: Place = "post",
        norm: bool = True,
        gate: bool = True,
        depth: int | None = None,
    ) -> None:
        super().__init__(heads, head_dim)
        mix = (1 if heads % 2 else 2) if mix is None else mix
        expect(query_kernel >= 1, "query_kernel", query_kernel, "a positive int")
        expect(key_kernel >= 1 and key_kernel % 2 == 1, "key_kernel", key_kernel, "an odd positive int")
        expect(mix >= 1 and heads % mix == 0, "mix", mix, f"a divisor of heads = {heads}")
        for name, place in (("conv", conv), ("mixing", mixing)):
            expect(place in get_args(Place), name, repr(place), f"one of {', '.join(get_args(Place))}")
        self.query_kernel, self.key_kernel, self.mix = query_kernel, key_kernel, mix
        self.conv, self.mixing, self.norm, self.gate = conv, mixing, norm, gate
        self.depth_scale = 1.0 if depth is None else 0.2 + 0.6 * math.exp(-0.3 * depth)
        if query_kernel * key_kernel > 1:
            # As a cross-correlation: the last row is the query's own, theta_{a,b} stands at [-1 - a, centre - b].
            kernel = torch.zeros(heads, 1, query_kernel, key_kernel)
            kernel[:, :, -1, key_kernel // 2] = 1.0
            self.kernel = nn.Parameter(kernel)
        if mix > 1:
            self.mixed = nn.Parameter(torch.eye(mix).repeat(heads // mix, 1, 1))

    def _convolved(self, maps: Tensor) -> Tensor:
        """S' of maps (batch, heads, c_q - 1 + n, m), which have c_q - 1 rows before the first query: n rows."""
        if self.query_kernel * self.key_kernel == 1:
            return maps
        # One channel a batch element and head: a single grouped convolution.
        batch, side = maps.shape[0], self.key_kernel // 2
        flat = F.conv2d(
            maps.flatten(0, 1).unsqueeze(0),
            self.kernel.repeat(batch, 1, 1, 1),
            padding=(0, side),
            groups=batch * self.heads,
        )
        return flat.view(batch, self.heads, -1, maps.shape[3])

    def _mix_heads(self, maps: Tensor) -> Tensor:
        if self.mix == 1:
            return maps
        groups = maps.unflatten(1, (-1, self.mix))
        return torch.einsum("gij,bgjnm->bginm", self.mixed, groups).flatten(1, 2)

    def _rows(
        self,
        q: Heads,
        k: Heads,
        mask: Mask | None,
        causal: bool,
        above: int = 0,
        offset: int = 0,
        asks: Bool[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, "batch heads n m"]:
        """The matrix of the queries behind the first ``above``, which only enter the convolution. The first of all
        has the position ``offset``. Queries that ``asks`` leaves out do not enter it."""
        keep = dense.visible(q, k, mask, causal, offset)
        here = keep if keep is None or keep.shape[-2] == 1 else keep[..., above:, :]

        def convolved(maps: Tensor) -> Tensor:
            if asks is not None:
                maps = maps.masked_fill(~asks[:, None, :, None], 0.0)
            return self._convolved(F.pad(maps, (0, 0, self.query_kernel - 1 - above, 0)))

        maps = dense.scores(q, k)
        if self.conv == "pre":
            maps = convolved(maps if keep is None else maps.masked_fill(~keep, 0.0))
            keep = here
        if self.mixing == "pre":
            maps = self._mix_heads(maps)
        maps = dense.softmax(maps, keep)
        if self.conv == "post":
            maps = convolved(maps)
            maps = maps if here is None else maps.masked_fill(~here, 0.0)
        return self._mix_heads(maps) if self.mixing == "post" else maps

    def extra(self, how):
        # Padding of x itself: its queries must not enter the convolution.
        asks = None if how.cross else masks.split(how.mask)[1]
        return {} if asks is None else {"asks": asks}

    def weights(self, q, k, *, mask=None, causal=False, asks=None):
        return self._rows(q, k, mask, causal, asks=asks)

    def forward(self, q, k, v, *, mask=None, causal=False, asks=None):
        if forced() == "reference":
            return self.weights(q, k, mask=mask, causal=causal, asks=asks) @ v
        n, m = q.shape[2], k.shape[2]

        def part(start: int, stop: int) -> Tensor:
            first, last = max(0, start - self.query_kernel + 1), min(m, stop) if causal else m
            asked = None if asks is None else asks[:, first:stop]
            rows = self._rows(q[:, :, first:stop], k[:, :, :last], mask, causal, start - first, first, asked)
            return rows @ v[:, :, :last]

        return dense.by_rows(part, n, q.shape[0] * self.heads * m)

    def decode(self, q: Heads, state: Recent, causal: bool) -> tuple[Heads, Recent]:
        """The output of the newest queries over the keys so far."""
        queries = torch.cat([state.queries, q], 2)
        above, keys = state.queries.shape[2], state.kv.keys
        offset = keys.shape[2] - queries.shape[2] if causal else 0
        y = self._rows(queries, keys, state.mask, causal, above, offset) @ state.kv.values
        return y, Recent(state.kv, queries[:, :, max(0, queries.shape[2] - self.query_kernel + 1) :], state.mask)

    def step(self, q, k, v, state=None, **extra):
        kv = KVCache.start(k, v) if state is None else state.kv.append(k, v)
        return self.decode(q, Recent(kv, q[:, :, :0] if state is None else state.queries), causal=True)
