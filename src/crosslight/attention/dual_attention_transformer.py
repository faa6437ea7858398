"""Dual attention: some heads read what tokens are, the others how tokens relate to the one that asks.

Altabaa and Lafferty, "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
2024, arXiv 2405.16727.

    alpha^h = softmax(Q_h K_h^T / sqrt(d))                         all heads              (batch, heads, n, m)
    e_h = alpha^h V_h                                              n_sa sensory heads     (batch, n, d)
    r_ij[l] = act(<W_q,l x_i, W_k,l z_j> / sqrt(p))                d_r relations, for all relational heads
    a_h = sum_j alpha^h_ij (W_r^h r_ij + W_s^h s_j)                n_ra relational heads  (batch, n, d)
    y = [W_e [e_1 ; ...] ; W_a [a_1 ; ...]]                        widths n_sa d and n_ra d, together dim

A relational head learns of token j its relation to token i and a symbol s_j that says who j is, not what it looks like:

    "symbolic"    s_j = softmax(W z_j T^T / sqrt(d)) S             learned templates T and symbols S, a few heads
    "positional"  s_j = S[j]                                       the position
    "relative"    s_ij = S[j - i]                                  the position seen from i, up to max_distance

``symmetric=True`` takes W_q,l = W_k,l. No n x m x d_r tensor is kept: relations are made for a chunk of rows, read by
the weights, and only then projected by W_r. A model may share symbols: ``second.symbols = first.symbols``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, positions
from crosslight.engines.backend import forced
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotation
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]

Source = Literal["symbolic", "positional", "relative"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda r: r,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}

CARD = Card(
    id="dual-attention-transformer",
    kind="token",
    group="scores",
    title="Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
    year=2024,
    paper="2405.16727",
    code="Awni00/dual-attention",
    summary="Relational heads send relations between tokens and symbols of who they are, beside heads that send "
    "values.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    small={"max_length": 1024, "max_distance": 3, "library": 5},
    checked="dual_attention.DualAttention of the authors with the same weights; the tensor of relations written out",
    differs="The paper relates tokens of one stream; relations with a context are ours. Each layer has its own "
    "symbols unless they are shared. Grouped heads, and the code's sharing of weights between both kinds, are left "
    "out.",
    evidence=Evidence(
        claim="A byte language model whose heads are half relational is better than one with sensory heads only",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
    ),
)


class SymbolicAttention(nn.Module):
    """Symbols of tokens from a learned library, by attention on learned templates: (batch, m, dim) of any stream."""

    def __init__(self, inputs: int, dim: int, library: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(inputs, dim)
        self.templates, self.library = nn.Parameter(torch.randn(library, dim)), nn.Parameter(torch.randn(library, dim))

    def forward(self, z: Tensor, start: int) -> Float[Tensor, "batch m dim"]:
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.q(z), self.templates, self.library))
        k, v = (t.transpose(0, 1).expand(len(z), -1, -1, -1) for t in (k, v))
        return dense.attend(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)


class PositionalSymbols(nn.Module):
    """Symbols of tokens by their position."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.library = nn.Parameter(torch.randn(max_length, dim))

    def forward(self, z: Tensor, start: int) -> Float[Tensor, "batch m dim"]:
        end, longest = start + z.shape[1], len(self.library)
        expect(end <= longest, "context", f"position {end}", f"at most max_length = {longest} tokens")
        return self.library[start:end].expand(len(z), -1, -1)


class RelativeSymbols(nn.Module):
    """Symbols of pairs by their distance; the library's middle is distance 0."""

    def __init__(self, dim: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.library = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * max_distance + 1, dim)))

    def index(self, offset: int, n: int, m: int) -> Tensor:
        """Which symbol key j is to the query at position offset + i, (n, m)."""
        i, j = (torch.arange(s, s + c, device=self.library.device) for s, c in ((offset, n), (0, m)))
        return (j - i[:, None]).clamp(-self.max_distance, self.max_distance) + self.max_distance


@dataclass
class DualCache:
    """Keys with values and symbols, keys of the relations, the decoded length, and the context's mask."""

    kv: KVCache
    related: KVCache
    length: int
    mask: Mask | None
    cross: bool


@register(CARD)
class DualAttention(Mechanism):
    """(batch, n, dim) reads (batch, m, context_dim) -> (batch, n, dim); the sensory heads come first.

    Args:
        dim, heads, context_dim: as in `AttentionLayer`; heads divides dim.
        relational: n_ra, how many of the heads are relational; half unless given.
        relations: d_r, as many as relational heads unless given; divides their joint width.
        activation: act: "identity", "relu", "gelu", "tanh" or "sigmoid".
        symmetric: whether relations are symmetric.
        symbols: "symbolic", "positional" or "relative".
        library: symbols that "symbolic" chooses from; symbol_heads: with how many heads.
        max_length, max_distance: reach of "positional" and of "relative".
        bias: whether the projections of keys, values and outputs have biases.
        position: "rope" or another `Rotation` of the queries and keys of alpha.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        relational: int | None = None,
        context_dim: int | None = None,
        relations: int | None = None,
        activation: str = "identity",
        symmetric: bool = False,
        symbols: Source = "symbolic",
        library: int = 64,
        symbol_heads: int | None = None,
        max_length: int = 1024,
        max_distance: int = 64,
        bias: bool = False,
        position: str | nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(activation in ACTIVATIONS, "activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
        expect(symbols in get_args(Source), "symbols", repr(symbols), f"one of {', '.join(get_args(Source))}")
        self.heads, self.head_dim, self.activation = heads, dim // heads, activation
        self.relational = heads // 2 if relational is None else relational
        expect(0 <= self.relational <= heads, "relational", self.relational, f"0 to heads = {heads}")
        self.sensory = heads - self.relational
        self.position = positions.make(position, heads=heads, head_dim=self.head_dim)
        expect(self.position is None or isinstance(self.position, Rotation), "position", position, "a rotation: 'rope'")
        seen = self.context_dim
        self.q, self.k = nn.Linear(dim, dim, bias=False), nn.Linear(seen, dim, bias)
        if self.sensory:
            width = self.sensory * self.head_dim
            self.v, self.out_sensory = nn.Linear(seen, width, bias), nn.Linear(width, width, bias)
        if self.relational:
            width = self.relational * self.head_dim
            self.relations = self.relational if relations is None else relations
            expect(
                self.relations > 0 and width % self.relations == 0,
                "relations",
                self.relations,
                f"a divisor of {width}, the width of the relational heads",
            )
            self.q_related = nn.Linear(dim, width, bias=False)
            expect(not symmetric or seen == dim, "symmetric", symmetric, f"False, as context_dim {seen} is not {dim}")
            self.k_related = self.q_related if symmetric else nn.Linear(seen, width, bias=False)
            bound = (self.head_dim * self.relations) ** -0.5  # as the authors' kaiming_uniform_
            self.w_r = nn.Parameter(torch.empty(self.relational, self.head_dim, self.relations).uniform_(-bound, bound))
            self.symbols = self._retriever(symbols, library, symbol_heads or self.relational, max_length, max_distance)
            self.w_s, self.out_relational = nn.Linear(dim, width, bias), nn.Linear(width, width, bias)

    def _retriever(self, symbols: str, library: int, heads: int, max_length: int, max_distance: int) -> nn.Module:
        for name, value in (("library", library), ("max_length", max_length), ("max_distance", max_distance)):
            expect(isinstance(value, int) and value > 0, name, value, "a positive int")
        if symbols == "positional":
            return PositionalSymbols(self.dim, max_length)
        if symbols == "relative":
            return RelativeSymbols(self.dim, max_distance)
        expect(self.dim % heads == 0, "symbol_heads", heads, f"a divisor of dim = {self.dim}")
        return SymbolicAttention(self.context_dim, self.dim, library, heads)

    # What is compared and read ----------------------------------------------------------------------------------
    def _split(self, t: Tensor, heads: int) -> Heads:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _asked(self, x: Tensor, start: int = 0) -> tuple[Heads, Heads | None]:
        """Queries of all heads, and of the relations."""
        q = self._split(self.q(x), self.heads)
        if isinstance(self.position, Rotation):
            q = self.position.rotate(q, offset=start)
        if not self.relational:
            return q, None
        # Scaled here, as the scores of the relations are a product.
        related = self._split(self.q_related(x), self.relations)
        return q, related * related.shape[-1] ** -0.5

    def _keys(self, z: Tensor, start: int = 0) -> Heads:
        k = self._split(self.k(z), self.heads)
        return self.position.rotate(k, offset=start) if isinstance(self.position, Rotation) else k

    def _values(self, z: Tensor, start: int = 0) -> Heads:
        """Values of the sensory heads and, where tokens have symbols, W_s s of the relational ones behind them."""
        parts = [self._split(self.v(z), self.sensory)] if self.sensory else []
        if self.relational and not isinstance(self.symbols, RelativeSymbols):
            parts.append(self._split(self.w_s(self.symbols(z, start)), self.relational))
        return torch.cat(parts, 1) if parts else z.new_zeros(len(z), 0, z.shape[1], self.head_dim)

    def _related(self, z: Tensor) -> Heads:
        """Keys of the relations."""
        if not self.relational:
            return z.new_zeros(len(z), 0, z.shape[1], 0)
        return self._split(self.k_related(z), self.relations)

    # What is done with them -------------------------------------------------------------------------------------
    def _messages(
        self, weights: Tensor, q_related: Heads | None, k_related: Heads, v: Heads, offset: int
    ) -> Float[Tensor, "batch heads n dim"]:
        """What all heads read with ``weights``, for queries from position ``offset`` on."""
        if q_related is None:
            return weights @ v
        alpha = weights[:, self.sensory :]
        r = ACTIVATIONS[self.activation](q_related @ k_related.transpose(-1, -2))
        # Read by each row's weights before W_r: (batch, n, heads, m) @ (batch, n, m, relations).
        read = alpha.transpose(1, 2) @ r.permute(0, 2, 3, 1)
        a = torch.einsum("bihl,hdl->bhid", read, self.w_r)
        if not isinstance(self.symbols, RelativeSymbols):
            y = weights @ v
            return torch.cat([y[:, : self.sensory], y[:, self.sensory :] + a], 1)
        # The share of each distance, then its symbol.
        n, m = alpha.shape[2:]
        share = alpha.new_zeros(*alpha.shape[:3], len(self.symbols.library))
        share = share.scatter_add(-1, self.symbols.index(offset, n, m).expand_as(alpha), alpha)
        symbols = self._split(self.w_s(self.symbols.library).unsqueeze(0), self.relational)
        return torch.cat([weights[:, : self.sensory] @ v, a + share @ symbols], 1)

    def _attend(self, q, q_related, k, k_related, v, mask: Mask | None, causal: bool, offset: int = 0) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        if q_related is None:
            return dense.attend(q, k, v, mask=mask, causal=causal, offset=offset)

        def part(start: int, stop: int) -> Tensor:
            last, at = min(m, offset + stop) if causal else m, offset + start
            alpha = dense.weights(q[:, :, start:stop], k[:, :, :last], mask=mask, causal=causal, offset=at)
            return self._messages(alpha, q_related[:, :, start:stop], k_related[:, :, :last], v[:, :, :last], at)

        if forced() == "reference":
            return part(0, n)
        return dense.by_rows(part, n, q.shape[0] * (self.heads + self.relations) * m)

    def _join(self, y: Heads) -> Float[Tensor, "batch n dim"]:
        e, a = (t.transpose(1, 2).flatten(2) for t in (y[:, : self.sensory], y[:, self.sensory :]))
        parts = [self.out_sensory(e)] if self.sensory else []
        return torch.cat([*parts, self.out_relational(a)] if self.relational else parts, -1)

    # The contract -----------------------------------------------------------------------------------------------
    def _forward(self, x, context, how):
        k, k_related, v = self._keys(context), self._related(context), self._values(context)
        return self._join(self._attend(*self._asked(x), k, k_related, v, how.mask, how.triangular))

    def _weights(self, x, context, how):
        return dense.weights(self._asked(x)[0], self._keys(context), mask=how.mask, causal=how.triangular)

    def _read(self, weights, x, context, how):
        _, q_related = self._asked(x)
        return self._join(self._messages(weights, q_related, self._related(context), self._values(context), 0))

    def _step(self, x: Tensor, cache: DualCache | None, context: Tensor | None, how: How):
        length = 0 if cache is None else cache.length
        if cache is None or not cache.cross:
            z, start = (x, length) if context is None else (context, 0)
            k, v, related = self._keys(z, start), self._values(z, start), self._related(z)
            if cache is None:
                kv, kept = KVCache.start(k, v), KVCache.start(related, related[..., :0])
            else:
                kv, kept = cache.kv.append(k, v), cache.related.append(related, related[..., :0])
            cache = DualCache(kv, kept, length, how.mask, how.cross)
        keys, values, related = cache.kv.keys, cache.kv.values, cache.related.keys
        y = self._attend(
            *self._asked(x, length), keys, related, values, cache.mask, causal=not cache.cross, offset=length
        )
        return self._join(y), DualCache(cache.kv, cache.related, length + x.shape[1], cache.mask, cache.cross)
