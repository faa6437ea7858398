"""Single-head attention on a part of the channels; the others pass by and meet it in the output projection.

Yun, Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", 2024, arXiv 2401.16456.

    x = [x1 ; x2]                          x1 (n, p) with p = dim / 4.67 or so,  x2 (n, dim - p)
    q, k, v = BN(W GN(x1))                 (n, 16), (n, 16), (n, p); GN: one mean and variance over tokens and channels
    y1 = softmax(q k^T / sqrt(16)) v       (n, p), one head
    y = BN(W_o ReLU([y1 ; x2]))            (n, dim); the last BN starts at zero, so that x + y starts as x

The heads of a vision transformer repeat each other, so one does, on the channels that need it; there is no splitting
and joining of heads in memory. What x2 holds is local, as a depthwise convolution comes before the layer.

`Network` is the paper's: a stem of stride 16, three stages, the first without attention, every convolution with a batch
norm that `Network.fuse` takes into it for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from crosslight.attention.backbone import Pyramid, initialise, to_map, to_tokens
from crosslight.attention.base import How, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n dim"]
    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="shvit",
    kind="token",
    group="heads",
    title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
    year=2024,
    paper="2401.16456",
    code="ysj9909/SHViT",
    summary="One head on a fifth of the channels; the other channels pass by to the output projection.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="The normalisation before it takes mean and variance over all tokens, later ones too.",
    cost="n^2",
    mask="keys",
    checked="timm's SHSA and SHViT with the same weights, and its parameter counts",
    differs="Cross-attention, in which the keys and values are of the first part of the context's channels, and masks "
    "are ours; masked tokens do not enter the group norm, but in training they count in the batch norms.",
    evidence=Evidence(
        claim="one head on a fifth of the channels reads digits not worse than four heads on all by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"heads": 1},
    ),
)


class Normed(nn.Module):
    """A linear map of tokens, then batch norm, which `fuse` takes into it."""

    def __init__(self, dim: int, out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, out, bias=False), nn.BatchNorm1d(out)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Stream) -> Stream:
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).view_as(y)

    def fused(self) -> nn.Module:
        return fuse_linear_bn_eval(self.linear, self.norm)


class TokenNorm(nn.Module):
    """Group norm with one group: mean and variance over the channels of all tokens that are kept."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Stream, keep: Bool[Tensor, "batch n"] | None) -> Stream:
        if keep is None:
            y = F.layer_norm(x.flatten(1), (x.shape[1] * x.shape[2],), eps=self.eps)
            return y.view_as(x) * self.weight + self.bias
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        share = keep.unsqueeze(-1).to(wide.dtype)
        count = (share.sum((1, 2), keepdim=True) * x.shape[2]).clamp(min=1)
        centred = wide - (wide * share).sum((1, 2), keepdim=True) / count
        variance = (centred.square() * share).sum((1, 2), keepdim=True) / count
        return (centred * (variance + self.eps).rsqrt()).to(x.dtype) * self.weight + self.bias


@register(CARD)
class SHSA(Mechanism):
    """Single-head self-attention.

    Args:
        dim, context_dim: as in `Mechanism`.
        heads: 1 in the paper; more, to compare with.
        partial: p, channels that attend; dim / 4.67 unless given.
        qk_dim: width of a head's queries and keys.
    """

    exempt = {"training_leaves_out_padding": "batch norm counts all tokens of a batch, as PyTorch has it"}
    network: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        partial: int | None = None,
        qk_dim: int = 16,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(isinstance(heads, int) and heads >= 1, "heads", heads, "a positive int")
        expect(isinstance(qk_dim, int) and qk_dim >= 1, "qk_dim", qk_dim, "a positive int")
        self.heads = heads
        self.partial = max(1, round(dim / 4.67 / heads)) * heads if partial is None else partial
        most = min(dim, self.context_dim)
        fits = 0 < self.partial <= most and self.partial % heads == 0
        expect(fits, "partial", self.partial, f"a multiple of heads = {heads} up to {most}")
        self.norm = TokenNorm(self.partial)
        self.q, self.k = Normed(self.partial, heads * qk_dim), Normed(self.partial, heads * qk_dim)
        self.v = Normed(self.partial, self.partial)
        self.out = Normed(dim, dim, scale=0.0)

    def _heads(self, x: Stream, context: Stream, how: How) -> tuple[Heads, Heads, Heads]:
        keep = masks.split(how.mask)[1]
        z = self.norm(context[..., : self.partial], keep)
        asking = self.norm(x[..., : self.partial], None) if how.cross else z
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.q(asking), self.k(z), self.v(z)))
        return q, k, v

    def _merge(self, y: Heads, x: Stream) -> Stream:
        return self.out(torch.cat([y.transpose(1, 2).flatten(2), x[..., self.partial :]], 2).relu())

    def _forward(self, x, context, how):
        return self._merge(dense.attend(*self._heads(x, context, how), mask=how.mask), x)

    def _weights(self, x, context, how):
        q, k, _ = self._heads(x, context, how)
        return dense.weights(q, k, mask=how.mask)

    def _read(self, weights, x, context, how):
        return self._merge(weights @ self._heads(x, context, how)[2], x)


class NormedConv(nn.Module):
    """Convolution, then batch norm, which `fuse` takes into it."""

    def __init__(
        self, dim: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Map) -> Map:
        return self.norm(self.conv(x))

    def fused(self) -> nn.Module:
        return fuse_conv_bn_eval(self.conv, self.norm)


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: Callable[[Map], Map]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Map) -> Map:
        return x + self.inner(x)


def depthwise(dim: int, scale: float = 1.0) -> Residual:
    return Residual(NormedConv(dim, dim, 3, groups=dim, scale=scale))


def feed_forward(dim: int) -> Residual:
    return Residual(nn.Sequential(NormedConv(dim, 2 * dim), nn.ReLU(), NormedConv(2 * dim, dim, scale=0.0)))


class Attend(nn.Module):
    """`SHSA` on a map."""

    def __init__(self, dim: int, partial: int, qk_dim: int) -> None:
        super().__init__()
        self.attend = SHSA(dim, partial=partial, qk_dim=qk_dim)

    def forward(self, x: Map) -> Map:
        tokens, grid = to_tokens(x)
        return to_map(self.attend(tokens), grid)


class SqueezeExcite(nn.Module):
    """Each channel times a gate that sees the mean of all."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(8, (dim // 4 + 4) // 8 * 8)
        self.gate = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1), nn.Sigmoid())

    def forward(self, x: Map) -> Map:
        return x * self.gate(x.mean((2, 3), keepdim=True))


def halve(dim: int, out: int) -> nn.Sequential:
    """Half the resolution: an inverted residual with a gate, between two pairs of convolution and MLP."""
    wide = 4 * dim
    merge = nn.Sequential(
        NormedConv(dim, wide),
        nn.ReLU(),
        NormedConv(wide, wide, 3, 2, groups=wide),
        nn.ReLU(),
        SqueezeExcite(wide),
        NormedConv(wide, out),
    )
    return nn.Sequential(depthwise(dim), feed_forward(dim), merge, depthwise(out), feed_forward(out))


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits.

    Args:
        partials: channels that attend in each stage; 0 for none.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "s1": {"dims": [128, 224, 320], "depths": [2, 4, 5], "partials": [0, 48, 68]},
        "s2": {"dims": [128, 308, 448], "depths": [2, 4, 5], "partials": [0, 66, 96]},
        "s3": {"dims": [192, 352, 448], "depths": [3, 5, 5], "partials": [0, 75, 96]},
        "s4": {"dims": [224, 336, 448], "depths": [4, 7, 6], "partials": [0, 72, 96]},
    }
    published: ClassVar[dict[str, int]] = {"s1": 6_330_808, "s2": 11_483_072, "s3": 14_245_273, "s4": 16_588_484}

    def __init__(
        self,
        dims: Sequence[int] = (128, 224, 320),
        depths: Sequence[int] = (2, 4, 5),
        partials: Sequence[int] = (0, 48, 68),
        *,
        qk_dim: int = 16,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stages = []
        for i, (dim, depth, partial) in enumerate(zip(dims, depths, partials, strict=True)):
            down = halve(dims[i - 1], dim) if i else self._stem(channels, dim)
            blocks = []
            for _ in range(depth):
                mixer = [Residual(Attend(dim, partial, qk_dim))] if partial else []
                blocks.append(nn.Sequential(depthwise(dim, scale=0.0), *mixer, feed_forward(dim)))
            stages.append(nn.Sequential(down, *blocks))
        super().__init__(stages, dims[-1], classes=classes, norm=nn.BatchNorm1d(dims[-1]))
        initialise(self)

    @staticmethod
    def _stem(channels: int, dim: int) -> nn.Sequential:
        widths, layers = [channels, dim // 8, dim // 4, dim // 2, dim], []
        for i in range(4):
            layers += [NormedConv(widths[i], widths[i + 1], 3, 2), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    @torch.no_grad()
    def fuse(self) -> Network:
        """Take every batch norm but the head's into the layer before it; for inference, in place."""
        expect(not self.training, "model", "in training mode", "one in eval mode, whose statistics are fixed")
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Normed | NormedConv):
                    setattr(parent, name, child.fused())
        return self


SHSA.network = Network
