"""Mixed attention spans: a few layers attend to everything before them, all others to their own and the previous block.

"Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer", 2023,
arXiv 2310.12442.

    block-local layer    S_i = { j <= i : floor(i / b) - floor(j / b) <= 1 }      b + 1 to 2 b keys, or all if fewer
    full layer           S_i = { j <= i }
    y_i = W_o softmax(q_i K[S_i]^T / sqrt(d)) V[S_i]                              (batch, n, dim)

l of N layers are full, so that a model costs l n^2 + (N - l) 2 b n in place of N n^2. A layer of either kind has the
same weights, its span is a choice of the call's mask: ``full=True`` or not. The bottom l layers are the full ones;
`Decoder` is the network, a GPT of 1.3 billion parameters with b = 1024, l = 4 to 8 of 24 layers, sequences of 8192.

Without a causal mask, a block-local query reads the next block too. Blocks are [n / b, b, 2 b] in the sparse engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.attention.backbone import Mlp
from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CARD = Card(
    id="masformer",
    kind="token",
    group="sparse",
    title="Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer",
    year=2023,
    paper="2310.12442",
    summary="Most layers read their own block and the one before, a few at the bottom read everything.",
    patterns=("noncausal-self", "causal-self"),
    why_not="A span is a distance along one stream; the tokens of another have no place in it.",
    cost="n",
    decode="state",
    small={"block": 4},
    checked="transformers' GPT-Neo with all layers full; a mask written out token by token; attention block by block",
    differs="The paper has no noncausal form: a query then reads the next block too. Its 1.3B network is "
    "reconstructed with the shape of GPT-Neo 1.3B, the public model of that size, and scores divided by sqrt(d). The "
    "cost and the state are those of a block-local layer; a full one costs n^2 and keeps all keys. That full layers "
    "serve best at the bottom is the paper's finding: `placement` has the others it tried. Tasks build all layers "
    "alike, so the evidence is about block-local layers only.",
    evidence=Evidence(
        claim="a byte language model whose layers read 16 to 32 bytes back is not worse by more than 0.05 bits a byte",
        task="language",
        metric="bits_per_byte",
        margin=-0.05,
        options={"block": 16},
    ),
)


@dataclass(frozen=True)
class Spans(Mask):
    """Query i reads the keys of its own block of ``size`` and of ``reach`` blocks on either side."""

    size: int
    reach: int = 1
    shared = True

    @property
    def period(self):
        return self.size

    def visible(self, b, h, i, j):
        return (i // self.size - j // self.size).abs() <= self.reach

    def blocks(self, tile):
        i0, i1, j0, j1 = (t // self.size for t in tile)
        some = (i0 - j1 <= self.reach) & (j0 - i1 <= self.reach)
        return some, (i1 - j0 <= self.reach) & (j1 - i0 <= self.reach)


@register(CARD)
class MixedSpan(Core):
    """softmax over the own and the previous block; q (batch, heads, n, d), k and v (batch, kv_heads, n, d).

    Args:
        block: b.
        full: read everything, as the chosen layers of a network do.
    """

    grouped = True
    network: ClassVar[type[nn.Module]]

    def __init__(self, heads: int, head_dim: int, block: int = 1024, full: bool = False) -> None:
        super().__init__(heads, head_dim)
        expect(isinstance(block, int) and block >= 1, "block", block, "a number >= 1")
        self.block, self.full = block, full

    def rule(self, mask: Mask | None) -> Mask | None:
        """Which keys may be read, besides by the causal rule."""
        return mask if self.full else masks.join(Spans(self.block), mask)

    def forward(self, q, k, v, *, mask=None, causal=False):
        if self.full:
            return dense.attend(q, k, v, mask=mask, causal=causal)
        return sparse.attend(q, k, v, mask=self.rule(mask), causal=causal)

    def weights(self, q, k, *, mask=None, causal=False):
        return dense.weights(q, k, mask=self.rule(mask), causal=causal)

    def step(self, q, k, v, state=None, **extra):
        # The state is the cache and the position of its first key: what lies before the previous block is dropped.
        cache, start = (KVCache.start(k, v), 0) if state is None else (state[0].append(k, v), state[1])
        offset = start + cache.length - q.shape[2]
        if self.full:
            return dense.attend(q, cache.keys, cache.values, causal=True, offset=offset), (cache, start)
        first = max(0, offset // self.block - 1) * self.block
        if first > start:
            keys, values = (t[:, :, first - start :].contiguous() for t in (cache.keys, cache.values))
            cache, start = KVCache.start(keys, values), first
        # ``start`` is the first token of a block, so blocks can be counted from there.
        y = dense.attend(
            q, cache.keys, cache.values, mask=Spans(self.block), causal=q.shape[2] > 1, offset=offset - start
        )
        return y, (cache, start)


class DecoderLayer(nn.Module):
    """x + attend(norm x), then x + mlp(norm x), causal."""

    def __init__(self, dim: int, heads: int, block: int, full: bool) -> None:
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(dim), MixedSpan.build(dim, heads, block=block, full=full)
        for projection in (self.attend.q, self.attend.k, self.attend.v):
            projection.register_parameter("bias", None)  # as in GPT-Neo
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim, lambda: nn.GELU("tanh"))

    def forward(self, x: Float[Tensor, "batch n dim"], mask: Any = None) -> Float[Tensor, "batch n dim"]:
        x = x + self.attend(self.norm1(x), mask=mask, causal=True)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """The paper's language model: a pre-norm decoder with learned positions, tied embeddings and mixed spans.

    Args:
        vocab, length: tokens, and positions at most.
        dim, heads, depth: of the layers; N = depth.
        full_layers: l.
        block: b.
        placement: which layers are full: "bottom", "middle", "top" or "spread".
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"vocab": 256, "length": 512, "dim": 64, "heads": 4, "depth": 4, "full_layers": 1, "block": 32},
        "1.3b": {"length": 2048},
        "1.3b_8k": {"length": 8192},
    }
    published: ClassVar[dict[str, int]] = {"1.3b": 1_315_575_808}

    def __init__(
        self,
        vocab: int = 50257,
        length: int = 8192,
        dim: int = 2048,
        heads: int = 16,
        depth: int = 24,
        full_layers: int = 8,
        block: int = 1024,
        placement: str = "bottom",
    ) -> None:
        super().__init__()
        expect(0 <= full_layers <= depth, "full_layers", full_layers, f"0 to depth = {depth}")
        starts = {"bottom": 0, "middle": (depth - full_layers) // 2, "top": depth - full_layers, "spread": 0}
        expect(placement in starts, "placement", repr(placement), f"one of {', '.join(starts)}")
        if placement == "spread":
            self.full = tuple(i * depth // full_layers for i in range(full_layers))
        else:
            self.full = tuple(range(starts[placement], starts[placement] + full_layers))
        self.length = length
        self.embed, self.positions = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, block, i in self.full) for i in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Int[Tensor, "batch n"], mask: Any = None) -> Float[Tensor, "batch n vocab"]:
        n = tokens.shape[1]
        expect(n <= self.length, "tokens", f"{n} of them", f"at most length = {self.length}")
        x = self.embed(tokens) + self.positions(torch.arange(n, device=tokens.device))
        for layer in self.layers:
            x = layer(x, mask)
        return nn.functional.linear(self.norm(x), self.embed.weight)


MixedSpan.network = Decoder
