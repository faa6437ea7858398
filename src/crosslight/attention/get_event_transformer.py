"""GET: inside a window, positions attend to each other, then channels, which are groups of time and polarity, do.

Peng, Zhang, Xiong, Sun, Wu, "GET: Group Event Transformer for Event-Based Vision", 2023, arXiv 2310.02642.

Events (t, x, y, p) fall into 6 slices of time x 2 polarities = 12 groups of channels, and each patch of 4 x 4 pixels
counts them (`histograms`). In each window of N = w x w tokens with C channels:

    X   = W_o softmax(s cos(Q, K) + 16 sigmoid(MLP(dy, dx))) V                  (N, C)   s learned a head, at most 100
    X_i = W_p softmax(cos(Q_i, K_i) + 16 sigmoid(MLP(dc, dg))) V_i, transposed  (N, C)   [Q_i, K_i, V_i] = W_i X^T

In the second line the C channels are the tokens and their N values in the window the features, in w heads; dc is the
offset in the place inside a group, dg that of the group. Offsets are spaced by sign(o) log2(8 |o| + 1) / 3. The block
has two residual streams, x <- x + norm(X) and x_i <- x_i + norm(X_i), and the MLP reads x + x_i and changes x. The
layer's own output is X + X_i.

Shapes (batch, n, dim) with ``grid=(H, W)``; without it tokens are one row of windows of N. There is no window shift.
`weights` is the matrix of the first line, `group_weights` that of the second. Between the stages of `Network` a group
convolution, whose groups overlap, halves the groups and doubles the channels, and a pooling halves the sides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention import grouped
from crosslight.attention.backbone import Mlp, Pyramid, initialise, to_map, to_tokens
from crosslight.attention.base import Mechanism
from crosslight.attention.grouped import Cut
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks, sparse, tiles
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Groups = Float[Tensor, "batch*windows places dim"]
    Heads = Float[Tensor, "batch heads n dim"]
    Map = Float[Tensor, "batch channels height width"]

CARD = Card(
    id="get-event-transformer",
    kind="token",
    group="sparse",
    title="GET: Group Event Transformer for Event-Based Vision",
    year=2023,
    paper="2310.02642",
    code="Peterande/GET-Group-Event-Transformer",
    summary="Positions of a window attend by cosines, then its channels do, which are groups of time and polarity.",
    patterns=("noncausal-self",),
    why_not="The second attention weighs channels by what they hold in a whole window, later tokens among it.",
    cost="n",
    mask="keys",
    linear_in_values=False,
    small={"window": 4, "groups": 4},
    checked="both attentions written out window by window; shapes and row sums of the attention of channels; which "
    "groups a group convolution reads; sums of the histograms",
    differs="Places beyond the map are masked in the first attention and zero in the second; the released code lets "
    "zero tokens take part. Groups are neighbouring channels, as in the group convolution; the released bias takes "
    "every groups-th channel for a group. Time is measured from the earliest to the latest event instead of the first "
    "to the last. The released models cut time into 12 slices for 12 groups. The network begins as the released "
    "`init_weights` says, which the released training script does not call.",
    evidence=Evidence(
        claim="windows of 4 x 4 with attention between channels are not worse than full attention by more than 0.03",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"window": 4, "groups": 4},
    ),
)


class LogBias(nn.Module):
    """16 sigmoid(MLP) of offsets that are spaced by their logarithm."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(2, 512), nn.Linear(512, heads, bias=False)

    def forward(self, size: tuple[int, int]) -> Float[Tensor, "heads offsets offsets"]:
        """The table of the offsets 1 - side to side - 1 on both axes."""
        like = self.rise.weight
        axes = []
        for side in size:
            offset = torch.arange(1 - side, side, device=like.device).to(like.dtype) * (8 / max(1, side - 1))
            axes.append(offset.sign() * (offset.abs() + 1).log2() / 3)
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        return 16 * self.fall(self.rise(offsets).relu()).sigmoid().permute(2, 0, 1)


@register(CARD)
class GroupEventAttention(Mechanism):
    """Attention of positions, then of channels, in windows.

    Args:
        window: w, tokens of a window on each axis; also the heads of the attention of channels.
        groups: groups of channels, a divisor of dim.
    """

    network: ClassVar[type[nn.Module]]

    def __init__(self, dim: int, heads: int = 3, *, window: int = 8, groups: int = 12) -> None:
        super().__init__(dim)
        expect(isinstance(heads, int) and heads > 0, "heads", heads, "a positive int")
        expect(dim % heads == 0, "dim", dim, f"a multiple of heads = {heads}")
        expect(isinstance(window, int) and window >= 1, "window", window, "a positive int")
        expect(dim % groups == 0, "groups", groups, f"a divisor of dim = {dim}")
        self.heads, self.window, self.groups = heads, window, groups
        places = window**2
        self.q, self.v, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.k = nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.bias = LogBias(heads)
        self.group_q, self.group_v, self.group_out = (nn.Linear(places, places) for _ in range(3))
        self.group_k = nn.Linear(places, places, bias=False)
        self.group_bias = LogBias(window)

    def both(
        self, x: Stream, *, mask: Bool[Tensor, "batch n"] | None = None, grid: Grid | None = None
    ) -> tuple[Stream, Stream]:
        """X and X_i."""
        cut = self._cut(x, grid)
        y, y_groups = self._in_windows(x, cut, mask)
        return cut.join(y), cut.join(y_groups)

    def group_weights(
        self, x: Stream, *, mask: Bool[Tensor, "batch n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "batch windows heads dim dim"]:
        """The attention of the channels, of each window."""
        cut = self._cut(x, grid)
        q, k, _ = self._channels(self._in_windows(x, cut, mask)[0], self._seen(x, cut, mask))
        return dense.weights(q, k, bias=self._group_bias(), scale=1.0).unflatten(0, (len(x), -1))

    def _forward(self, x, context, how):
        cut = self._cut(x, how.grid)
        y, y_groups = self._in_windows(x, cut, masks.split(how.mask)[1])
        return cut.join(y + y_groups)

    def _in_windows(self, x: Stream, cut: Cut, mask: Tensor | None) -> tuple[Groups, Groups]:
        windows, seen = cut.split(x), self._seen(x, cut, mask)
        q, k = self._cosines(windows)
        bias = grouped.of_offsets(self.bias(cut.size), *grouped.inside(cut.size, x.device))[None]
        rule = None if seen is None else masks.keys(seen)
        y = self._merge(dense.attend(q, k, self._split(self.v(windows)), mask=rule, bias=bias, scale=1.0))
        return y, self._between_channels(y, seen)

    def _seen(self, x: Stream, cut: Cut, mask: Tensor | None) -> Bool[Tensor, "batch*windows places"] | None:
        """Which places of the windows hold tokens that may be read."""
        if mask is None and cut.whole:
            return None
        mask = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.expand(len(x), -1)
        return cut.split(mask[..., None]).squeeze(-1)

    def _weights(self, x, context, how):
        cut = self._cut(x, how.grid)
        number, row, column = cut.places(x.device)
        together = masks.Pairs((number[:, None] == number)[None, None])
        # Offsets between windows mean nothing: any will do.
        bias = grouped.of_offsets(self.bias(cut.size), row[:, None] - row, column[:, None] - column)
        q, k = self._cosines(x)
        return dense.weights(q, k, mask=masks.join(together, how.mask), bias=bias[None], scale=1.0)

    def _read(self, weights, x, context, how):
        cut = self._cut(x, how.grid)
        windows = cut.split(self._merge(weights @ self._split(self.v(x))))
        return cut.join(windows + self._between_channels(windows, self._seen(x, cut, masks.split(how.mask)[1])))

    def _cut(self, x: Stream, grid: Grid | None) -> Cut:
        # All windows have N places, as these are the features of the channels.
        sides = grouped.plane(grid, x.shape[1])
        return Cut(sides, (1, self.window**2) if grid is None else (self.window, self.window))

    def _split(self, t: Tensor) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _merge(self, y: Heads) -> Stream:
        return self.out(y.transpose(1, 2).flatten(2))

    def _cosines(self, x: Stream) -> tuple[Heads, Heads]:
        """Queries and keys whose products are the scores."""
        scale = self.scale.clamp(max=math.log(100)).exp()
        q, k = (F.normalize(self._split(project(x)), dim=-1) for project in (self.q, self.k))
        return q * scale, k

    def _channels(self, y: Groups, seen: Tensor | None) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values of the channels, (batch * windows, heads, dim, places / heads)."""
        channels = (y if seen is None else y.masked_fill(~seen[..., None], 0)).mT
        q, k, v = (
            project(channels).unflatten(-1, (self.window, -1)).transpose(1, 2)
            for project in (self.group_q, self.group_k, self.group_v)
        )
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v

    def _group_bias(self) -> Float[Tensor, "1 heads dim dim"]:
        inside = self.dim // self.groups
        dg, dc = grouped.inside((self.groups, inside), self.group_out.weight.device)
        return grouped.of_offsets(self.group_bias((inside, self.groups)), dc, dg)[None]

    def _between_channels(self, y: Groups, seen: Tensor | None) -> Groups:
        q, k, v = (t.transpose(0, 1) for t in self._channels(y, seen))
        z = _OfChannels.apply(q, k, v, self._group_bias()[0]).transpose(0, 1)
        return self.group_out(z.transpose(1, 2).flatten(2)).mT


class _OfChannels(torch.autograd.Function):
    """softmax(q k^T + bias) v; q, k, v (heads, windows, dim, places), bias (heads, dim, dim).

    A window has dim^2 scores a head, far more than it has numbers: they are held for a few windows at a time and
    computed again in the backward pass. As they lie between -1 and 17, exp needs no maximum. Sums and differences of
    rows come out of the products, by a place more: of ones, or what is subtracted.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, bias):
        with torch.autocast(q.device.type, enabled=False):
            out, room = torch.empty_like(q), tiles.Room()
            lse = torch.empty_like(q[..., :1], dtype=tiles.working_dtype(q.dtype))
            for part in _parts(q):
                q_, k_, v_ = (t[part].flatten(0, 1).to(lse.dtype) for t in (q, k, v))
                y = torch.bmm(_exponentials(q_, k_, bias[part[0]].to(lse.dtype), room), F.pad(v_, (0, 1), value=1.0))
                y, total = y[..., :-1], y[..., -1:]
                out[part], lse[part] = (y / total).view_as(out[part]), total.log().view_as(lse[part])
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        q, k, v, bias, out, lse = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            by_q, by_k, by_v, room = *(torch.empty_like(t) for t in (q, k, v)), tiles.Room()
            by_bias = torch.zeros_like(bias, dtype=lse.dtype)
            for part in _parts(q):
                q_, k_, v_, g_, y_ = (t[part].flatten(0, 1).to(lse.dtype) for t in (q, k, v, grad, out))
                less = torch.cat([q_, -lse[part].flatten(0, 1)], -1)
                weights = _exponentials(less, F.pad(k_, (0, 1), value=1.0), bias[part[0]].to(lse.dtype), room)
                by_v[part] = torch.bmm(weights.mT, g_).view_as(by_v[part])
                less = torch.cat([g_, -torch.linalg.vecdot(g_, y_)[..., None]], -1)
                by_score = room.bmm("by_score", less, F.pad(v_, (0, 1), value=1.0).mT).mul_(weights)
                by_q[part] = torch.bmm(by_score, k_).view_as(by_q[part])
                by_k[part] = torch.bmm(by_score.mT, q_).view_as(by_k[part])
                by_bias[part[0]] += by_score.unflatten(0, q[part].shape[:2]).sum(1)
        return by_q, by_k, by_v, by_bias.to(bias.dtype)


def _parts(q: Tensor) -> list[tuple[slice, slice]]:
    """Slices of heads and windows: several heads of all windows, or one head of some."""
    heads, windows, dim, _ = q.shape
    room = max(1, (dense.CHUNK if q.is_cuda else sparse.CHUNK) // dim**2)
    several, some = max(1, room // windows), min(room, windows)
    firsts = itertools.product(range(0, heads, several), range(0, windows, some))
    return [(slice(h, min(h + several, heads)), slice(w, min(w + some, windows))) for h, w in firsts]


def _exponentials(q: Tensor, k: Tensor, bias: Float[Tensor, "heads dim dim"], room: tiles.Room) -> Tensor:
    """exp(q k^T + bias), (heads * windows, dim, dim)."""
    scores = room.bmm("scores", q, k.mT)
    scores.unflatten(0, (len(bias), -1)).add_(bias[:, None])
    return scores.exp_()


def histograms(
    events: Sequence[Float[Tensor, "events 4"]], size: tuple[int, int], *, slices: int = 6, patch: int = 4
) -> Map:
    """Events of each example, rows (t, x, y, polarity 0 or 1), as a map of patches.

    Returns:
        (batch, slices * 2 polarities * 2 * patch^2, height / patch, width / patch): of each pixel of a patch how many
        events it had, and the sum of their times, from 0 for the earliest to 1 for the latest of the example.
    """
    height, width = size
    expect(height % patch == 0 and width % patch == 0, "size", size, f"multiples of patch = {patch}")
    rows, columns, maps = height // patch, width // patch, []
    for each in events:  # a batch holds examples of different lengths
        expect(each.dim() == 2 and each.shape[1] == 4, "events", tuple(each.shape), "(events, 4): t, x, y, polarity")
        t, (x, y, polarity) = each[:, 0], each[:, 1:].long().unbind(1)
        if len(each):
            t = (t - t.min()) / (t.max() - t.min()).clamp(min=torch.finfo(t.dtype).tiny)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        group = (t * slices).long().clamp(max=slices - 1) * 2 + polarity.clamp(0, 1)
        pixel = y % patch * patch + x % patch
        place = ((group * 2 * patch**2 + pixel) * rows + y // patch) * columns + x // patch
        flat = t.new_zeros(slices * 4 * patch**2 * rows * columns)
        flat = flat.index_add(0, place[inside], torch.ones_like(t)[inside])
        flat = flat.index_add(0, place[inside] + patch**2 * rows * columns, t[inside])
        maps.append(flat.view(-1, rows, columns))
    return torch.stack(maps)


class GroupEmbedding(nn.Module):
    """A group convolution over the patches' histograms, then an MLP over all channels."""

    def __init__(self, channels: int, dim: int, groups: int, hidden: int = 768) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden // 4, 3, padding=1, groups=groups)
        self.mlp = nn.Sequential(
            nn.Linear(hidden // 4, hidden), nn.LayerNorm(hidden, eps=1e-6), nn.GELU(), nn.Linear(hidden, dim)
        )

    def forward(self, x: Map) -> Map:
        return self.mlp(self.conv(x).movedim(1, -1)).movedim(-1, 1)


class GroupAggregation(nn.Module):
    """Half as many groups, of which each reads three old ones, at twice the channels and half the sides."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        expect(groups % 2 == 0, "groups", groups, "an even number, as stages halve it")
        self.groups = groups
        self.conv = nn.Conv2d(3 * dim // 2, 2 * dim, 3, padding=1, groups=groups // 2)
        self.norm = nn.LayerNorm(2 * dim, eps=1e-6)

    def forward(self, x: Map) -> Map:
        first = torch.arange(0, self.groups, 2, device=x.device)[:, None]
        read = (first + torch.arange(-1, 2, device=x.device)).clamp(min=0)  # the first group twice
        overlapping = x.unflatten(1, (self.groups, -1)).index_select(1, read.flatten()).flatten(1, 2)
        y = self.norm(self.conv(overlapping).movedim(1, -1)).movedim(-1, 1)
        # As in the released code, windows of 3 begin at even places unless a side is odd.
        odd = [side % 2 for side in y.shape[2:]]
        return F.max_pool2d(F.pad(y, (odd[1], 1, odd[0], 1), value=-math.inf), 3, stride=2)


class DualBlock(nn.Module):
    """x and x_i, both (batch, n, dim), through the two attentions and the MLP, normalised after each."""

    def __init__(self, attend: GroupEventAttention, ratio: float = 4) -> None:
        super().__init__()
        dim = attend.dim
        self.attend, self.mlp = attend, Mlp(dim, int(dim * ratio))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        for norm in (self.norm1, self.norm2):
            nn.init.constant_(norm.weight, 1e-5)  # blocks begin as nearly nothing but the MLP

    def forward(self, x: Stream, x_groups: Stream, grid: Grid) -> tuple[Stream, Stream]:
        y, y_groups = self.attend.both(x, grid=grid)
        x, x_groups = x + self.norm1(y), x_groups + self.norm2(y_groups)
        return x + self.norm3(self.mlp(x + x_groups)), x_groups


class Stage(nn.Module):
    """What makes the tokens of the stage, then dual blocks."""

    def __init__(self, down: nn.Module, blocks: Sequence[DualBlock]) -> None:
        super().__init__()
        self.down, self.blocks = down, nn.ModuleList(blocks)

    def forward(self, x: Map) -> Map:
        tokens, grid = to_tokens(self.down(x))
        both = tokens, tokens
        for block in self.blocks:
            both = block(*both, grid)
        return to_map(both[0], grid)


class Network(Pyramid):
    """Histograms of events (batch, slices * 4 * patch^2, height, width) -> logits.

    Args:
        dim: width of the first stage; it doubles from stage to stage while the groups halve.
        slices: of time; there are twice as many groups.
        patch: side of the patches of the histograms.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"dim": 24, "depths": [1, 1, 2], "heads": [3, 6, 12]},
        "base": {"dim": 48, "depths": [2, 2, 8], "heads": [3, 6, 12]},
    }
    #: Of the released model, with 6 slices of time.
    published: ClassVar[dict[str, int]] = {"base": 4_523_020}

    def __init__(
        self,
        dim: int = 48,
        depths: Sequence[int] = (2, 2, 8),
        heads: Sequence[int] = (3, 6, 12),
        *,
        slices: int = 6,
        patch: int = 4,
        window: int = 8,
        classes: int = 10,
    ) -> None:
        stages = []
        for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            wide, groups = dim << i, 2 * slices >> i
            down = GroupAggregation(wide // 2, 2 * groups) if i else GroupEmbedding(slices * 4 * patch**2, dim, groups)
            attends = [GroupEventAttention(wide, count, window=window, groups=groups) for _ in range(depth)]
            stages.append(Stage(down, [DualBlock(attend) for attend in attends]))
        super().__init__(stages, wide, classes=classes, norm=nn.Identity())
        # The normalisation comes before the mean over the tokens.
        self.last = nn.LayerNorm(wide, eps=1e-6)
        initialise(self)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, images: Map) -> Float[Tensor, "batch classes"]:
        return self.head(self.last(to_tokens(self.features(images)[-1])[0]).mean(1))


GroupEventAttention.network = Network
