"""Hyena N-D: gates and a global implicit convolution over a grid, in place of an attention matrix.

"Multi-Dimensional Hyena for Spatial Inductive Bias", 2023, arXiv 2309.13600.

    [x0, x1, v] = short(W_in x)                    short: a depth-wise 3 x 3 convolution       (batch, H, W, dim) each
    u = x1 * v,   y = x0 * (k conv u + D u),   out = W_out y                                      order 2
    k(i, j) = window(i, j) MLP([z(i) ; z(j)])      "2d", or the product of two filters of one axis each, "product"
    z(i) = (t, cos(f w), -sin(f w), ...),  t = i / (reach - 1),  w = 2 pi i / reach
    window(i, j) = exp(-(t_i + t_j) |delta_c|),    delta_c from log(target) / 1.5 to log(target) / 0.3

The MLP has sines of trainable frequency. k reaches down and to the right of a cell only, so a convolution looks from
one quadrant; "four" sums those of all quadrants with four learned numbers, as one kernel. Without ``grid`` the tokens
are a line, and a causal call is the Hyena of one dimension whatever the grid. The matrix it stands for is, a channel,
diag(x0) (T_k + D) diag(x1): `weights` shows one for each channel. Cost O(n log n); decoding keeps all u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.attention.backbone import Block, initialise, to_tokens
from crosslight.attention.base import How, Mechanism
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import masks, recurrent
from crosslight.engines.cache import KVCache
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Stream = Float[Tensor, "batch n dim"]
    Kernel = Float[Tensor, "dim height width"]

CARD = Card(
    id="hyena-nd",
    kind="token",
    group="recurrent",
    title="Multi-Dimensional Hyena for Spatial Inductive Bias",
    year=2023,
    paper="2309.13600",
    summary="Gated global convolution over a grid whose filter an MLP makes of positions; no queries meet keys.",
    patterns=("noncausal-self", "causal-self"),
    why_not="A convolution needs one grid that asking and read tokens share.",
    cost="n log n",
    mask="keys",
    decode="kv",
    small={"reach": 16, "filter_width": 8},
    checked="zero-padded conv2d with the filter written out cell by cell; rank, reach and equivariance of the filter",
    differs="The released FFT leaves a factor 1/(2 H) in its result, which is not in the paper and not here. Filters "
    "are functions of i / (reach - 1), not of the grid's own sides, so that they do not change with the grid and "
    "decoding equals the full pass. The window has no constant added. Of the ways to look in all directions there are "
    "one quadrant a layer, to be alternated, and the linear merge of four; not the four sets of short filters. The "
    "sizes of the paper's backbones could not be checked against published counts.",
    evidence=Evidence(
        claim="in place of attention it classifies small images better",
        task="digits",
        metric="accuracy",
        margin=0.0,
        options={"reach": 8},
    ),
)


#: Elements of the map that are convolved at a time.
CHUNK = 1 << 18


class Sine(nn.Module):
    """sin(frequency * x), a trainable frequency a channel."""

    def __init__(self, width: int, frequency: float) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.full((width,), frequency))

    def forward(self, x: Tensor) -> Tensor:
        return (self.frequency * x).sin()


class Filter(nn.Module):
    """An implicit filter of ``axes`` axes, (side, ..., dim) of any sides.

    Args:
        reach: cells of an axis over which t runs from 0 to 1.
        emb_dim: features an axis: t, and cosines and sines.
    """

    def __init__(
        self, dim: int, axes: int, *, reach: int, width: int, emb_dim: int, inner: int, sine: float, learned: bool
    ) -> None:
        super().__init__()
        self.reach, self.bands, self.dim = reach, (emb_dim - 1) // 2, dim
        layers: list[nn.Module] = [nn.Linear(axes * emb_dim, width), Sine(width, sine)]
        for _ in range(inner):
            layers += [nn.Linear(width, width), Sine(width, sine)]
        self.mlp = nn.Sequential(*layers, nn.Linear(width, dim, bias=False))
        self.delta = nn.Parameter(self._decays().expand(axes, -1).clone()) if learned else None

    def _decays(self) -> Tensor:
        return torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, self.dim)

    def forward(self, *sides: int) -> Tensor:
        weight = next(self.mlp.parameters())
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self._decays().expand(len(sides), -1) if self.delta is None else self.delta
        features: list[Tensor] = []
        window: Any = 0
        for axis, side in enumerate(sides):
            i = torch.arange(side, device=weight.device, dtype=wide)
            t = i / max(self.reach - 1, 1)
            f = torch.linspace(1e-4, max(self.bands - 1, 1e-4), self.bands, device=weight.device, dtype=wide)
            angle = f * (2 * math.pi / self.reach * i).unsqueeze(1)
            shape = [side if a == axis else 1 for a in range(len(sides))]
            z = torch.cat([t.unsqueeze(1), angle.cos(), -angle.sin()], 1).view(*shape, -1)
            features.append(z.expand(*sides, -1))
            window = window + t.view(*shape, 1) * delta[axis].abs().to(weight.device, wide)
        # No window so small that arithmetic on it is slow.
        window = window.clamp(max=-math.log(torch.finfo(wide).tiny) / 2)
        return self.mlp(torch.cat(features, -1).to(weight.dtype)) * torch.exp(-window).to(weight.dtype)


@dataclass
class HyenaCache:
    """All u, the inputs of the short convolution that the next tokens read, and the filter as far as it was made."""

    u: KVCache
    recent: Float[Tensor, "batch 2 dim3"]
    taps: Float[Tensor, "length dim"]


@register(CARD)
class HyenaND(Mechanism):
    """x (batch, n, dim), tokens of ``grid`` or of a line.

    Args:
        heads: not used: a filter is a channel's.
        filter: "2d", an MLP of both axes, or "product" of two filters of one axis each.
        directions: "four" quadrants merged, or "one".
        quadrant: of one direction, from where: 0 above and left, 1 above and right, 2 below and left, 3 below and
            right. Layers alternate it.
        reach: cells of an axis over which the filter's window falls to its target.
        filter_width, emb_dim, inner_mlps, sine: the filter's MLP.
        window: "fixed" decays or "learned" ones, a channel and axis each.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        filter: str = "2d",
        directions: str = "four",
        quadrant: int = 0,
        reach: int = 64,
        filter_width: int = 64,
        emb_dim: int = 3,
        inner_mlps: int = 2,
        sine: float = 1.0,
        window: str = "fixed",
    ) -> None:
        super().__init__(dim)
        expect(filter in ("2d", "product"), "filter", repr(filter), "'2d' or 'product'")
        expect(directions in ("one", "four"), "directions", repr(directions), "'one' or 'four'")
        expect(quadrant in range(4), "quadrant", quadrant, "a number from 0 to 3")
        expect(emb_dim >= 3 and emb_dim % 2 == 1, "emb_dim", emb_dim, "an odd number of at least 3")
        expect(reach > 0, "reach", reach, "a positive int")
        expect(window in ("fixed", "learned"), "window", repr(window), "'fixed' or 'learned'")
        own: dict[str, Any] = {"reach": reach, "width": filter_width, "emb_dim": emb_dim, "inner": inner_mlps}
        own |= {"sine": sine, "learned": window == "learned"}
        self.product, self.quadrant = filter == "product", quadrant
        self.filters = nn.ModuleList(
            [Filter(dim, 1, **own) for _ in range(2)] if self.product else [Filter(dim, 2, **own)]
        )
        self.sides = nn.Parameter(torch.full((4,), 0.5)) if directions == "four" else None
        self.into = nn.Linear(dim, 3 * dim)
        self.short = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.skip = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, dim)

    def kernel(self, height: int, width: int) -> Kernel:
        """k, of one quadrant."""
        if self.product:
            k = self.filters[0](height).unsqueeze(1) * self.filters[1](width)
        else:
            k = self.filters[0](height, width)
        return k.permute(2, 0, 1)

    def placed(self, k: Kernel, causal: bool) -> tuple[Kernel, tuple[int, int]]:
        """The kernel over all offsets that it reaches, and where the offset (0, 0) is in it."""
        height, width = k.shape[1:]
        if causal:
            return k, (0, 0)
        if self.sides is None:
            down, right = self.quadrant >= 2, self.quadrant % 2 == 1
            turned = k.flip([axis for axis, turn in ((1, down), (2, right)) if turn])
            return turned, (down * (height - 1), right * (width - 1))
        # The linear merge of the four convolutions, as one kernel.
        a, b, c, d = (
            F.pad(side * turned, (0, width - 1) if i % 2 else (width - 1, 0))
            for i, (side, turned) in enumerate(zip(self.sides, (k, k.flip(2)) * 2, strict=True))
        )
        above = F.pad((c + d).flip(1), (0, 0, 0, height - 1))
        return F.pad(a + b, (0, 0, height - 1, 0)) + above, (height - 1, width - 1)

    def _convolved(self, u: Float[Tensor, "batch dim height width"], causal: bool) -> Tensor:
        """A few channels at a time: the spectra, much larger than u, are computed again in the backward pass."""
        grid = (u.shape[2], u.shape[3])

        def part(u: Tensor, k: Tensor) -> Tensor:
            return recurrent.fft_conv2d(u, *self.placed(k, causal))

        some = max(1, CHUNK // u[:, 0].numel())
        parts = list(zip(u.split(some, 1), self.kernel(*grid).contiguous().split(some), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([part(*each) for each in parts], 1)
        return torch.cat([checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in parts], 1)

    def _parts(self, x: Stream, how: How) -> tuple[Stream, Stream, Stream, tuple[int, int]]:
        """x0, x1 (zero at masked tokens), v, and the grid."""
        keep = masks.split(how.mask)[1]
        x = x if keep is None else x.masked_fill(~keep.unsqueeze(-1), 0)
        p = self.into(x)
        p = p if keep is None else p.masked_fill(~keep.unsqueeze(-1), 0)
        expect(how.grid is None or len(how.grid) == 2, "grid", how.grid, "(height, width), or None for a line")
        grid = (1, x.shape[1]) if how.grid is None or how.causal else (how.grid[0], how.grid[1])
        if grid[0] == 1:
            p = self._trailing(F.pad(p, (0, 0, 2, 0) if how.causal else (0, 0, 1, 1)))
        else:
            p = to_tokens(self.short(p.transpose(1, 2).unflatten(2, grid)))[0]
        x0, x1, v = p.chunk(3, -1)
        return x0, x1 if keep is None else x1.masked_fill(~keep.unsqueeze(-1), 0), v, grid

    def _trailing(self, p: Tensor) -> Tensor:
        """The short convolution's middle row, ending at each token, of tokens that begin two earlier."""
        row = self.short.weight[:, :, 1]
        # A copy, as the operator would make one in each pass.
        return F.conv1d(p.transpose(1, 2).contiguous(), row, self.short.bias, groups=row.shape[0]).transpose(1, 2)

    def _forward(self, x, context, how):
        x0, x1, v, grid = self._parts(x, how)
        u = x1 * v
        y = self._convolved(u.transpose(1, 2).unflatten(2, grid), how.causal)
        return self.out(x0 * (to_tokens(y)[0] + self.skip * u))

    def _weights(self, x, context, how):
        x0, x1, _, grid = self._parts(x, how)
        k, centre = self.placed(self.kernel(*grid), how.causal)
        a = recurrent.toeplitz2d(k, grid, centre) + torch.diag_embed(self.skip.unsqueeze(1).expand(-1, x.shape[1]))
        return x0.transpose(1, 2).unsqueeze(3) * a * x1.transpose(1, 2).unsqueeze(2)

    def _read(self, weights, x, context, how):
        v = self._parts(x, how)[2]
        return self.out((weights @ v.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2))

    def _step(self, x, cache, context, how):
        p = self.into(x)
        seen = torch.cat([torch.zeros_like(p).expand(-1, 2, -1) if cache is None else cache.recent, p], 1)
        x0, x1, v = self._trailing(seen).chunk(3, -1)
        fresh = (x1 * v).unsqueeze(1)
        u = KVCache.start(fresh, fresh[..., :0]) if cache is None else cache.u.append(fresh, fresh[..., :0])
        taps = self.kernel(1, 16)[:, 0].T if cache is None else cache.taps
        if taps.shape[0] < u.length:
            taps = self.kernel(1, 2 * u.length)[:, 0].T
        y = (taps[: u.length].flip(0) * u.keys[:, 0]).sum(1, keepdim=True)
        return self.out(x0 * (y + self.skip * fresh[:, 0])), HyenaCache(u, seen[:, 1:], taps)


class HyenaViT(nn.Module):
    """A ViT for images (batch, channels, size, size) whose first blocks are Hyena N-D and whose others attend.

    Args:
        hyena: blocks with Hyena N-D; all of them unless given.
        own: options of Hyena N-D.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"size": 8, "patch": 1, "channels": 1, "dim": 48, "depth": 6, "heads": 4, "classes": 10, "hyena": 3},
        "small": {"size": 32, "patch": 4, "dim": 192, "depth": 9, "heads": 12, "classes": 100},
        "small_hybrid": {"size": 32, "patch": 4, "dim": 192, "depth": 9, "heads": 12, "classes": 100, "hyena": 5},
    }

    def __init__(
        self,
        *,
        size: int = 32,
        patch: int = 4,
        channels: int = 3,
        dim: int = 192,
        depth: int = 9,
        heads: int = 12,
        mlp_ratio: float = 2,
        classes: int = 100,
        hyena: int | None = None,
        **own: Any,
    ) -> None:
        super().__init__()
        expect(size % patch == 0, "size", size, f"a multiple of patch = {patch}")
        self.grid: Grid = (size // patch, size // patch)
        hyena, own = depth if hyena is None else hyena, {"reach": size // patch, **own}
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList(
            Block(dim, HyenaND(dim, **own) if i < hyena else Softmax.build(dim, heads), mlp_ratio) for i in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)
        initialise(self)

    def forward(self, images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch classes"]:
        x, grid = to_tokens(self.embed(images))
        expect(grid == self.grid, "images", tuple(images.shape), f"images of {self.grid} patches")
        x = x + self.position
        for block in self.blocks:
            x = block(x, grid)
        return self.head(self.norm(x).mean(1))


HyenaND.network = HyenaViT  # type: ignore[attr-defined]
