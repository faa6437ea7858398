"""The small models around an entrant. Everything but the entrant is the same for all entrants of a table.

Blocks are pre-norm: x + attend(LayerNorm(x)), then x + MLP(LayerNorm(x)). Positions are learned vectors added to the
embedded tokens, so that mechanisms without positions of their own can tell tokens apart. The entrant of a block is its
attribute ``entrant``; attention that belongs to the trunk (the self-attention of a decoder) is written out here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight import registry
from crosslight.engines.positions import Grid
from crosslight.tasks.base import Entrant, Size

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Context = Float[Tensor, "batch m dim"]


class Nothing(nn.Module):
    """The contribution left out: tokens do not exchange anything."""

    def forward(self, x: Stream, context: Context | None = None, **_: object) -> Stream:
        return torch.zeros_like(x)


def attention(entrant: Entrant, size: Size) -> nn.Module:
    """The entrant as a layer of kind token; "none" is `Nothing`."""
    if entrant.id == "none":
        return Nothing()
    return registry.create(entrant.id, **{"dim": size.dim, "heads": size.heads, **entrant.options})


def mlp(dim: int, ratio: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


class Positions(nn.Module):
    """Adds a learned vector for each position, which starts as the sinusoids of the Transformer: neighbours are then
    found in few steps, also by mechanisms without positions of their own."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        rate = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.arange(length)[:, None] * rate
        waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]
        self.table = nn.Parameter(2**0.5 * waves)  # unit variance, as the vectors of nn.Embedding

    def forward(self, x: Stream) -> Stream:
        return x + self.table[: x.shape[1]]


class SelfAttention(nn.Module):
    """The trunk's own softmax self-attention, in encoders and decoders whose entrant reads across."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Stream, mask: Bool[Tensor, "batch n"] | None = None) -> Stream:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keep = None if mask is None else mask[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm block: the entrant, then the MLP; with ``own`` the trunk's self-attention before them."""

    def __init__(self, entrant: nn.Module | None, dim: int, own: SelfAttention | None = None) -> None:
        super().__init__()
        self.own, self.entrant = own, entrant
        self.own_norm = None if own is None else nn.LayerNorm(dim)
        self.entrant_norm = None if entrant is None else nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), mlp(dim))

    def forward(
        self,
        x: Stream,
        context: Context | None = None,
        *,
        mask: Bool[Tensor, "batch m"] | None = None,
        own_mask: Bool[Tensor, "batch n"] | None = None,
        causal: bool = False,
        grid: Grid | None = None,
    ) -> Stream:
        if self.own is not None and self.own_norm is not None:
            x = x + self.own(self.own_norm(x), own_mask)
        if self.entrant is not None and self.entrant_norm is not None:
            if mask is not None and getattr(getattr(self.entrant, "card", None), "mask", "any") == "none":
                mask = None  # it reads the padding tokens, which have an embedding of their own
            x = x + self.entrant(self.entrant_norm(x), context, mask=mask, causal=causal, grid=grid)
        return x + self.mlp(x)


class Trunk(nn.Module):
    """Entrant blocks over one stream, which reads itself or a context: (batch, n, dim) -> (batch, n, dim)."""

    def __init__(self, entrant: Entrant, size: Size, length: int, *, causal: bool = False, own: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.positions = Positions(length, size.dim)
        self.blocks = nn.ModuleList(
            Block(attention(entrant, size), size.dim, SelfAttention(size.dim, size.heads, causal=True) if own else None)
            for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.dim)

    def forward(
        self,
        x: Stream,
        context: Context | None = None,
        *,
        mask: Bool[Tensor, "batch m"] | None = None,
        grid: Grid | None = None,
    ) -> Stream:
        x = self.positions(x)
        for block in self.blocks:
            x = block(x, context, mask=mask, causal=self.causal, grid=grid)
        return self.norm(x)


class Pooled(nn.Module):
    """Tokens -> one answer: embed, trunk of noncausal self-attention, mean over tokens, linear head."""

    def __init__(
        self, embed: nn.Module, entrant: Entrant, size: Size, length: int, out: int, grid: Grid | None = None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embed, self.trunk = embed, Trunk(entrant, size, length)
        self.head = nn.Linear(size.dim, out)

    def forward(self, x: Tensor) -> Float[Tensor, "batch out"]:
        return self.head(self.trunk(self.embed(x), grid=self.grid).mean(1))


class LanguageModel(nn.Module):
    """Next-token prediction: embed, trunk of causal self-attention, linear head."""

    def __init__(self, entrant: Entrant, size: Size, vocab: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, size.dim)
        self.trunk = Trunk(entrant, size, length, causal=True)
        self.head = nn.Linear(size.dim, vocab)

    def hidden(self, tokens: Tensor) -> Stream:
        return self.trunk(self.embed(tokens))

    def forward(self, tokens: Tensor) -> Float[Tensor, "batch n vocab"]:
        return self.head(self.hidden(tokens))


class Reader(nn.Module):
    """``queries`` learned tokens read the embedded history through the entrant (noncausal cross)."""

    def __init__(self, embed: nn.Module, entrant: Entrant, size: Size, history: int, queries: int, out: int) -> None:
        super().__init__()
        self.queries = queries
        self.embed, self.positions = embed, Positions(history, size.dim)
        self.context = nn.Sequential(nn.LayerNorm(size.dim), mlp(size.dim), nn.LayerNorm(size.dim))
        self.trunk = Trunk(entrant, size, queries)
        self.head = nn.Linear(size.dim, out)
        self.dim = size.dim

    def forward(self, x: Tensor) -> Float[Tensor, "batch queries out"]:
        context = self.context(self.positions(self.embed(x)))
        x = context.new_zeros(context.shape[0], self.queries, self.dim)
        return self.head(self.trunk(x, context))


class Neighbours(nn.Module):
    """x + GELU(convolution over neighbouring tokens): letters become parts of words before anything is attended to."""

    def __init__(self, dim: int, kernel: int, causal: bool) -> None:
        super().__init__()
        self.padding = (kernel - 1, 0) if causal else ((kernel - 1) // 2, kernel // 2)
        self.conv = nn.Conv1d(dim, dim, kernel)

    def forward(self, x: Stream) -> Stream:
        return x + F.gelu(self.conv(F.pad(x.transpose(1, 2), self.padding)).transpose(1, 2))


class EncoderDecoder(nn.Module):
    """Source tokens through a convolution and one block of the trunk's own self-attention; the decoder reads them
    through the entrant (causal cross)."""

    def __init__(self, entrant: Entrant, size: Size, vocab: int, source: int, target: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, size.dim)
        self.around, self.before = Neighbours(size.dim, 5, causal=False), Neighbours(size.dim, 3, causal=True)
        self.positions = Positions(source, size.dim)
        self.encoder = Block(None, size.dim, SelfAttention(size.dim, size.heads, causal=False))
        self.norm = nn.LayerNorm(size.dim)
        self.decoder = Trunk(entrant, size, target, causal=True, own=True)
        self.head = nn.Linear(size.dim, vocab)

    def forward(
        self, source: Tensor, target: Tensor, mask: Bool[Tensor, "batch m"] | None = None
    ) -> Float[Tensor, "batch n vocab"]:
        context = self.norm(self.encoder(self.positions(self.around(self.embed(source))), own_mask=mask))
        return self.head(self.decoder(self.before(self.embed(target)), context, mask=mask))
