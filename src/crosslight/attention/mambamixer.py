"""MambaMixer: a selective state space along the tokens, then another along the channels.

Behrouz, Santacatterina, Zabih, "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel
Selection", 2024, arXiv 2403.19888.

    mixer(X) = W_o [sum over directions of S6(X W_x) * SiLU(X W_z)]      S6: convolution and scan of `selective`
    Y_tok = mixer of X along the tokens,     (batch, n, dim)             causal: one direction
    Y_ch  = mixer of norm(Y_tok)^T along the channels, in both directions, as channels have no order
    Y     = alpha Y_tok + beta Y_ch                                      learned numbers

Without ``causal`` the tokens are scanned from both ends, or with ``directions=4`` (ViM2) also along the columns of
``grid``. Along the channels every token is a sequence of dim steps and one feature, with the same weights for all
tokens, so that any length works and no token hears of another; ``tokens=L`` is the paper's form, in which the L
tokens are the features of each step, for that length and not causal.

Its network hands every mixer a learned average of all earlier outputs: the token mixer of layer l reads
sum_{i<l} alpha_li Y_tok^i + beta_li Y_ch^i, the channel mixer sum_{i<=l} theta_li Y_tok^i + sum_{i<l} gamma_li Y_ch^i,
with Y^0 the input. `weights` shows the matrix of every inner channel, direction by direction.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.attention.base import How, Mechanism
from crosslight.attention.selective import ScanState, SelectiveScan, project, recomputed
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Keep = Bool[Tensor, "batch n"]

CARD = Card(
    id="mambamixer",
    kind="token",
    group="recurrent",
    title="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
    year=2024,
    paper="2403.19888",
    summary="Selective state spaces in place of attention along the tokens and of the MLP along the channels.",
    patterns=("noncausal-self", "causal-self"),
    why_not="A scan runs over one stream; the paper has no second.",
    cost="n",
    mask="keys",
    decode="state",
    small={"states": 3},
    checked="transformers' Mamba with the same weights along the tokens; the recurrence step by step in all directions",
    differs="By default channels are mixed token by token with shared weights, not with weights for one length "
    "(`tokens=`), so that any length and decoding work. Of ViM2 there are the four scans; the convolution before each "
    "is that of Mamba over the scan, not one over the image. The norm before the channel mixer is ours. The later "
    "quasi-separable revision is not here. Nor is ViM2 with its 20, 43 and 74 million parameters: there is no public "
    "code, and the paper's table of its stages says neither what its channel mixers project nor how maps are halved.",
    evidence=Evidence(
        claim="a byte language model of selective token and channel mixers is no worse than one of attention",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
        options={"states": 4},
        budget={"steps": 150},
    ),
)


#: Elements of a step of the scans along the channels: of so many tokens at a time, over inner channels and states.
LANES = 1 << 13


def turned(x: Tensor, direction: int, grid: Grid | None, dim: int = 1, *, back: bool = False) -> Tensor:
    """The tokens in the order of a scan, forwards, backwards, and both along the columns; or ``back`` from it."""
    if back and direction % 2:
        x = x.flip(dim)
    if direction >= 2 and grid is not None:
        rows = x.shape[dim] // grid[0] if back else grid[0]
        x = x.unflatten(dim, (rows, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    return x if back or not direction % 2 else x.flip(dim)


class SelectiveMixer(nn.Module):
    """The mixer along the second dimension of (batch, steps, width).

    Args:
        directions: scans: 1, 2 (both ends), or 4 (also along the columns of a grid).
    """

    def __init__(self, width: int, directions: int, *, expand: int, states: int, kernel: int) -> None:
        super().__init__()
        self.inner = expand * width
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.scans = nn.ModuleList(
            SelectiveScan(self.inner, math.ceil(width / 16), states, kernel) for _ in range(directions)
        )
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def _each(self, causal: bool) -> list[tuple[int, Any]]:
        """The scans and their directions."""
        return list(enumerate(self.scans))[: 1 if causal else None]

    def forward(self, x: Stream, keep: Keep | None = None, *, grid: Grid | None = None, causal: bool = False) -> Stream:
        x, z = project(self.in_proj, x, (self.inner, self.inner))
        ys = []
        for i, scan in self._each(causal):
            y = scan(turned(x, i, grid), None if keep is None else turned(keep, i, grid))
            ys.append(turned(y, i, grid, back=True))
        return recomputed(self._gated, sum(ys[1:], ys[0]), z)

    def _gated(self, y: Stream, z: Stream) -> Stream:
        return project(self.out_proj, y * F.silu(z), (self.out_proj.out_features,))[0]

    def weights(self, x: Stream, keep: Keep | None, grid: Grid | None, causal: bool) -> Float[Tensor, "batch c n n"]:
        x, found = self.in_proj(x).chunk(2, -1)[0], []
        for i, scan in self._each(causal):
            a = scan.weights(turned(x, i, grid), None if keep is None else turned(keep, i, grid))
            found.append(turned(turned(a, i, grid, 2, back=True), i, grid, 3, back=True))
        return torch.cat(found, 1)

    def read(self, weights: Tensor, x: Stream, keep: Keep | None, grid: Grid | None, causal: bool) -> Stream:
        x, z = self.in_proj(x).chunk(2, -1)
        y, each = torch.zeros_like(x), self._each(causal)
        for (i, scan), a in zip(each, weights.chunk(len(each), 1), strict=True):
            v = scan.values(turned(x, i, grid), None if keep is None else turned(keep, i, grid))
            v = turned(v, i, grid, back=True)
            y = y + (a @ v.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2) + scan.D * v
        return self.out_proj(y * F.silu(z))

    def step(self, x: Stream, state: ScanState | None) -> tuple[Stream, ScanState]:
        x, z = self.in_proj(x).chunk(2, -1)
        scan: Any = self.scans[0]
        y, state = scan.step(x, state)
        return self.out_proj(y * F.silu(z)), state


class ChannelMixer(nn.Module):
    """The mixer along the channels of (batch, n, dim), both ways; ``tokens`` as for `MambaMixer`.

    Tokens that are mixed by themselves go through it some at a time, and again in the backward pass: what a scan
    selects by takes 2 * states + 1 times the room of x.
    """

    def __init__(self, dim: int, tokens: int | None, **own: int) -> None:
        super().__init__()
        self.tokens, self.norm = tokens, nn.LayerNorm(dim)
        self.mix = SelectiveMixer(1 if tokens is None else tokens, 2, **own)
        self.lanes = own["expand"] * own["states"]

    def forward(self, x: Stream, keep: Keep | None = None) -> Stream:
        if self.tokens is None:
            room = LANES if x.device.type == "cpu" else 64 * LANES
            parts = x.flatten(0, 1).split(max(1, room // self.lanes))
            if len(parts) == 1 or not torch.is_grad_enabled():
                return torch.cat([self._each(part) for part in parts]).view_as(x)
            ys = [checkpoint(self._each, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
            return torch.cat(ys).view_as(x)
        x = self.norm(x) if keep is None else self.norm(x).masked_fill(~keep.unsqueeze(-1), 0)
        return self.mix(x.transpose(1, 2)).transpose(1, 2)

    def _each(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """Every token by itself; in memory the tokens are innermost in between."""
        return self.mix(self.norm(x).T.contiguous().T.unsqueeze(2)).squeeze(2)


@register(CARD)
class MambaMixer(Mechanism):
    """x (batch, n, dim).

    Args:
        heads: not used: states are a channel's.
        directions: scans of the tokens where no causality is asked, 2 or 4.
        expand: inner width over the width.
        states: states a channel.
        kernel: taps of the convolutions.
        tokens: the length, for the paper's channel mixer, whose features are the tokens.
        channels: whether there is a channel mixer.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        directions: int = 2,
        expand: int = 2,
        states: int = 16,
        kernel: int = 4,
        tokens: int | None = None,
        channels: bool = True,
    ) -> None:
        super().__init__(dim)
        expect(directions in (2, 4), "directions", directions, "2 or 4")
        own = {"expand": expand, "states": states, "kernel": kernel}
        for name, value in own.items():
            expect(value > 0, name, value, "a positive int")
        self.tokens = tokens
        self.token = SelectiveMixer(dim, directions, **own)
        self.channel = ChannelMixer(dim, tokens, **own) if channels else None
        self.alpha, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(())) if channels else None

    def _how(self, x: Stream, how: How) -> tuple[Keep | None, Grid | None, bool]:
        if self.tokens is not None:
            expect(x.shape[1] == self.tokens, "x", f"{x.shape[1]} tokens", f"{self.tokens}, as it was built for")
            expect(not how.causal, "tokens", self.tokens, "None in causal calls: such a channel mixer mixes tokens")
        expect(how.grid is None or len(how.grid) == 2, "grid", how.grid, "(height, width) or None")
        return masks.split(how.mask)[1], how.grid, how.causal

    def _joined(self, y: Stream, keep: Keep | None) -> Stream:
        if self.channel is None:
            return self.alpha * y
        return self.alpha * y + self.beta * self.channel(y, keep)

    def _forward(self, x, context, how):
        keep, grid, causal = self._how(x, how)
        return self._joined(self.token(x, keep, grid=grid, causal=causal), keep)

    def _weights(self, x, context, how):
        return self.token.weights(x, *self._how(x, how))

    def _read(self, weights, x, context, how):
        keep, grid, causal = self._how(x, how)
        return self._joined(self.token.read(weights, x, keep, grid, causal), keep)

    def _step(self, x, cache, context, how):
        expect(self.tokens is None, "tokens", self.tokens, "None for decoding: such a channel mixer mixes tokens")
        y, cache = self.token.step(x, cache)
        return self._joined(y, None), cache


class MambaMixerNetwork(nn.Module):
    """(batch, n, inputs) -> (batch, n, outputs): layers whose mixers read learned averages of all earlier outputs.

    Args:
        own: options of `MambaMixer`'s mixers.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"inputs": 1, "dim": 32, "depth": 2, "outputs": 10}}

    def __init__(
        self,
        *,
        inputs: int = 1,
        dim: int = 64,
        depth: int = 4,
        outputs: int = 1,
        directions: int = 2,
        tokens: int | None = None,
        expand: int = 2,
        states: int = 16,
        kernel: int = 4,
    ) -> None:
        super().__init__()
        own = {"expand": expand, "states": states, "kernel": kernel}
        self.embed = nn.Linear(inputs, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.token = nn.ModuleList(SelectiveMixer(dim, directions, **own) for _ in range(depth))
        self.channel = nn.ModuleList(ChannelMixer(dim, tokens, **own) for _ in range(depth))
        # [alpha ; beta] and [theta ; gamma] of each layer, over Y_tok^0.. and Y_ch^0..; they start as the plain mean.
        self.to_token = nn.ParameterList(torch.full((2, i + 1), 0.5 / (i + 1)) for i in range(depth))
        self.to_channel = nn.ParameterList(torch.full((2 * i + 3,), 1 / (2 * i + 3)) for i in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def forward(
        self, x: Float[Tensor, "batch n inputs"], *, grid: Grid | None = None, causal: bool = False
    ) -> Float[Tensor, "batch n outputs"]:
        tok = [self.embed(x)]
        ch = list(tok)
        layers = zip(self.norms, self.token, self.channel, self.to_token, self.to_channel, strict=True)
        for norm, token, channel, to_token, to_channel in layers:
            u = sum(w * y for w, y in zip(to_token.flatten(), tok + ch, strict=True))
            tok.append(token(norm(u), grid=grid, causal=causal))
            u = sum(w * y for w, y in zip(to_channel, tok + ch, strict=True))
            ch.append(channel(u))
        return self.head(self.norm(ch[-1]))


MambaMixer.network = MambaMixerNetwork  # type: ignore[attr-defined]
