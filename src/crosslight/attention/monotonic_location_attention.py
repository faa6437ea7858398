"""Monotonic location attention: a Gaussian over positions whose mean only moves on from what was attended to last.

"Monotonic Location Attention for Length Generalization", 2023, arXiv 2305.20019.

Of S keys, p_j = j / (S - 1) is the place of key j. For each query t and head, with l_t = W_l x_t + b_l:

    sigma_t = (relu(l_t . w_sigma) + 0.27) / S
    mu_t = pbar_{t-1} + f(l_t . w_rho) / (S - 1),    pbar_t = sum_j a_tj p_j           the place attended to last
    loc_tj = exp(-(p_j - mu_t)^2 / (2 sigma_t^2)), over its sum                        (batch, heads, n, m)
    a_t = g_t loc_t + (1 - g_t) softmax(q_t K^T / sqrt(d)),    g_t = sigmoid(w_g . x_t)

    f     "mixed": b relu(r) + (1 - b) sigmoid(5 r), b = sigmoid(20) at first and learned; "relu"; "sigmoid"; "stairs":
          floor r + sigmoid(tau (r - floor r - 1/2)) of r = relu; "one": 1 (OneStep)

f >= 0, so mu never lies before the place attended to last, and a step is counted in keys, whatever S: what was learned
on short inputs holds on long ones. (pbar is a mean over whole keys and can lie a fraction of a key before mu, and more
at the last keys, where a wide Gaussian is cut off.)

Reverse tasks become forward ones by interpolated directions: keys and values are those of g_d z + (1 - g_d) flip(z),
g_d = sigmoid(5 w_d . h), with h the last state of z and the flip within its true length. `Directions` is that part, for
the context of any row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.alignment import Aligned, AlignmentCache, unrolled
from crosslight.attention.precision import widened
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Stream = Float[Tensor, "batch n dim"]
    Context = Float[Tensor, "batch m context_dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Keep = Bool[Tensor, "batch m"]

Step = Literal["mixed", "relu", "sigmoid", "stairs", "one"]

CARD = Card(
    id="monotonic-location-attention",
    kind="token",
    group="positions-masks",
    title="Monotonic Location Attention for Length Generalization",
    year=2023,
    paper="2305.20019",
    code="JRC1995/MonotonicLocationAttention",
    summary="Attention by a Gaussian around a place that moves forward by learned steps, mixed with content, over a "
    "context that may be read from either end.",
    patterns=("noncausal-cross", "causal-cross"),
    why_not="A query's place in a second stream is found step by step; in its own stream it is known.",
    cost="n^2",
    mask="keys",
    decode="state",
    checked="the paper's equations for one query and head at a time; places 0, 1, 2, ... at a step of one",
    differs="Places count the keys that are not masked. 'stairs' takes the relu of its input, without which steps "
    "could go back. The released code starts at 0 with a start token there; start=-1 is for contexts without one. The "
    "last state of the context is its last key, where the paper has the final state of a recurrent encoder. Output t "
    "depends on x up to t also in calls that are not causal.",
    evidence=Evidence(
        claim="by location alone, what was trained to copy up to 10 symbols copies 40, where attention by content "
        "loses its place",
        task="copy-longer",
        metric="accuracy",
        margin=0.3,
        options={"start": -1, "content": False},
    ),
)


def places(keep: Keep) -> tuple[Int[Tensor, "batch m"], Int[Tensor, "batch 1"]]:
    """The number of each key among those that are kept, and how many there are."""
    return keep.cumsum(1) - 1, keep.sum(1, keepdim=True)


def flipped(keep: Keep) -> Int[Tensor, "batch m"]:
    """For each key, the one in its place when the kept keys are reversed; a masked key stays."""
    rank, count = places(keep)
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)  # the kept keys first
    other = order.gather(1, (count - 1 - rank).clamp(min=0))
    return torch.where(keep, other, torch.arange(keep.shape[1], device=keep.device))


class Directions(nn.Module):
    """g z + (1 - g) flip(z), with g = sigmoid(scale * w . last state)."""

    def __init__(self, dim: int, scale: float = 5.0) -> None:
        super().__init__()
        self.gate, self.scale = nn.Linear(dim, 1), scale

    def forward(self, z: Context, keep: Keep | None = None) -> Context:
        g, turn = self.split(z, keep)
        return g * z + (1 - g) * z.gather(1, turn.unsqueeze(-1).expand_as(z))

    def split(self, z: Context, keep: Keep | None = None) -> tuple[Float[Tensor, "batch 1 1"], Int[Tensor, "batch m"]]:
        """g, and the places of the flip."""
        keep = _kept(z, keep)
        last = (torch.arange(z.shape[1], device=z.device) * keep).amax(1)
        h = z.gather(1, last.view(-1, 1, 1).expand(-1, 1, z.shape[2]))
        # With nothing to read there is no last state.
        return (self.scale * self.gate(h * keep.any(1)[:, None, None].to(z.dtype))).sigmoid(), flipped(keep)


@register(CARD)
class MonotonicLocationAttention(Aligned):
    """W_o [a v] with a monotonic location part and, unless left out, a content part.

    Args:
        dim, heads, head_dim, context_dim, bias: as in `AttentionLayer`.
        step: f: "mixed", "relu", "sigmoid", "stairs" or "one".
        content: mix with softmax attention by content.
        directions: interpolate the context with its reverse.
        start: the key that counts as read before the first query; -1 if the context has no start token.
        floor: the least width, in keys.
        temperature: tau of "stairs".
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        step: Step = "mixed",
        content: bool = True,
        directions: bool = True,
        start: int = 0,
        floor: float = 0.27,
        temperature: float = 20.0,
    ) -> None:
        super().__init__(dim, heads, head_dim, context_dim, bias)
        expect(step in get_args(Step), "step", repr(step), f"one of {', '.join(get_args(Step))}")
        expect(floor > 0, "floor", floor, "a positive width")
        self.f, self.start, self.floor, self.temperature = step, start, floor, temperature
        width = heads * self.head_dim
        self.place = nn.Linear(dim, width)
        self.w_sigma = nn.Parameter(torch.randn(heads, self.head_dim, 1) * self.head_dim**-0.5)
        if step != "one":
            self.w_rho = nn.Parameter(torch.randn(heads, self.head_dim, 1) * self.head_dim**-0.5)
        if step == "mixed":
            self.step_bias = nn.Parameter(torch.full((1,), 20.0))
        self.content = content
        if content:
            self.q, self.k = nn.Linear(dim, width, bias), nn.Linear(self.context_dim, width, bias)
            self.mix = nn.Linear(dim, 1)
        self.directions = Directions(self.context_dim) if directions else None

    def moves(self, x: Stream, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Steps and widths in keys, (batch, heads, n) each."""
        where = self._split(self.place(x))
        sigma = ((where @ self.w_sigma).squeeze(-1).relu() + self.floor).to(dtype)
        if self.f == "one":
            return torch.ones_like(sigma), sigma
        r = (where @ self.w_rho).squeeze(-1).to(dtype)
        if self.f == "relu":
            return r.relu(), sigma
        if self.f == "sigmoid":
            return (5 * r).sigmoid(), sigma
        if self.f == "stairs":
            r = r.relu()
            return r.floor() + (self.temperature * (r - r.floor() - 0.5)).sigmoid(), sigma
        b = self.step_bias.to(dtype).sigmoid()
        return b * r.relu() + (1 - b) * (5 * r).sigmoid(), sigma

    def _start(self, context, how):
        keep = _kept(context, masks.split(how.mask)[1])
        first = context.new_full((len(context), self.heads), self.start, dtype=widened(context.dtype))
        if self.directions is not None:
            context = self.directions(context, keep)
        k = self._split(self.k(context)) if self.content else None
        return AlignmentCache(self._split(self.v(context)), keep, first, k)

    def _attend(self, x, cache):
        """a v, and the place attended to last: its number among the keys, that is (S - 1) pbar."""
        k, v, keep, state = cache.k, cache.v, cache.keep, cache.state
        wide = state.dtype
        rank, count = places(keep)
        rank, seen = rank.to(wide).unsqueeze(1), keep.unsqueeze(1)
        step, sigma = self.moves(x, wide)
        # In keys, sigma is (S - 1) / S of what it is in the paper's units.
        sigma = sigma * ((count - 1).clamp(min=1) / count.clamp(min=1)).to(wide).unsqueeze(1)
        inputs: tuple[Tensor, ...] = (step, 1 / (2 * sigma.square()))
        read = None
        if k is not None:
            gate = self.mix(x).sigmoid()  # (batch, n, 1)
            # The place that content alone would attend to is a value like any other.
            at = rank.unsqueeze(-1).expand(-1, self.heads, -1, -1)
            how = masks.keys(keep)
            read = dense.attend(self._split(self.q(x)), k, v, mask=how)
            place = dense.attend(self._split(self.q(x)).to(wide), k.to(wide), at, mask=how).squeeze(-1)
            inputs += (gate.transpose(1, 2).to(wide).expand_as(place), place)

        def advance(last: Tensor, step: Tensor, rate: Tensor, *mixed: Tensor) -> tuple[Tensor, Tensor]:
            mean = (last + step).unsqueeze(-1)
            row = dense.softmax(-(rank - mean).square() * rate.unsqueeze(-1), seen)
            place = (row * rank).sum(-1)
            if mixed:
                place = mixed[0] * place + (1 - mixed[0]) * mixed[1]
            return row, place

        y, state = unrolled(advance, state, inputs, lambda rows: rows.to(v.dtype) @ v, 4 * state.numel() * v.shape[2])
        if read is not None:
            y = gate.unsqueeze(1) * y + (1 - gate.unsqueeze(1)) * read
        return y, state

    def _weights(self, x, context, how):
        cache = self._start(context, how)
        # With the identity for values, what is read is the matrix.
        eye = torch.eye(context.shape[1], device=x.device, dtype=x.dtype).expand(*cache.v.shape[:2], -1, -1)
        weights = self._attend(x, replace(cache, v=eye))[0]
        if self.directions is None:
            return weights
        g, turn = self.directions.split(context, cache.keep)
        g = g.unsqueeze(1)  # the flip is its own inverse
        return g * weights + (1 - g) * weights.gather(3, turn[:, None, None].expand_as(weights))


def _kept(context: Context, keep: Keep | None) -> Keep:
    return torch.ones(context.shape[:2], device=context.device, dtype=torch.bool) if keep is None else keep
