"""Hymba: attention heads and state space heads side by side in one layer, after learned meta tokens.

Dong et al., "Hymba: A Hybrid-head Architecture for Small Language Models", 2024, arXiv 2411.13676.

    S   = [meta tokens ; X]                                                        (meta + n, dim)
    Y_a = softmax(Q K^T / sqrt(d)) V        RoPE, grouped heads; the last ``window`` tokens and all meta tokens
    Y_s = S6(S W_x) * SiLU(S W_z)           convolution and scan of `selective`
    Y   = W_o (beta_1 * norm(Y_a) + beta_2 * norm(Y_s)),   norm(y) = y / rms(y)     beta: a number a channel (inner)

Values are wider than keys, so that Y_a is as wide as Y_s, inner = expand * dim. As the meta tokens come first, they are
a learned start of the cache: keys that any window sees, and the first state of the scan.

The network (`HymbaModel`) attends over everything in its first, middle and last layer only, and the layers between
share keys and values in pairs: the second computes queries alone. `weights` shows the attention of each head over the
tokens, then the matrix of each inner channel of the scan; what comes from meta tokens is added by `read`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import How, Mechanism
from crosslight.attention.selective import ScanState, SelectiveScan, recomputed
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, recurrent, sparse
from crosslight.engines.dense import repeat_heads
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotary
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    KV = tuple[Heads, Heads]

CARD = Card(
    id="hymba",
    kind="token",
    group="recurrent",
    title="Hymba: A Hybrid-head Architecture for Small Language Models",
    year=2024,
    paper="2411.13676",
    code="NVlabs/hymba",
    summary="Attention heads and selective state space heads in parallel on the same tokens, after meta tokens.",
    patterns=("causal-self",),
    why_not="Its state space heads run forwards over one stream.",
    cost="n",
    mask="keys",
    decode="state",
    small={"window": 8, "meta_tokens": 3, "states": 3},
    checked="softmax attention and transformers' Mamba with the same weights, each alone; the size of the 1.5B model",
    differs="The paper's beta is a learned number a channel. The released code averages two norms with weights, which "
    "is the same with beta halved, and normalises delta, B and C, which the paper's equations do not: `normed`. "
    "As a layer, the meta tokens are its own; the network has them once, before its first layer.",
    evidence=Evidence(
        claim="attention and state space heads in parallel model bytes better than attention of a window alone",
        task="language",
        metric="bits_per_byte",
        margin=0.05,
        baseline="fused-neighborhood-attention",
        options={"window": 16, "meta_tokens": 8, "states": 4},
        baseline_options={"kernel_size": 16, "position": "rope"},
    ),
)


#: Tokens that are normed and fused at a time: the backward pass computes these again.
TOKENS = 1024


@dataclass
class HymbaCache:
    """Keys and values of the sinks and of the window, shared in a group of layers, and the state of the scan."""

    length: int
    kv: KV
    scan: ScanState


@register(CARD)
class Hymba(Mechanism):
    """x (batch, n, dim).

    Args:
        kv_heads: key/value heads, each shared by a group of query heads; as many as heads unless given.
        window: tokens that a query reads, itself among them; all if None.
        meta_tokens: learned tokens before x.
        expand: inner width over dim.
        states, rank, kernel: states of the scan a channel, width of what its steps are made of, convolution.
        normed: RMS norms in the scan over what makes delta, over B and over C, as released.
        own_kv: whether the layer has keys and values; without them `mix` is handed those of another layer.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        window: int | None = 1024,
        meta_tokens: int = 128,
        expand: int = 2,
        states: int = 16,
        rank: int | None = None,
        kernel: int = 4,
        normed: bool = False,
        own_kv: bool = True,
    ) -> None:
        super().__init__(dim)
        kv_heads = heads if kv_heads is None else kv_heads
        expect(heads > 0 and dim % (2 * heads) == 0, "dim", dim, f"a multiple of 2 * heads = {2 * heads}")
        expect(kv_heads > 0 and heads % kv_heads == 0, "kv_heads", kv_heads, f"a divisor of heads = {heads}")
        expect(window is None or window > 0, "window", window, "a positive int or None")
        expect(meta_tokens >= 0, "meta_tokens", meta_tokens, "a number >= 0")
        inner = expand * dim
        self.heads, self.kv_heads, self.window, self.inner = heads, kv_heads, window, inner
        self.meta = nn.Parameter(0.02 * torch.randn(meta_tokens, dim)) if meta_tokens else None
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim // heads * kv_heads, bias=False) if own_kv else None
        self.v = nn.Linear(dim, inner // heads * kv_heads, bias=False) if own_kv else None
        self.xz = nn.Linear(dim, 2 * inner, bias=False)
        self.scan = SelectiveScan(inner, math.ceil(dim / 16) if rank is None else rank, states, kernel, normed)
        self.beta = nn.Parameter(torch.full((2, inner), 0.5))
        self.out = nn.Linear(inner, dim, bias=False)
        self.rope = Rotary(dim // heads)

    # What a network calls: streams whose first ``sinks`` tokens every query sees ----------------------------------
    def keys_values(self, s: Stream, offset: int = 0) -> KV:
        expect(self.k is not None and self.v is not None, "kv", None, "keys and values: this layer has none of its own")
        k, v = (f(s).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for f in (self.k, self.v))  # type: ignore[misc]
        return self.rope.rotate(k, offset=offset), v

    def queries(self, s: Stream, offset: int = 0) -> Heads:
        return self.rope.rotate(self.q(s).unflatten(-1, (self.heads, -1)).transpose(1, 2), offset=offset)

    def mask(self, sinks: int, keep: Bool[Tensor, "batch n"] | None) -> Mask | None:
        near = None if self.window is None else masks.window(self.window - 1) | masks.sink(sinks)
        return masks.join(near, None if keep is None else masks.keys(keep))

    def fuse(self, attended: Heads, scanned: Stream, z: Stream) -> Stream:
        parts = attended.transpose(1, 2).flatten(2), scanned * F.silu(z)
        normed = (beta * F.rms_norm(y, (self.inner,), eps=1e-6) for beta, y in zip(self.beta, parts, strict=True))
        return self.out(sum(normed))

    def mix(self, s: Stream, sinks: int, keep: Tensor | None = None, kv: KV | None = None) -> tuple[Stream, KV]:
        """The output, and the keys and values that the next layers of the group read."""
        kv = self.keys_values(s) if kv is None else kv
        attended = sparse.attend(self.queries(s), *kv, mask=self.mask(sinks, keep), causal=True)
        x, z = self.xz(s).chunk(2, -1)
        parts = (t.split(TOKENS, d) for t, d in ((attended, 2), (self.scan(x, keep), 1), (z, 1)))
        return torch.cat([recomputed(self.fuse, *part) for part in zip(*parts, strict=True)], 1), kv

    def after(self, s: Stream, kv: KV) -> HymbaCache:
        """The cache after a stream of sinks."""
        return HymbaCache(s.shape[1], kv, self.scan.after(self.xz(s).chunk(2, -1)[0]))

    def next(
        self, s: Float[Tensor, "batch 1 dim"], cache: HymbaCache | None, sinks: int, kv: KV | None = None
    ) -> tuple[Stream, HymbaCache]:
        """The output at the next token; ``kv``: keys and values up to it, where another layer has them."""
        length = 0 if cache is None else cache.length
        if kv is None:
            kv = self.keys_values(s, length)
            if cache is not None:
                kv = tuple(self._slid(old, fresh, sinks) for old, fresh in zip(cache.kv, kv, strict=True))  # type: ignore[assignment]
        attended = dense.attend(self.queries(s, length), *kv)
        x, z = self.xz(s).chunk(2, -1)
        y, state = self.scan.step(x, None if cache is None else cache.scan)
        return self.fuse(attended, y, z), HymbaCache(length + 1, kv, state)

    def _slid(self, old: Tensor, fresh: Tensor, sinks: int) -> Tensor:
        """The sinks, and the window with its newest token."""
        if self.window is None or old.shape[2] < sinks + self.window:
            return torch.cat([old, fresh], 2)
        return torch.cat([old[:, :, :sinks], old[:, :, sinks + 1 :], fresh], 2)

    # The contract of kind token ---------------------------------------------------------------------------------
    @property
    def sinks(self) -> int:
        return 0 if self.meta is None else self.meta.shape[0]

    def _seen(self, x: Stream, how: How) -> tuple[Stream, Tensor | None]:
        """Meta tokens and x, and what of them may be read."""
        keep = masks.split(how.mask)[1]
        if self.meta is None:
            return x, keep
        s = torch.cat([self.meta.expand(x.shape[0], -1, -1), x], 1)
        return s, None if keep is None else F.pad(keep, (self.sinks, 0), value=True)

    def _forward(self, x, context, how):
        s, keep = self._seen(x, how)
        return self.mix(s, self.sinks, keep)[0][:, self.sinks :]

    def _weights(self, x, context, how):
        s, keep = self._seen(x, how)
        k = self.keys_values(s)[0]
        a = dense.weights(self.queries(s), k, mask=self.mask(self.sinks, keep), causal=True)
        scanned = self.scan.weights(self.xz(s).chunk(2, -1)[0], keep)
        return torch.cat([a, scanned], 1)[:, :, self.sinks :, self.sinks :]

    def _read(self, weights, x, context, how):
        s, keep = self._seen(x, how)
        k, v = self.keys_values(s)
        v, first = repeat_heads(v, self.heads), torch.arange(s.shape[1], device=x.device) < self.sinks
        mask = self.mask(self.sinks, keep)
        meta = dense.attend(self.queries(s), k, v * first.unsqueeze(1), mask=mask, causal=True)
        attended = meta[:, :, self.sinks :] + weights[:, : self.heads] @ v[:, :, self.sinks :]
        inner, z = self.xz(s).chunk(2, -1)
        u = self.scan.values(inner, keep)
        y = recurrent.selective_scan(u * first.unsqueeze(1), *self.scan.select(u, keep))[0] + self.scan.D * u
        tokens = (weights[:, self.heads :] @ u[:, self.sinks :].transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
        return self.fuse(attended, y[:, self.sinks :] + tokens, z[:, self.sinks :])

    def _step(self, x, cache, context, how):
        if cache is None and self.meta is not None:
            s = self.meta.expand(x.shape[0], -1, -1)
            cache = self.after(s, self.keys_values(s))
        return self.next(x, cache, self.sinks)


class HymbaBlock(nn.Module):
    """x + layer(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, dim: int, hidden: int, layer: Hymba) -> None:
        super().__init__()
        self.norm1, self.layer, self.norm2 = nn.RMSNorm(dim, eps=1e-6), layer, nn.RMSNorm(dim, eps=1e-6)
        self.up, self.gate = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def feed(self, x: Stream) -> Stream:
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def readers(depth: int, full: tuple[int, ...], share: int) -> list[bool]:
    """Of each layer, whether it reads the keys and values of the one before: between two layers of full attention the
    layers go in groups of ``share``, the first of which takes those that are left over."""
    reads = [False] * depth
    for start, stop in pairwise(sorted(set(full))):
        over = (stop - start - 1) % share
        for place in range(1, stop - start - 1):
            reads[start + 1 + place] = not (place - over >= share and (place - over) % share == 0)
    return reads


class HymbaModel(nn.Module):
    """Tokens (batch, n) -> logits (batch, n, vocab).

    Args:
        hidden: width of the feed-forward parts.
        share: layers in a row between two of full attention that hold one cache of keys and values.
        own: options of `Hymba`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"vocab": 256, "dim": 64, "depth": 5, "heads": 4, "kv_heads": 2, "hidden": 128, "meta_tokens": 8}
        | {"window": 16},
        "1.5b": {"vocab": 32001, "dim": 1600, "depth": 32, "heads": 25, "kv_heads": 5, "hidden": 5504}
        | {"normed": True},
    }
    published: ClassVar[dict[str, int]] = {"1.5b": 1_522_797_824}

    def __init__(
        self,
        *,
        vocab: int = 32001,
        dim: int = 1600,
        depth: int = 32,
        heads: int = 25,
        kv_heads: int | None = 5,
        hidden: int = 5504,
        window: int = 1024,
        meta_tokens: int = 128,
        share: int = 2,
        **own: Any,
    ) -> None:
        super().__init__()
        expect(share > 0, "share", share, "a positive int")
        self.embed = nn.Embedding(vocab, dim)
        self.meta = nn.Parameter(0.02 * torch.randn(meta_tokens, dim))
        full = (0, (depth - 1) // 2, depth - 1)
        self.blocks = nn.ModuleList()
        for i, reads in enumerate(readers(depth, full, share)):
            layer = Hymba(
                dim,
                heads,
                kv_heads=kv_heads,
                window=None if i in full else window,
                meta_tokens=0,
                own_kv=not reads,
                **own,
            )
            self.blocks.append(HymbaBlock(dim, hidden, layer))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.embed.weight, std=0.02)

    def layers(self) -> list[HymbaBlock]:
        return cast("list[HymbaBlock]", list(self.blocks))

    def forward(self, tokens: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n vocab"]:
        sinks, kv = self.meta.shape[0], None
        x = torch.cat([self.meta.expand(tokens.shape[0], -1, -1), self.embed(tokens)], 1)
        for block in self.layers():
            y, kv = block.layer.mix(block.norm1(x), sinks, kv=None if block.layer.k is not None else kv)
            x = block.feed(x + y)
        return F.linear(self.norm(x[:, sinks:]), self.embed.weight)

    def start(self, batch: int) -> list[HymbaCache]:
        """The caches after the meta tokens."""
        x, kv, caches = self.meta.expand(batch, -1, -1), None, []
        for block in self.layers():
            s = block.norm1(x)
            y, kv = block.layer.mix(s, s.shape[1], kv=None if block.layer.k is not None else kv)
            caches.append(block.layer.after(s, kv))
            x = block.feed(x + y)
        return caches

    def step(
        self, token: Int[Tensor, "batch 1"], caches: list[HymbaCache] | None = None
    ) -> tuple[Float[Tensor, "batch 1 vocab"], list[HymbaCache]]:
        """Logits after the next token, and the caches to pass with the one after."""
        caches = self.start(token.shape[0]) if caches is None else caches
        x, kv, after = self.embed(token), None, []
        for block, cache in zip(self.layers(), caches, strict=True):
            own = block.layer.k is not None
            y, cache = block.layer.next(block.norm1(x), cache, self.meta.shape[0], None if own else kv)
            kv = cache.kv
            after.append(cache)
            x = block.feed(x + y)
        return F.linear(self.norm(x), self.embed.weight), after


Hymba.network = HymbaModel  # type: ignore[attr-defined]
