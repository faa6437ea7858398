"""Cross-covariance attention: channels attend to channels, over all tokens at once, at linear cost.

El-Nouby, Touvron, Caron, Bojanowski, Douze, Joulin, Laptev, Neverova, Synnaeve, Verbeek, Jegou, "XCiT: Cross-Covariance
Image Transformers", 2021, arXiv 2106.09681.

    K^, Q^ = the channels of K and Q, each divided by its length over the tokens           (n, d) of each head
    A   = softmax(tau Q^^T K^)                        (d, d)   a row says what an output channel takes; tau a head
    y_i = A v_i                                       (d)      O(n d^2), no n x n matrix

A is a matrix of channels: a token reads its own values alone, mixed by A, and hears of the others only through the
covariance in A. As the contract's matrix, (n, m), that is d * d diagonal matrices a head, one for each pair of channels
(``weights``: (batch, heads * d * d, n, n)); `XCA.channels` shows A itself. Masked tokens do not enter A, and their own
output is zero. The causal form has an A for each token, of the tokens up to it, from running sums of a constant size.

`Network` is the paper's: blocks of XCA, of local patch interaction (two depthwise 3 x 3 convolutions, by which
neighbours exchange) and of an MLP, then two layers of class attention.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.attention.backbone import Mlp, initialise, to_map, to_tokens
from crosslight.attention.base import Core
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]
    Channels = Float[Tensor, "batch heads dim dim"]
    Map = Float[Tensor, "batch channels height width"]
    Stream = Float[Tensor, "batch n dim"]

CARD = Card(
    id="xcit",
    kind="token",
    group="linear",
    title="XCiT: Cross-Covariance Image Transformers",
    year=2021,
    paper="2106.09681",
    code="facebookresearch/xcit",
    summary="Channels attend to channels by the covariance of normalised keys and queries over all tokens.",
    patterns=("noncausal-self", "causal-self"),
    why_not="Keys and queries are multiplied token by token, so both come from one stream.",
    cost="n",
    mask="keys",
    decode="state",
    checked="timm's XCA and Xcit with the same weights, and its parameter counts; invariances of the channel matrix",
    differs="tau multiplies, as in the released code; the paper divides by it. The causal form, decoding and masks are "
    "ours. In the class attention of the network the patches too are normalised, and added to themselves, as in the "
    "released code and in timm.",
    evidence=Evidence(
        claim="channel attention reads 8 x 8 digits not worse than token attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
    ),
)


class ChannelCore(Core):
    """What attention between channels shares: a matrix of channels, applied to the values of each token.

    Subclasses write `channels` and `running`.
    """

    def channels(self, q: Heads, k: Heads) -> Channels:
        """A. Tokens that do not count are zero in q and k."""
        raise NotImplementedError

    def running(
        self, q: Heads, k: Heads, state: tuple[Tensor, ...] | None
    ) -> tuple[Float[Tensor, "batch heads n dim dim"], tuple[Tensor, ...]]:
        """A for each token, of those up to it; ``state`` holds the sums over the tokens before, and those after."""
        raise NotImplementedError

    def forward(self, q, k, v, *, mask=None, causal=False):
        q, k, v = self._kept(mask, q, k, v)
        return self._causal(q, k, v, None)[0] if causal else v @ self.channels(q, k).mT

    def weights(self, q, k, *, mask=None, causal=False):
        q, k, keep = self._kept(mask, q, k, q.new_ones(q.shape[0], 1, q.shape[2], 1))
        channels = self.running(q, k, None)[0] if causal else self.channels(q, k)[:, :, None]
        # Token i reads its own values: a diagonal for each pair of channels.
        diagonal = channels.permute(0, 1, 3, 4, 2) * keep.squeeze(-1)[:, :, None, None]
        return torch.diag_embed(diagonal.flatten(1, 3))

    def read(self, weights, v):
        v = dense.repeat_heads(v, self.heads)
        matrices = weights.unflatten(1, (self.heads, self.head_dim, self.head_dim))
        return torch.einsum("bhcdij,bhjd->bhic", matrices, v)

    def step(self, q, k, v, state=None, **extra):
        return self._causal(q, k, v, state)

    def _kept(self, mask: Mask | None, *streams: Tensor) -> list[Tensor]:
        """The streams without the masked tokens."""
        keep = masks.split(mask)[1]
        return list(streams) if keep is None else [t.masked_fill(~keep[:, None, :, None], 0) for t in streams]

    def _causal(self, q: Heads, k: Heads, v: Heads, state: tuple[Tensor, ...] | None) -> tuple[Heads, Any]:
        """Chunk by chunk, each computed again in the backward pass: a chunk holds a matrix for every token."""

        def part(q: Heads, k: Heads, v: Heads, *state: Tensor) -> tuple[Tensor, ...]:
            channels, after = self.running(q, k, state or None)
            return (channels @ v.unsqueeze(-1)).squeeze(-1), *after

        n, parts, state = q.shape[2], [], state or ()
        rows = max(1, dense.CHUNK // (q.shape[0] * q.shape[1] * q.shape[3] ** 2))
        again = rows < n and torch.is_grad_enabled()
        for chunk in zip(q.split(rows, 2), k.split(rows, 2), v.split(rows, 2), strict=True):
            y, *after = checkpoint(part, *chunk, *state, use_reentrant=False) if again else part(*chunk, *state)
            parts.append(y)
            state = tuple(after)
        return torch.cat(parts, 2), state


def running_sum(x: Tensor, before: Tensor | None) -> Tensor:
    """Over the tokens, axis 2, from what the sum was before the first one."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).cumsum(2)
    return x if before is None else x + before.unsqueeze(2)


@register(CARD)
class XCA(ChannelCore):
    """q, k, v (batch, heads, n, d)."""

    network: ClassVar[type[nn.Module]]

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def channels(self, q, k):
        q, k = (nn.functional.normalize(t, dim=2) for t in (q, k))
        return (q.mT @ k * self.temperature).softmax(-1)

    def running(self, q, k, state):
        before = state or (None, None, None)
        pairs = running_sum(q.unsqueeze(-1) * k.unsqueeze(-2), before[0])
        squares = [running_sum(t.square(), sums) for t, sums in zip((q, k), before[1:], strict=True)]
        of_q, of_k = (t.clamp(min=1e-24).rsqrt() for t in squares)
        scores = pairs * of_q.unsqueeze(-1) * of_k.unsqueeze(-2) * self.temperature.unsqueeze(1)
        return scores.softmax(-1).to(q.dtype), tuple(t[:, :, -1] for t in (pairs, *squares))


class Positions(nn.Module):
    """Sines and cosines of row and column, from 0 to 2 pi over the map, projected to the width."""

    def __init__(self, dim: int, waves: int = 32, base: float = 10_000.0) -> None:
        super().__init__()
        self.waves, self.base = waves, base
        self.project = nn.Conv2d(2 * waves, dim, 1)

    def forward(self, grid: tuple[int, int]) -> Map:
        weight = self.project.weight
        rate = self.base ** (-(torch.arange(self.waves, device=weight.device) // 2 * 2).float() / self.waves)
        axes = []
        for side in grid:
            place = torch.arange(1, side + 1, device=weight.device).float() / (side + 1e-6) * 2 * math.pi
            angle = place[:, None] * rate
            axes.append(torch.stack([angle[:, ::2].sin(), angle[:, 1::2].cos()], 2).flatten(1))
        rows, columns = axes[0][:, None].expand(-1, grid[1], -1), axes[1][None].expand(grid[0], -1, -1)
        return self.project(torch.cat([rows, columns], 2).permute(2, 0, 1)[None].to(weight.dtype))


class LocalPatchInteraction(nn.Sequential):
    """Depthwise 3 x 3, GELU, batch norm, depthwise 3 x 3."""

    def __init__(self, dim: int) -> None:
        first, second = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        super().__init__(first, nn.GELU(), nn.BatchNorm2d(dim), second)


class Block(nn.Module):
    """XCA, local patch interaction and an MLP, each normalised before, scaled by channel and added."""

    def __init__(self, dim: int, heads: int, scale: float, mlp_ratio: float = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attend, self.local, self.mlp = (
            XCA.build(dim, heads),
            LocalPatchInteraction(dim),
            Mlp(dim, int(dim * mlp_ratio)),
        )
        self.scale = nn.Parameter(torch.full((3, dim), scale))

    def forward(self, x: Stream, grid: tuple[int, int]) -> Stream:
        x = x + self.scale[0] * self.attend(self.norm1(x))
        x = x + self.scale[1] * to_tokens(self.local(to_map(self.norm2(x), grid)))[0]
        return x + self.scale[2] * self.mlp(self.norm3(x))


class ClassAttention(nn.Module):
    """The class token, first of the stream, reads all tokens."""

    def __init__(self, dim: int, heads: int, scale: float, all_normed: bool, mlp_ratio: float = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attend, self.mlp = Softmax.build(dim, heads), Mlp(dim, int(dim * mlp_ratio))
        self.scale, self.all_normed = nn.Parameter(torch.full((2, dim), scale)), all_normed

    def forward(self, x: Stream) -> Stream:
        normed = self.norm1(x)
        x = x + self.scale[0] * torch.cat([self.attend(normed[:, :1], normed), normed[:, 1:]], 1)
        x = self.norm2(x) if self.all_normed else torch.cat([self.norm2(x[:, :1]), x[:, 1:]], 1)
        return x + torch.cat([self.scale[1] * self.mlp(x[:, :1]), x[:, 1:]], 1)


def _presets() -> dict[str, dict[str, Any]]:
    sizes: dict[str, dict[str, Any]] = {
        "nano": {"dim": 128, "depth": 12, "heads": 4, "scale": 1.0, "all_normed": False},
        "tiny": {"dim": 192, "depth": 12, "heads": 4, "scale": 1.0},
        "small": {"dim": 384, "depth": 12, "heads": 8, "scale": 1.0},
        "tiny_24": {"dim": 192, "depth": 24, "heads": 4, "scale": 1e-5},
        "small_24": {"dim": 384, "depth": 24, "heads": 8, "scale": 1e-5},
        "medium_24": {"dim": 512, "depth": 24, "heads": 8, "scale": 1e-5},
        "large_24": {"dim": 768, "depth": 24, "heads": 16, "scale": 1e-5},
    }
    return {
        f"{name}{suffix}": {**own, "patch": p} for p, suffix in ((16, ""), (8, "_p8")) for name, own in sizes.items()
    }


class Network(nn.Module):
    """Images (batch, channels, height, width) -> logits.

    Args:
        patch: side of a patch, 8 or 16: three or four convolutions of stride 2.
        scale: initial factor of the residual branches.
        all_normed: class attention normalises the patches too, not the class token alone.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = _presets()
    published: ClassVar[dict[str, int]] = {
        "nano": 3_053_224,
        "tiny": 6_716_272,
        "small": 26_253_304,
        "tiny_24": 12_116_896,
        "small_24": 47_671_384,
        "medium_24": 84_395_752,
        "large_24": 189_096_136,
        "nano_p8": 3_049_016,
        "tiny_p8": 6_706_504,
        "small_p8": 26_213_032,
        "tiny_24_p8": 12_107_128,
        "small_24_p8": 47_631_112,
        "medium_24_p8": 84_323_624,
        "large_24_p8": 188_932_648,
    }

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        heads: int = 8,
        *,
        patch: int = 16,
        scale: float = 1.0,
        all_normed: bool = True,
        class_layers: int = 2,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        expect(patch in (8, 16), "patch", patch, "8 or 16")
        widths = [channels, *(dim * 2 // patch << i for i in range(int(math.log2(patch))))]
        stem: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            stem += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.GELU()]
        self.stem, self.positions = nn.Sequential(*stem[:-1]), Positions(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, scale) for _ in range(depth))
        self.cls = nn.Parameter(torch.empty(1, 1, dim))
        self.class_blocks = nn.ModuleList(ClassAttention(dim, heads, scale, all_normed) for _ in range(class_layers))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.cls, std=0.02)
        initialise(self)

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        x = self.stem(images)
        x, grid = to_tokens(x + self.positions((x.shape[2], x.shape[3])))
        for block in self.blocks:
            x = block(x, grid)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.class_blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


XCA.network = Network
