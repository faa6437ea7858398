"""TransNeXt: each pixel reads its window and a pooled map of the whole image in one softmax, as an eye does.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", 2023, arXiv 2311.17132.

For the token at place i of a map, with N(i) its 3 x 3 window and P the cells of the map pooled to p x p:

    x_P  = LayerNorm(pool(GELU(W_r x)))                                 pooled features, keys and values by W_k, W_v
    qs   = (q / |q| + e) softplus(t) log N_i                            e, t a head; N_i = window keys + pooled keys
    s_i  = [qs (k_N / |k_N|)^T + b_N,  qs (k_P / |k_P|)^T + MLP(log-spaced offset)]
    a    = softmax(s_i)                                                 over window and pooled map together
    y_i  = (a_N + (q / |q|) T + b) V_N + a_P V_P                        T (d, 9) and b (9) a head, outside the softmax

Window places beyond the map have no key. Offsets are those of the query and the middle of the pooled cell, in units of
an eighth of the map, as sign(o) log2(|o| + 1) / 3, through Linear(2, 512), ReLU, Linear(512, heads). Time and memory
are n (9 + p^2): pooling to a fixed size is the paper's linear mode, and the same as its ratios of 8, 4, 2 at the
resolution of training. Shapes (batch, n, dim) with ``grid=(H, W)``; without it tokens are one row.

`weights` shows a: the window's weights, and those of the pooled cells spread evenly over the tokens that they pool.
`Cosine` is the full attention of the last stage, with the same scaling; `Network` the paper's pyramid, whose MLP is a
gated one with a depthwise convolution in the gate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention import grouped
from crosslight.attention.backbone import Pyramid, initialise, to_map, to_tokens
from crosslight.attention.base import Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, tiles
from crosslight.errors import UnsupportedPattern, expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n dim"]
    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="transnext",
    kind="token",
    group="sparse",
    title="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    year=2023,
    paper="2311.17132",
    code="DaiShiResearch/TransNeXt",
    summary="Each token reads its window finely and the pooled whole map coarsely, in one softmax of scaled cosines.",
    patterns=("noncausal-self",),
    why_not="The window and the pooled cells are of the map in which the query stands, and hold later tokens.",
    cost="n",
    mask="keys",
    linear_in_values=False,
    small={"pool": 2},
    checked="the equations written out token by token; scaled cosine attention when the map is not pooled and the "
    "window is closed; the parameter counts of the four released sizes",
    differs="The released layer pools to the side of its map over a fixed ratio; here the pooled size is fixed, which "
    "is the same at the resolution of training. Masked tokens enter neither window nor pooled cells. The pooled values "
    "are no linear function of the tokens, so that no matrix can be read in place of the softmax's.",
    evidence=Evidence(
        claim="window and pooled map beat full softmax attention on images",
        task="digits",
        metric="accuracy",
        margin=0.0,
        options={"pool": 4},
    ),
)


#: Elements of the queries that are taken at a time: they should fit in a core's cache, with what they read.
CHUNK = 1 << 17


class Cosine(Mechanism):
    """Length-scaled cosine attention with a continuous position bias.

    Args:
        trained: (height, width) in which offsets are measured; that of the call unless given.
        bias: whether query, key and value projections have biases.
    """

    card = CARD

    def __init__(self, dim: int, heads: int = 8, *, trained: tuple[int, int] | None = None, bias: bool = True) -> None:
        super().__init__(dim)
        expect(isinstance(heads, int) and heads > 0, "heads", heads, "a positive int")
        expect(dim % heads == 0, "dim", dim, f"a multiple of heads = {heads}")
        self.heads, self.trained, d = heads, trained, dim // heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 1, d), std=0.02))
        #: softplus of it is 1 / 0.24 at first.
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.position = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads))

    def _split(self, t: Tensor) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _scaled(self, unit: Heads, count: Tensor) -> Heads:
        """Queries as the scores take them, from those of length one and the number of keys of each."""
        scale = count.to(torch.promote_types(unit.dtype, torch.float32)).clamp(min=1).log().to(unit.dtype)
        return (unit + self.embedding) * F.softplus(self.temperature) * scale

    def _bias(self, grid: tuple[int, int], pooled: tuple[int, int]) -> Float[Tensor, "heads n cells"]:
        """Of each token on each cell of the pooled map. Offsets repeat, so the MLP is asked for different ones only."""
        weight, trained = self.position[0].weight, self.trained or grid
        assert isinstance(weight, Tensor)
        wide = torch.promote_types(weight.dtype, torch.float32)
        values, index = [], []
        for side, cells, unit in zip(grid, pooled, trained, strict=True):
            # In halves of a step, as the middle of a cell may lie between two tokens.
            middle = [cell * side // cells - (-(cell + 1) * side // cells) - 1 for cell in range(cells)]
            step, low = 2 if side % cells == 0 else 1, -max(middle)
            token = 2 * torch.arange(side, device=weight.device)[:, None]
            index.append((token - torch.tensor(middle, device=weight.device) - low) // step)
            table = torch.arange(low, 2 * side - 1 - min(middle), step, device=weight.device).to(wide) / 2
            table = table * (8 / max(1, unit - 1))
            values.append((table.sign() * (table.abs() + 1).log2() / 3).to(weight.dtype))
        table = self.position(torch.stack(torch.meshgrid(*values, indexing="ij"), -1)).permute(2, 0, 1)
        place = index[0][:, None, :, None] * table.shape[2] + index[1][None, :, None, :]
        return table.flatten(1).index_select(1, place.flatten()).view(self.heads, grid[0] * grid[1], -1)

    def _scores(self, x: Stream, how: Any) -> tuple[Heads, Heads, Tensor]:
        keep, grid = masks.split(how.mask)[1], grouped.plane(how.grid, x.shape[1])
        count = torch.tensor(x.shape[1], device=x.device) if keep is None else keep.sum(1).view(-1, 1, 1, 1)
        q = self._scaled(F.normalize(self._split(self.q(x)), dim=-1), count)
        return q, F.normalize(self._split(self.k(x)), dim=-1), self._bias(grid, grid)[None]

    def _forward(self, x, context, how):
        q, k, bias = self._scores(x, how)
        return self._merge(dense.attend(q, k, self._split(self.v(x)), mask=how.mask, bias=bias, scale=1.0))

    def _weights(self, x, context, how):
        q, k, bias = self._scores(x, how)
        return dense.weights(q, k, mask=how.mask, bias=bias, scale=1.0)

    def _read(self, weights, x, context, how):
        return self._merge(weights @ self._split(self.v(x)))

    def _merge(self, y: Heads) -> Stream:
        return self.out(y.transpose(1, 2).flatten(2))


@register(CARD)
class AggregatedAttention(Cosine):
    """A window and the pooled map in one softmax.

    Args:
        window: side of the window, an odd number.
        pool: side of the pooled map, at most that of the map.
        trained, bias: as of `Cosine`.
    """

    network: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        window: int = 3,
        pool: int = 7,
        trained: tuple[int, int] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, trained=trained, bias=bias)
        expect(window >= 1 and window % 2 == 1, "window", window, "an odd number")
        expect(isinstance(pool, int) and pool >= 1, "pool", pool, "a positive int")
        self.window, self.pool, places, d = window, pool, window**2, dim // heads
        self.reduce, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.local_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 1, places), std=0.0004))
        #: T and b, which weigh the window's values outside the softmax.
        self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, d, places), std=0.02))
        self.tokens_bias = nn.Parameter(torch.zeros(heads, 1, places))

    def _forward(self, x, context, how):
        keep, grid = masks.split(how.mask)[1], grouped.plane(how.grid, x.shape[1])
        near, pooled, held = self._near(grid, x.device), self._pooled(x, keep, grid), self._held(x, keep, grid)
        unit, local, far = self._softmax(x, near, pooled, held, keep, grid)
        seen = _seen(near, keep)[:, None]
        local = (local + unit @ self.tokens + self.tokens_bias).masked_fill(~seen, 0)
        y = _Mixed.apply(local, self._split(self.v(x)), *self._offsets(grid))
        return self._merge(y + far @ self._split(self.v(pooled)))

    def _weights(self, x, context, how):
        keep, grid = masks.split(how.mask)[1], grouped.plane(how.grid, x.shape[1])
        near, pooled, held = self._near(grid, x.device), self._pooled(x, keep, grid), self._held(x, keep, grid)
        _, local, far = self._softmax(x, near, pooled, held, keep, grid)
        # Beyond the map the weight is zero, so that any token may take it.
        index = near.clamp(min=0).expand_as(local)
        return (far @ self._shares(x, keep, grid)[:, None]).scatter_add(-1, index, local)

    def _read(self, weights, x, context, how):
        raise UnsupportedPattern("read: transnext's pooled values are no linear function of the tokens it would weigh")

    def _near(self, grid: tuple[int, int], device: torch.device) -> Int[Tensor, "n places"]:
        """The tokens of each window, -1 beyond the map."""
        token = torch.arange(grid[0] * grid[1], device=device)[:, None]
        place, reach = torch.arange(self.window**2, device=device), self.window // 2
        row = token // grid[1] + place // self.window - reach
        column = token % grid[1] + place % self.window - reach
        inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
        return torch.where(inside, row * grid[1] + column, -1)

    def _offsets(self, grid: tuple[int, int]) -> tuple[int, list[tuple[int, int]]]:
        """How many places a window has, and of those that can be inside the map their number and distance."""
        reach = self.window // 2
        steps = itertools.product(range(-reach, reach + 1), repeat=2)
        there = [
            (place, y * grid[1] + x) for place, (y, x) in enumerate(steps) if abs(y) < grid[0] and abs(x) < grid[1]
        ]
        return self.window**2, there

    def _cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        return min(self.pool, grid[0]), min(self.pool, grid[1])

    def _held(
        self, x: Stream, keep: Bool[Tensor, "batch n"] | None, grid: tuple[int, int]
    ) -> Float[Tensor, "#batch cells"] | None:
        """The share of each pooled cell that may be read, or None for all of each."""
        return None if keep is None else self._average(keep[..., None].to(x.dtype), grid).squeeze(-1)

    def _average(self, x: Stream, grid: tuple[int, int]) -> Float[Tensor, "batch cells dim"]:
        return F.adaptive_avg_pool2d(to_map(x, grid), self._cells(grid)).flatten(2).mT

    def _pooled(self, x: Stream, keep: Tensor | None, grid: tuple[int, int]) -> Float[Tensor, "batch cells dim"]:
        features = F.gelu(self.reduce(x))
        if keep is None:
            return self.norm(self._average(features, grid))
        held = self._held(x, keep, grid)
        assert held is not None
        mean = self._average(features * keep[..., None].to(x.dtype), grid) / held.masked_fill(held == 0, 1)[..., None]
        return self.norm(mean)

    def _shares(self, x: Stream, keep: Tensor | None, grid: tuple[int, int]) -> Float[Tensor, "#batch cells n"]:
        """How much of each token is in each pooled cell; sums to 1 over the tokens."""
        cells = self._cells(grid)
        rows, columns = (
            F.adaptive_avg_pool1d(torch.eye(side, device=x.device, dtype=x.dtype), cell).mT
            for side, cell in zip(grid, cells, strict=True)
        )
        share = torch.kron(rows, columns)[None]
        if keep is None:
            return share
        share = share * keep[:, None].to(x.dtype)
        total = share.sum(-1, keepdim=True)
        return share / total.masked_fill(total == 0, 1)

    def _softmax(
        self,
        x: Stream,
        near: Tensor,
        pooled: Tensor,
        held: Tensor | None,
        keep: Tensor | None,
        grid: tuple[int, int],
    ) -> tuple[Heads, Float[Tensor, "batch heads n places"], Float[Tensor, "batch heads n cells"]]:
        """The queries at length one, and the weights of window and pooled cells."""
        seen = _seen(near, keep)
        there = seen.new_ones(1, pooled.shape[1]) if held is None else held > 0
        count = seen.sum(-1)[:, None, :, None] + there.sum(-1).view(-1, 1, 1, 1)
        unit = F.normalize(self._split(self.q(x)), dim=-1)
        q = self._scaled(unit, count)
        k = F.normalize(self._split(self.k(x)), dim=-1)
        local = _Dots.apply(q, k, *self._offsets(grid)) + self.local_bias
        far = q @ F.normalize(self._split(self.k(pooled)), dim=-1).mT + self._bias(grid, self._cells(grid))
        visible = torch.cat([seen, there[:, None].expand(len(seen), len(near), -1)], -1)[:, None]
        weights = dense.softmax(torch.cat([local, far], -1), visible)
        return unit, *weights.split([near.shape[1], pooled.shape[1]], -1)


# The window's places are slices of the sequence, one after another: keys and values are not copied for each query. Rows
# that lie beyond the map on the left or right are those of other tokens, so the weights of such places must be zero.
def _slices(t: Heads, places: list[tuple[int, int]]) -> Iterator[tuple[int, slice, slice]]:
    """A place, some queries, and the tokens at that place of each."""
    n = t.shape[2]
    some = n if t.is_cuda else max(1, CHUNK // t[:, :, 0].numel())
    for start, (place, offset) in itertools.product(range(0, n, some), places):
        first, stop = max(start, -offset), min(start + some, n, n - offset)
        if first < stop:
            yield place, slice(first, stop), slice(first + offset, stop + offset)


def _dots(a: Heads, b: Heads, count: int, places: list[tuple[int, int]]) -> Float[Tensor, "batch heads n places"]:
    """a_i . b_{i + offset}, 0 beyond the sequence."""
    out = a.new_zeros(*a.shape[:3], count)
    for place, i, j in _slices(a, places):
        out[:, :, i, place] = torch.linalg.vecdot(a[:, :, i], b[:, :, j])
    return out


def _mixed(weights: Tensor, b: Heads, places: list[tuple[int, int]], back: bool = False) -> Heads:
    """The sum over places of weights_i b_{i + offset}, or ``back`` from i to i + offset."""
    out = torch.zeros_like(b, dtype=tiles.working_dtype(b.dtype))
    for place, i, j in _slices(b, places):
        to, of = (j, i) if back else (i, j)
        out[:, :, to].addcmul_(weights[:, :, i, place, None], b[:, :, of])
    return out.to(b.dtype)


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, count, places):
        ctx.save_for_backward(q, k)
        ctx.places = places
        return _dots(q, k, count, places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        q, k = ctx.saved_tensors
        return _mixed(grad, k, ctx.places), _mixed(grad, q, ctx.places, back=True), None, None


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights, v, count, places):
        ctx.save_for_backward(weights, v)
        ctx.how = count, places
        return _mixed(weights, v, places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        weights, v = ctx.saved_tensors
        return _dots(grad, v, *ctx.how), _mixed(weights, grad, ctx.how[1], back=True), None, None


def _seen(near: Int[Tensor, "n places"], keep: Bool[Tensor, "batch n"] | None) -> Bool[Tensor, "#batch n places"]:
    """Which places of each window hold a token that may be read."""
    return (near >= 0)[None] if keep is None else (near >= 0) & keep[:, near.clamp(min=0)]


class GatedMlp(nn.Module):
    """out(GELU(conv3x3(a)) * v), [a, v] = W x; the hidden width is two thirds of the ratio."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 * int(dim * ratio) / 3)
        self.rise, self.out = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x, grid):
        a, v = self.rise(x).chunk(2, -1)
        return self.out(F.gelu(to_tokens(self.conv(to_map(a, grid)))[0]) * v)


class Stage(nn.Module):
    """Overlapping patches, then pre-norm blocks and a norm."""

    def __init__(self, channels: int, dim: int, attends: Sequence[nn.Module], ratio: float, stride: int) -> None:
        super().__init__()
        kernel = 2 * stride - 1
        self.embed, self.norm = nn.Conv2d(channels, dim, kernel, stride, kernel // 2), nn.LayerNorm(dim)
        self.attends = nn.ModuleList(attends)
        self.mlps = nn.ModuleList(GatedMlp(dim, ratio) for _ in attends)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(2 * len(attends) + 1))

    def forward(self, x: Map) -> Map:
        x, grid = to_tokens(self.embed(x))
        x = self.norm(x)
        for i, (attend, mlp) in enumerate(zip(self.attends, self.mlps, strict=True)):
            x = x + attend(self.norms[2 * i](x), grid=grid)
            x = x + mlp(self.norms[2 * i + 1](x), grid)
        return to_map(self.norms[-1](x), grid)


class Network(Pyramid):
    """Images (batch, channels, height, width) -> logits.

    Args:
        dim: width of the first stage; it doubles from stage to stage.
        head_dim: width of the heads.
        image: side of the images of training: a pooled map is 1/32 of it, at other sizes too.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "micro": {"dim": 48, "depths": [2, 2, 15, 2]},
        "tiny": {"dim": 72, "depths": [2, 2, 15, 2]},
        "small": {"dim": 72, "depths": [5, 5, 22, 5]},
        "base": {"dim": 96, "depths": [5, 5, 23, 5]},
    }
    #: Of the released models.
    published: ClassVar[dict[str, int]] = {
        "micro": 12_809_304,
        "tiny": 28_258_960,
        "small": 49_741_564,
        "base": 89_721_496,
    }

    def __init__(
        self,
        dim: int = 72,
        depths: Sequence[int] = (2, 2, 15, 2),
        *,
        ratios: Sequence[float] = (8, 8, 4, 4),
        head_dim: int = 24,
        window: int = 3,
        image: int = 224,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        stages = []
        for i, (depth, ratio) in enumerate(zip(depths, ratios, strict=True)):
            wide, side = dim << i, image // (4 << i)
            how: dict[str, Any] = {"dim": wide, "heads": wide // head_dim, "trained": (side, side)}
            attends: list[nn.Module] = [
                Cosine(**how) if i == len(depths) - 1 else AggregatedAttention(**how, window=window, pool=image // 32)
                for _ in range(depth)
            ]
            stages.append(Stage(channels if i == 0 else wide // 2, wide, attends, ratio, 4 if i == 0 else 2))
        super().__init__(stages, wide, classes=classes, norm=nn.Identity())
        initialise(self)


AggregatedAttention.network = Network
