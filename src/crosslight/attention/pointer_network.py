"""Pointer networks: attention weights that are the answer, a distribution over the positions of the input.

Vinyals, Fortunato and Jaitly, "Pointer Networks", 2015, arXiv 1506.03134.

    u_ij = v . tanh(W_1 e_j + W_2 d_i)                    e encoder states, d decoder states
    p(C_i = j | C_1 .. C_{i-1}, P) = softmax_j(u_ij)      (batch, n, m), for any number m of inputs

There is no blend of states and no fixed vocabulary: the output has as many entries as there are inputs. The layer gives
that distribution as `weights`, in logarithms for the loss as `log_probabilities`, and its mode as `point`. Called like
any other attention it returns what is pointed at, softly: y_i = W_o sum_j p_ij z_j; this sum is not the paper's, it
stands for the input P_{C_i} that goes back into the paper's decoder.

`PointerNetwork` is the paper's model, one LSTM that reads the inputs and one that points at them:

    net = crosslight.create("pointer-network", preset="paper")
    net(points, targets)                                  (batch, steps, n + 1), teacher forcing; entry n is the end
    net.decode(points, beam=3, once=True)                 (batch, n + 1) indices, each input at most once, for tours
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.attention.base import Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.engines.backend import forced
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CARD = Card(
    id="pointer-network",
    kind="token",
    group="scores",
    title="Pointer Networks",
    year=2015,
    paper="1506.03134",
    summary="Additive attention whose weights are the output: a distribution over input positions, for any number.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the score written out pair by pair; the network written out cell by cell; tours by exhaustive search",
    differs="The blended output and its projection are ours, so that the layer fits where other attentions do; heads "
    "> 1 are ours, each on its own slice. In the network the end symbol is a learned state behind those of the inputs.",
    evidence=Evidence(
        claim="A pointer finds the position of the largest of 16 numbers at least as surely as dot products do",
        task="argmax-position",
        metric="accuracy",
        margin=0.0,
        options={"heads": 1},
    ),
)


class AdditiveScore(nn.Module):
    """u = v . tanh(W_1 e + W_2 d) for each head, on projected states (batch, heads, length, width)."""

    def __init__(self, query_dim: int, key_dim: int, width: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.w_1 = nn.Linear(key_dim, heads * width, bias=False)
        self.w_2 = nn.Linear(query_dim, heads * width, bias=False)
        self.v = nn.Parameter(torch.empty(heads, width, 1).uniform_(-1, 1) * width**-0.5)

    def queries(self, d: Tensor) -> Tensor:
        return self.w_2(d).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, e: Tensor) -> Tensor:
        return self.w_1(e).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch heads n m"]:
        """Scores of queries (batch, heads, n, width) on keys (batch, heads, m, width)."""
        return ((q.unsqueeze(3) + k.unsqueeze(2)).tanh() @ self.v.unsqueeze(1)).squeeze(-1)


class PointerNetwork(nn.Module):
    """The paper's model: n inputs (batch, n, inputs) -> a sequence of positions; position n is the end.

    Args:
        inputs: numbers an input has, 2 for points in the plane.
        hidden: width of both LSTMs.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"hidden": 32}, "paper": {"hidden": 256}}

    def __init__(self, inputs: int = 2, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.LSTM(inputs, hidden, batch_first=True)
        self.decoder = nn.LSTM(inputs, hidden, batch_first=True)
        self.score = AdditiveScore(hidden, hidden, hidden)
        self.start, self.end = nn.Parameter(torch.empty(inputs)), nn.Parameter(torch.empty(hidden))
        for p in self.parameters():
            nn.init.uniform_(p, -0.08, 0.08)

    def _encode(self, points: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What can be pointed at, (batch, 1, n + 1, hidden), and the decoder's first state."""
        expect(points.dim() == 3, "points", tuple(points.shape), "(batch, n, inputs)")
        states, last = self.encoder(points)
        states = torch.cat([states, self.end.expand(len(points), 1, -1)], 1)
        return self.score.keys(states), last

    def forward(
        self, points: Float[Tensor, "batch n inputs"], targets: Int[Tensor, "batch steps"]
    ) -> Float[Tensor, "batch steps n+1"]:
        """Log-probabilities of each step's positions, given the right ones before."""
        keys, state = self._encode(points)
        before = targets[:, :-1].clamp(0, points.shape[1] - 1)  # nothing counts behind the end
        inputs = points.gather(1, before.unsqueeze(-1).expand(-1, -1, points.shape[2]))
        inputs = torch.cat([self.start.expand(len(points), 1, -1), inputs], 1)
        d, _ = self.decoder(inputs, state)
        return self.score(self.score.queries(d), keys).squeeze(1).log_softmax(-1)

    @torch.no_grad()
    def decode(
        self, points: Float[Tensor, "batch n inputs"], *, beam: int = 1, once: bool = False, steps: int | None = None
    ) -> Int[Tensor, "batch steps"]:
        """The most probable sequence that a beam finds; greedy with ``beam=1``.

        Args:
            beam: sequences kept.
            once: every input must come exactly once before the end, as in a tour.
            steps: length of the answer, n + 1 unless given; behind its end a sequence stays at n.
        """
        expect(beam >= 1, "beam", beam, "a positive int")
        (batch, n, width), steps = points.shape, points.shape[1] + 1 if steps is None else steps
        keys, (hidden, cell) = self._encode(points)
        keys = keys.repeat_interleave(beam, 0)
        hidden, cell = (t.repeat_interleave(beam, 1) for t in (hidden, cell))
        every = points.repeat_interleave(beam, 0)
        inputs = self.start.expand(batch * beam, 1, -1)
        allowed = torch.ones(batch * beam, n + 1, dtype=torch.bool, device=points.device)
        if once:
            allowed[:, n] = False
        total = points.new_full((batch, beam), -math.inf)
        total[:, 0] = 0.0
        found = torch.empty(batch * beam, 0, dtype=torch.long, device=points.device)
        first = torch.arange(batch, device=points.device).unsqueeze(1) * beam
        for _ in range(steps):
            d, (hidden, cell) = self.decoder(inputs, (hidden, cell))
            u = self.score(self.score.queries(d), keys)[:, 0, 0].masked_fill(~allowed, -math.inf)
            best, choice = (total.view(-1, 1) + u.log_softmax(-1)).view(batch, -1).topk(beam)
            total, parent, step = best, (first + choice // (n + 1)).view(-1), (choice % (n + 1)).view(-1)
            found = torch.cat([found[parent], step.unsqueeze(1)], 1)
            hidden, cell, allowed = hidden[:, parent], cell[:, parent], allowed[parent]
            ended = step == n
            if once:
                allowed = allowed.scatter(1, step.unsqueeze(1), False)
                allowed[:, n] = ~allowed[:, :n].any(1)
            allowed = torch.where(ended.unsqueeze(1), torch.arange(n + 1, device=points.device) == n, allowed)
            at = step.clamp(max=n - 1).view(-1, 1, 1).expand(-1, 1, width)
            inputs = every.gather(1, at)
        return found.view(batch, beam, -1)[:, 0]


@dataclass
class PointerCache:
    """Projected keys and the states that they point at, the decoded length, and the context's mask."""

    states: KVCache
    length: int
    mask: Mask | None
    cross: bool


@register(CARD)
class PointerAttention(Mechanism):
    """W_o (A z), A = softmax(v . tanh(W_1 z + W_2 x)).

    Args:
        dim: width of x and of the output.
        heads: 1 in the paper; more point at their own slices of z.
        context_dim: width of the context, dim unless given.
        hidden: width of the comparison for each head, dim / heads unless given.
    """

    network = PointerNetwork

    def __init__(self, dim: int, heads: int = 1, *, context_dim: int | None = None, hidden: int | None = None) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(self.context_dim % heads == 0, "heads", heads, f"a divisor of context_dim = {self.context_dim}")
        expect(hidden is None or hidden > 0, "hidden", hidden, "a positive int")
        self.heads = heads
        self.score = AdditiveScore(dim, self.context_dim, hidden or dim // heads, heads)
        self.out = nn.Linear(self.context_dim, dim)

    def log_probabilities(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | Tensor | None = None, causal: bool = False
    ) -> Float[Tensor, "batch heads n m"]:
        """log p, -inf where masked; its negative at the right position is the loss."""
        x, context, how = self._checked(x, context, mask, causal, None)
        q, k = self.score.queries(x), self.score.keys(context)
        keep = dense.visible(q, k, how.mask, how.triangular)
        scores = self.score(q, k)
        if keep is None:
            return scores.log_softmax(-1)
        # The finite floor keeps rows with nothing to point at, and their gradients, from being NaN.
        floor = torch.finfo(scores.dtype).min
        return scores.masked_fill(~keep, floor).log_softmax(-1).masked_fill(~keep, -math.inf)

    def point(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | Tensor | None = None, causal: bool = False
    ) -> Int[Tensor, "batch heads n"]:
        """The position that each query points at."""
        return self.weights(x, context, mask=mask, causal=causal).argmax(-1)

    def _values(self, context: Tensor) -> Tensor:
        return context.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, offset: int = 0) -> Tensor:
        n, m = q.shape[2], k.shape[2]

        def part(start: int, stop: int) -> Tensor:
            last = min(m, offset + stop) if causal else m
            rows, seen = q[:, :, start:stop], k[:, :, :last]
            keep = dense.visible(rows, seen, mask, causal, offset + start)
            return dense.softmax(self.score(rows, seen), keep) @ v[:, :, :last]

        if forced() == "reference":
            return part(0, n)
        return dense.by_rows(part, n, q.shape[0] * self.heads * m * q.shape[3])

    def _join(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))

    def _forward(self, x, context, how):
        q, k = self.score.queries(x), self.score.keys(context)
        return self._join(self._attend(q, k, self._values(context), how.mask, how.triangular))

    def _weights(self, x, context, how):
        q, k = self.score.queries(x), self.score.keys(context)
        return dense.softmax(self.score(q, k), dense.visible(q, k, how.mask, how.triangular))

    def _read(self, weights, x, context, how):
        return self._join(weights @ self._values(context))

    def _step(self, x, cache: PointerCache | None, context, how):
        if cache is None or not cache.cross:
            source = context if how.cross else x
            k, v = self.score.keys(source), self._values(source)
            states = KVCache.start(k, v) if cache is None else cache.states.append(k, v)
            cache = PointerCache(states, 0 if cache is None else cache.length, how.mask, how.cross)
        q = self.score.queries(x)
        y = self._attend(q, cache.states.keys, cache.states.values, cache.mask, not cache.cross, cache.length)
        return self._join(y), PointerCache(cache.states, cache.length + x.shape[1], cache.mask, cache.cross)
