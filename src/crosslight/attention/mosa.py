"""Mixture of sparse attention: every head chooses the tokens it works on, and attends among those only.

Piekos, Csordas, Schmidhuber, "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice
Routing", 2025, arXiv 2505.00315.

    r     = sigmoid(X W_r)                                        a score a token and head   (batch, n, heads)
    I_h   = the k tokens of largest r_h,  k = n / sparsity        expert choice
    q,k,v = RoPE at the positions I_h of X[I_h] W_h               on half of a head's width  (batch, heads, k, d)
    A_h   = softmax(q k^T / sqrt(d)), causal by I_h >= I_h^T      (batch, heads, k, k)
    y    += scatter(diag(r[I_h]) A_h v W_o^h)  to the places I_h  (batch, n, dim)

A token that no head chose gets nothing, hence a few dense heads beside (``dense_heads``): the paper's hybrid. Only
chosen tokens are projected. r as a factor trains the router. Work a head is k^2 + n, so at equal cost there are many
more heads; key/value pairs shrink alike.

Choosing among the whole sequence lets later tokens decide whether an earlier one is chosen. With ``causal=True`` the
layer therefore chooses as tokens come: one is taken by a head if its score is above 1/2 and the head has taken less
than max(2, t / sparsity) of the first t. That needs no scan over tokens: with a_t tokens above 1/2 and quota Q_t,
taken up to t are a_t + min(0, min_{s <= t} Q_s - a_s). ``lookahead=True`` is the paper's training form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import Mechanism, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.positions import Rotary, Rotation
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CARD = Card(
    id="mosa",
    kind="token",
    group="sparse",
    title="Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing",
    year=2025,
    paper="2505.00315",
    code="piotrpiekos/MoSA",
    summary="Each head chooses a few tokens by a learned score and attends among those alone.",
    patterns=("noncausal-self", "causal-self"),
    why_not="A head's queries and keys are the same chosen tokens, so it has no second stream to read.",
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"sparsity": 2, "dense_heads": 1},
    checked="the equations of the paper and of the authors' PureMoSA, head by head; dense causal attention with rotary "
    "positions at k = n; a taking of tokens one by one",
    differs="In the paper a token's choice depends on later tokens, also in the causal model; here that needs "
    "`lookahead=True`, and the choice that is causal by itself, which decoding uses, is ours. Masked tokens are never "
    "chosen. Rotary angles are those of the released code.",
    evidence=Evidence(
        claim="A byte language model with two dense and eight sparse heads is better than one of four dense heads",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
        options={"heads": 10, "dense_heads": 2, "head_dim": 16, "sparsity": 4},
    ),
)


class PartialRotary(Rotation):
    """Rotary positions on the first ``width`` channels."""

    def __init__(self, width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.width, self.inner = width, Rotary(width, base)

    def rotate(self, x, *, offset=0, grid=None):
        turned, rest = x.split([self.width, x.shape[-1] - self.width], -1)
        return torch.cat([self.inner.rotate(turned, offset=offset), rest], -1)

    def at(self, x: Float[Tensor, "batch heads k dim"], position: Int[Tensor, "batch heads k"]) -> Tensor:
        """x turned by positions of its own."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        steps = torch.arange(0, self.width, 2, device=x.device, dtype=dtype)
        angle = position[..., None].to(dtype) * self.inner.base ** (-steps / max(self.width, 1))
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., : self.width].chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., self.width :]], -1)


@dataclass
class Taken:
    """What decoding carries: tokens so far, how many of them each head has taken, and their keys and values."""

    length: int
    count: Int[Tensor, "batch heads"]
    keys: Float[Tensor, "batch heads places dim"]
    values: Float[Tensor, "batch heads places dim"]
    #: Of the dense heads.
    dense: Any = None


@register(CARD)
class MixtureOfSparseAttention(Mechanism):
    """Sparse heads that choose their tokens, and dense heads beside.

    Args:
        dim: width of x.
        heads: of both kinds together.
        head_dim: d; dim / heads unless given.
        sparsity: n / k.
        dense_heads: plain heads among ``heads``; half of them, the four of the paper by default, unless given.
        tokens: k, the same at all lengths, in place of n / sparsity.
        include_first: whether every head takes the first token.
        lookahead: whether the choice is made over the whole sequence in the causal pattern too, as in the paper.
        rotate: share of a head's width that rotary positions turn.
        base: of the rotary positions.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        sparsity: int = 16,
        dense_heads: int | None = None,
        tokens: int | None = None,
        include_first: bool = False,
        lookahead: bool = False,
        rotate: float = 0.5,
        base: float = 10_000.0,
    ) -> None:
        super().__init__(dim)
        head_dim = head_width(dim, heads, head_dim)
        plain = heads // 2 if dense_heads is None else dense_heads
        expect(0 <= plain < heads, "dense_heads", plain, f"fewer than heads = {heads}")
        expect(sparsity >= 1, "sparsity", sparsity, "a number >= 1")
        expect(tokens is None or tokens >= 1, "tokens", tokens, "a number >= 1")
        expect(0 <= rotate <= 1, "rotate", rotate, "a share between 0 and 1")
        self.heads, self.head_dim, self.sparse_heads = heads, head_dim, heads - plain
        self.sparsity, self.tokens = sparsity, tokens
        self.include_first, self.lookahead = include_first, lookahead
        self.position = PartialRotary(int(rotate * head_dim) // 2 * 2, base)
        self.dense = None
        if plain:
            self.dense = Softmax.build(dim, plain, head_dim=head_dim, bias=False, position=self.position)
        self.router = nn.Linear(dim, self.sparse_heads, bias=False)
        self.qkv = nn.Parameter(torch.empty(self.sparse_heads, dim, 3 * head_dim))
        self.out = nn.Parameter(torch.empty(self.sparse_heads, head_dim, dim))
        for weight, width in ((self.qkv, dim), (self.out, heads * head_dim)):  # as those of nn.Linear
            nn.init.uniform_(weight, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def quota(self, t: int) -> int:
        """k among t tokens."""
        return min(t, max(2, t // self.sparsity) if self.tokens is None else self.tokens)

    def scores(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch heads n"]:
        """r."""
        return self.router(x).sigmoid().transpose(1, 2)

    def choose(
        self, r: Float[Tensor, "batch heads n"], keep: Bool[Tensor, "batch n"] | None, ahead: bool
    ) -> tuple[Int[Tensor, "batch heads k"], Bool[Tensor, "batch heads k"]]:
        """The tokens of each head in their order, and which places are filled."""
        r = r.detach()
        n, k = r.shape[2], self.quota(r.shape[2])
        there = torch.ones_like(r, dtype=torch.bool) if keep is None else keep[:, None].expand_as(r)
        first = torch.arange(n, device=r.device) == 0
        if ahead:
            r = r.masked_fill(first, 2.0) if self.include_first else r
            index = r.masked_fill(~there, -1.0).topk(k, -1).indices.sort(-1).values
            return index, there.gather(2, index)
        taken = self._taken(there & ((r > 0.5) | first if self.include_first else r > 0.5))
        index = (~taken).sort(stable=True).indices[..., :k]
        return index, taken.gather(2, index)

    def _taken(self, wanted: Bool[Tensor, "batch heads n"]) -> Bool[Tensor, "batch heads n"]:
        """Those that are taken as they come, see the module's text."""
        n = wanted.shape[2]
        t = torch.arange(1, n + 1, device=wanted.device)
        most = (t // self.sparsity).clamp(min=2) if self.tokens is None else torch.full_like(t, self.tokens)
        quota = torch.minimum(t, most)
        so_far = wanted.cumsum(-1)
        total = so_far + (quota - so_far).cummin(-1).values.clamp(max=0)
        return total.diff(dim=-1, prepend=torch.zeros_like(total[..., :1])) > 0

    def _chosen(self, x: Tensor, how) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Positions and which are filled, the scores there, and q, k, v: (batch, heads, k, ...)."""
        r = self.scores(x)
        ahead = self.lookahead or not how.causal
        index, filled = self.choose(r, masks.split(how.mask)[1], ahead)
        flat = index.flatten(1)[..., None].expand(-1, -1, x.shape[2])
        tokens = x.gather(1, flat).unflatten(1, index.shape[1:])
        q, k, v = (tokens @ self.qkv).chunk(3, -1)
        q, k = self.position.at(q, index), self.position.at(k, index)
        return index, filled, r.gather(2, index) * filled.to(r.dtype), q, k, v

    def _visible(self, filled: Tensor, causal: bool) -> masks.Mask:
        keep = filled[:, :, None].expand(-1, -1, filled.shape[2], -1)
        return masks.Pairs(keep.tril() if causal else keep)  # chosen tokens are in their order

    def _forward(self, x, context, how):
        index, filled, r, q, k, v = self._chosen(x, how)
        y = dense.attend(q, k, v, mask=self._visible(filled, how.causal)) * r[..., None]
        y = (y @ self.out).flatten(1, 2)
        out = torch.zeros_like(x, dtype=y.dtype).scatter_add(1, index.flatten(1)[..., None].expand_as(y), y)
        return out if self.dense is None else out + self.dense(x, mask=how.mask, causal=how.causal)

    def _weights(self, x, context, how):
        """Of the dense heads first; rows and columns that a sparse head did not choose are zero."""
        index, filled, r, q, k, _ = self._chosen(x, how)
        chosen = dense.weights(q, k, mask=self._visible(filled, how.causal)) * r[..., None]
        n, heads = x.shape[1], self.sparse_heads
        place = (index[..., None] * n + index[:, :, None]).flatten(2)
        every = chosen.new_zeros(x.shape[0], heads, n * n).scatter(2, place, chosen.flatten(2)).unflatten(2, (n, n))
        if self.dense is None:
            return every
        return torch.cat([self.dense.weights(x, mask=how.mask, causal=how.causal), every], 1)

    def _read(self, weights, x, context, how):
        v = x[:, None] @ self.qkv[..., 2 * self.head_dim :]
        y = (weights[:, -self.sparse_heads :] @ v @ self.out).sum(1)
        return y if self.dense is None else y + self.dense.read(weights[:, : -self.sparse_heads], x)

    def _step(self, x, cache, context, how):
        expect(x.shape[1] == 1, "x", f"{x.shape[1]} tokens", "one token a step")
        expect(not self.lookahead, "lookahead", True, "False: the choice looks at tokens that are not there yet")
        r = self.scores(x)
        if cache is None:
            empty = x.new_zeros(x.shape[0], self.sparse_heads, 0, self.head_dim)
            cache = Taken(0, torch.zeros(empty.shape[:2], dtype=torch.long, device=x.device), empty, empty)
        quota = self.quota(cache.length + 1)
        wanted = r[..., 0] > 0.5
        if self.include_first and cache.length == 0:
            wanted = torch.ones_like(wanted)
        taken = wanted & (cache.count < quota)
        q, k, v = (x[:, None] @ self.qkv).chunk(3, -1)
        here = torch.full_like(cache.count, cache.length)[..., None]
        q, k = self.position.at(q, here), self.position.at(k, here)
        # A place for each token of the quota; the next free one is the new token's, if it is taken.
        places = torch.arange(quota, device=x.device)
        write = ((places == cache.count[..., None]) & taken[..., None])[..., None]
        grow = (0, 0, 0, quota - cache.keys.shape[2])
        keys, values = (torch.where(write, new, F.pad(old, grow)) for new, old in ((k, cache.keys), (v, cache.values)))
        count = cache.count + taken
        filled = (places < count[..., None])[:, :, None]
        y = dense.attend(q, keys, values, mask=masks.Pairs(filled)) * (r * taken[..., None])[..., None]
        y, state = (y @ self.out).sum(1), cache.dense
        if self.dense is not None:
            plain, state = self.dense.step(x, state)
            y = y + plain
        return y, Taken(cache.length + 1, count, keys, values, state)
