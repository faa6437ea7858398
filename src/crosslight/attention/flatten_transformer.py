"""FLatten: linear attention with features that are focused by a power, and a convolution that restores the rank.

Han, Pan, Han, Song, Huang, "FLatten Transformer: Vision Transformer using Focused Linear Attention", 2023,
arXiv 2308.00442.

    phi(x) = f_p(ReLU(x)),   f_p(x) = ||x|| / ||x^p|| x^p                     power p channel by channel, 3 in the paper
    O_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) sum_j phi(k_j)^T) + DWC(V)_i          (batch, heads, n, d)

The power keeps a vector's length and pulls it towards its largest channel: products of vectors alike grow, those of
others shrink, which is the focus that softmax has. The matrix has rank at most d; the depthwise convolution of the
values (5 x 5, one for all heads) adds what is near, of full rank. Time O(n d^2).

With ``grid=(H, W)`` the convolution is that of the image; without it tokens are one row. The causal form is
Crosslight's own: prefix sums, and the middle row of the kernel over the token itself and those before it.
Cross-attention has no convolution, as the values stand at other places than the queries.

`Network` is one of the paper's hosts, PVT, PVTv2, Swin or CSwin, with focused linear attention over the whole map in
all stages, of the last two hosts in the first two of four. Its layers are those of the released models
(`ReleasedLayer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core, How, LayerCache
from crosslight.attention.vision_hosts import Design, Host, Stripes, Windows
from crosslight.cards import Card, Evidence
from crosslight.engines import linear, masks
from crosslight.engines.dense import repeat_heads
from crosslight.engines.linear import LinearState
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]
    Stream = Float[Tensor, "batch n dim"]

CARD = Card(
    id="flatten-transformer",
    kind="token",
    group="linear",
    title="FLatten Transformer: Vision Transformer using Focused Linear Attention",
    year=2023,
    paper="2308.00442",
    code="LeapLabTHU/FLatten-Transformer",
    summary="Linear attention with features sharpened by a power, plus a depthwise convolution of the values.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    checked="the explicit n x n matrix, and the convolution written out cell by cell; length and rank of the features; "
    "the parameter counts of the authors' code",
    differs="The released code focuses before it splits the heads, divides queries and keys by a learned scale, adds "
    "a learned position to keys; the paper has none of these, nor has this layer: only the networks have. As in that "
    "code 1e-6 is added after the ReLU. The paper is noncausal self-attention only; the causal and cross forms are "
    "ours. Of its hosts DeiT, whose code is not released, is left out, and so is stochastic depth.",
    evidence=Evidence(
        claim="better than softmax attention on images at linear cost",
        task="digits",
        metric="accuracy",
        margin=0.0,
    ),
)

#: Added after the ReLU, so that no feature vector is zero.
EPS = 1e-6


@dataclass
class FLattenState:
    """What decoding carries: the sums, and the values that the next convolutions read."""

    sums: LinearState
    recent: Float[Tensor, "batch kv_heads taps dim"]


class FLattenLayer(AttentionLayer):
    """The layer around `FLatten`, which adds the convolution of the values."""

    def __init__(self, core: FLatten, dim: int, **own: Any) -> None:
        super().__init__(core, dim, **own)
        d, kernel = self.head_dim, core.kernel
        self.kernel = kernel
        self.conv = nn.Conv2d(d, d, kernel, padding=kernel // 2, groups=d) if kernel else None

    def _local(self, v: Heads, how: How) -> Heads | float:
        if self.conv is None or how.cross:
            return 0.0
        keep = masks.split(how.mask)[1]
        v = v if keep is None else v.masked_fill(~keep[:, None, :, None], 0)
        if how.causal:
            return self._trailing(F.pad(v, (0, 0, self.kernel - 1, 0)))
        image = v.transpose(-1, -2).flatten(0, 1).unflatten(-1, how.grid or (1, -1))
        y = self.conv(image).flatten(2).unflatten(0, v.shape[:2]).transpose(-1, -2)
        return repeat_heads(y, self.heads)

    def _trailing(self, v: Heads) -> Heads:
        """The middle row of the kernel, ending at each token, of values that begin kernel - 1 tokens earlier."""
        assert self.conv is not None
        row = self.conv.weight[:, :, self.kernel // 2]
        y = F.conv1d(v.transpose(-1, -2).flatten(0, 1), row, self.conv.bias, groups=self.head_dim)
        return repeat_heads(y.unflatten(0, v.shape[:2]).transpose(-1, -2), self.heads)

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        y = self.core(q, k, v, mask=how.mask, causal=how.triangular)
        return self._merge(y + self._local(v, how), x)

    def _read(self, weights, x, context, how):
        v = self._values(context)
        return self._merge(self.core.read(weights, v) + self._local(v, how), x)

    def _step(self, x, cache, context, how):
        if how.cross or self.conv is None:
            return super()._step(x, cache, context, how)
        length, state = (0, None) if cache is None else (cache.length, cache.state)
        q, k, v = self._heads(x, x, how, offset=length)
        y, sums = self.core.step(q, k, v, None if state is None else state.sums)
        before = torch.zeros_like(v).expand(-1, -1, self.kernel - 1, -1) if state is None else state.recent
        seen = torch.cat([before, v], 2)
        y = y + self._trailing(seen)
        return self._merge(y, x), LayerCache(length + 1, FLattenState(sums, seen[:, :, 1:]))


@register(CARD)
class FLatten(Core):
    """q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        power: p, at least 1; 1 is linear attention with ReLU.
        kernel: side of the layer's convolution, an odd number; 0 for none.
    """

    grouped = True
    layer = FLattenLayer
    network: ClassVar[type[nn.Module]]

    def __init__(self, heads: int, head_dim: int, *, power: float = 3, kernel: int = 5) -> None:
        super().__init__(heads, head_dim)
        expect(power >= 1, "power", power, "a number >= 1")
        expect(kernel == 0 or (kernel > 0 and kernel % 2 == 1), "kernel", kernel, "an odd number, or 0")
        self.power, self.kernel = power, kernel

    def forward(self, q, k, v, *, mask=None, causal=False):
        keep = masks.split(mask)[1]
        return linear.attend(self.focus(q), self.focus(k), v, causal=causal, keep=keep, normalise=True)

    def weights(self, q, k, *, mask=None, causal=False):
        keep = masks.split(mask)[1]
        return linear.weights(self.focus(q), self.focus(k), causal=causal, keep=keep, normalise=True)

    def step(self, q, k, v, state, **extra):
        return linear.step(self.focus(q), self.focus(k), v, state, normalise=True)

    def focus(self, x: Heads) -> Heads:
        """phi."""
        return sharpened(x.relu() + EPS, self.power)


def sharpened(x: Tensor, power: float) -> Tensor:
    """f_p: the power is taken of a vector of length one, whose small channels may vanish but not overflow."""
    length = x.norm(dim=-1, keepdim=True)
    return F.normalize((x / length) ** power, dim=-1) * length


class Focused(FLatten):
    """The released core: of features as they come, with a mean that is at least `EPS`. Noncausal."""

    def forward(self, q, k, v, *, mask=None, causal=False):
        return linear.attend(*self._divided(q, k, mask, causal), v)

    def weights(self, q, k, *, mask=None, causal=False):
        return linear.weights(*self._divided(q, k, mask, causal))

    def _divided(self, q: Heads, k: Heads, mask: masks.Mask | None, causal: bool) -> tuple[Heads, Heads]:
        """Queries over their sum of products with all keys, to which `EPS` a key is added."""
        expect(not causal, "causal", causal, "False: the layers of the networks are noncausal")
        keep = masks.split(mask)[1]
        held = k.new_ones(1, k.shape[2]) if keep is None else keep.to(k.dtype)
        k = k * held[:, None, :, None]
        total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return q / (total + EPS * held.sum(1).view(-1, 1, 1, 1)), k


class ReleasedLayer(FLattenLayer):
    """The layer of the released models: focuses all heads at once, after a learned scale; keys have positions.

    Args:
        places: number of tokens, each with a learned position.
        near: a second convolution of the values, 3 x 3 and of every channel by itself, as in CSwin.
    """

    def __init__(
        self, dim: int, heads: int, places: int, *, power: float = 3, kernel: int = 5, near: bool = False
    ) -> None:
        super().__init__(Focused(heads, dim // heads, power=power, kernel=kernel), dim)
        self.power, self.near = power, nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if near else None
        self.scale, self.places = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(places, dim))

    def _features(self, x: Stream) -> Heads:
        return self._split(sharpened((x.relu() + EPS) / F.softplus(self.scale), self.power), self.heads)

    def _queries(self, x):
        return self._features(self.q(x))

    def _keys(self, context):
        return self._features(self.k(context) + self.places)

    def _local(self, v, how):
        y = super()._local(v, how)
        if self.near is None:
            return y
        image = v.mT.flatten(1, 2).unflatten(2, how.grid or (1, -1))
        return y + self.near(image).flatten(2).unflatten(1, (self.heads, -1)).mT


_PVT: dict[str, Any] = {"heads": [1, 2, 5, 8], "mlp_ratios": [8, 8, 4, 4]}
_PVTV2: dict[str, Any] = {**_PVT, "design": "pvtv2"}
_SWIN: dict[str, Any] = {"design": "swin", "linear": 2, "mlp_ratios": [4, 4, 4, 4]}
_CSWIN: dict[str, Any] = {**_SWIN, "design": "cswin", "heads": [2, 4, 8, 16]}
_WIDE, _THIN = [64, 128, 320, 512], [96, 192, 384, 768]


class Network(Host):
    """Images (batch, channels, image, image) -> logits.

    Args:
        linear: stages, from the first on, of focused linear attention; the others attend by softmax in windows, which
            are shifted in every other block, as Swin does, or as CSwin does in stripes.
        window: side of these windows, width of these stripes.
        power, kernel: as for `FLatten`.
        design, dims, depths, heads, mlp_ratios, image, channels, classes: those of the host.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "pvt_tiny": {**_PVT, "dims": _WIDE, "depths": [2, 2, 2, 2]},
        "pvt_small": {**_PVT, "dims": _WIDE, "depths": [3, 4, 6, 3]},
        "pvt_medium": {**_PVT, "dims": _WIDE, "depths": [3, 4, 18, 3]},
        "pvt_large": {**_PVT, "dims": _WIDE, "depths": [3, 8, 27, 3]},
        "pvtv2_b0": {**_PVTV2, "dims": [32, 64, 160, 256], "depths": [2, 2, 2, 2]},
        "pvtv2_b1": {**_PVTV2, "dims": _WIDE, "depths": [2, 2, 2, 2]},
        "pvtv2_b2": {**_PVTV2, "dims": _WIDE, "depths": [3, 4, 6, 3]},
        "pvtv2_b3": {**_PVTV2, "dims": _WIDE, "depths": [3, 4, 18, 3]},
        "pvtv2_b4": {**_PVTV2, "dims": _WIDE, "depths": [3, 8, 27, 3]},
        "swin_tiny": {**_SWIN, "dims": _THIN, "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24]},
        "swin_small": {**_SWIN, "dims": _THIN, "depths": [2, 2, 18, 2], "heads": [3, 6, 12, 24]},
        "swin_base": {**_SWIN, "dims": [128, 256, 512, 1024], "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32]},
        "cswin_tiny": {**_CSWIN, "dims": [64, 128, 256, 512], "depths": [2, 4, 18, 1]},
        "cswin_small": {**_CSWIN, "dims": [64, 128, 256, 512], "depths": [2, 4, 32, 2]},
        "cswin_base": {**_CSWIN, "dims": [96, 192, 384, 768], "depths": [3, 6, 29, 2], "heads": [4, 8, 16, 32]},
    }
    presets["swin_base_384"] = {**presets["swin_base"], "image": 384, "window": 12}
    presets["cswin_base_384"] = {**presets["cswin_base"], "image": 384, "window": 12}
    published: ClassVar[dict[str, int]] = {
        "pvt_tiny": 12_150_504,
        "pvt_small": 21_670_248,
        "pvt_medium": 37_242_216,
        "pvt_large": 50_649_192,
        "pvtv2_b0": 3_594_824,
        "pvtv2_b1": 12_931_240,
        "pvtv2_b2": 22_548_264,
        "pvtv2_b3": 38_273_832,
        "pvtv2_b4": 51_836_968,
        "swin_tiny": 29_192_384,
        "swin_small": 50_510_288,
        "swin_base": 88_972_488,
        "swin_base_384": 91_433_928,
        "cswin_tiny": 21_201_768,
        "cswin_small": 35_451_752,
        "cswin_base": 74_867_032,
        "cswin_base_384": 78_369_112,
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        *,
        design: Design = "pvt",
        linear: int | None = None,
        window: int = 7,
        power: float = 3,
        kernel: int = 5,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        image: int = 224,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        linear = len(dims) if linear is None else linear
        expect(0 <= linear <= len(dims), "linear", linear, f"0 to {len(dims)} stages")

        def attend(stage: int, number: int, dim: int, heads: int, grid: Grid) -> nn.Module:
            if stage < linear:
                places = grid[0] * grid[1]
                return ReleasedLayer(dim, heads, places, power=power, kernel=kernel, near=design == "cswin")
            side = min(window, grid[0])
            if design == "cswin":
                return Stripes(dim, heads, grid, stripe=side)
            return Windows(dim, heads, grid, window=side, shift=side // 2 if number % 2 and side < grid[0] else 0)

        super().__init__(
            design, attend, dims, depths, heads, mlp_ratios, image=image, channels=channels, classes=classes
        )
        # The released PVT has a norm that it does not apply. It is here for the sake of its weights and its size.
        self.unused = nn.LayerNorm(dims[-1], eps=1e-6) if design == "pvt" else None


FLatten.network = Network
