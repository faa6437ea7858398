"""Tree cross attention: each query walks down a tree over the context and reads what it meets, O(log m) nodes.

Feng, Tung, Hajimirsadeghi, Bengio, Ahmed, "Tree Cross Attention", 2023, arXiv 2309.17388.

The m tokens, in their order, are the leaves of a tree: branch factor b, depth k = floor(log_b(m - 1)), and
P = ceil(m / b^k) leaves below each last node.

    node = mean over its children c of Transformer(c_1, ..., c_b)             bottom-up, one aggregator for all levels
    a_h  = softmax over the b children of q_ih . k_c / sqrt(d)                at each node on the way down
    next = argmax_c mean_h a_h        in training drawn from mean_h a_h;      the others go into S_i
    S_i  = the rejected children of all levels, and the P leaves at the end   |S_i| = (b - 1) k + P
    y_i  = W_o softmax_{s in S_i}(q_i . k_s / sqrt(d)) v_s                    k and v are projections of the nodes

Every token is a leaf below exactly one node of S_i. `weights` shares what a node gets out evenly among the leaves below
it, and `read` sums it up again. The aggregator sees its children detached unless ``bptt``.

The walk has no gradient; `retrieve` gives what the paper trains it with: the output over all leaves (the same loss
again) and the log-probability of the way and its entropy (REINFORCE). Tokens should come in an order in which
neighbours belong together: time, a sorted coordinate. A context of b tokens or fewer is read by plain attention. The
tree is in at least float32, as rounding would choose another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.attention.backbone import Mlp
from crosslight.attention.base import Mechanism
from crosslight.attention.precision import in_full, widened
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Keep = Bool[Tensor, "batch m"]

CARD = Card(
    id="tree-cross-attention",
    kind="token",
    group="sparse",
    title="Tree Cross Attention",
    year=2023,
    paper="2309.17388",
    code="BorealisAI/tree-cross-attention",
    summary="Each query walks down a tree over the context and reads the summaries it passes, O(log m) nodes.",
    patterns=("noncausal-self", "noncausal-cross", "causal-cross"),
    why_not="The tree holds the whole context: a stream that reads its own past would need a tree for every token.",
    cost="n log n",
    mask="keys",
    decode="state",
    small={"bptt": True},
    checked="the walk written out query by query; the selected nodes partition the context; plain attention at b >= m",
    differs="Pre-norm of the queries, the residual and the MLP after it are the caller's, and the residual of the "
    "aggregator adds its input, where the released one adds the normalised input; its MLP is a GELU one, theirs is "
    "gated. Empty places of the tree are masked, not filled with other tokens.",
    evidence=Evidence(
        claim="copies about as well as full cross-attention from 6 of 32 tokens (here without the policy loss)",
        task="copy",
        metric="accuracy",
        margin=-0.05,
    ),
)


#: Queries that walk at a time, at least, and parents that are made at a time. What a query meets, 2 b log_b m rows, and
#: what the aggregator computes on the way are not kept, but computed again for the gradient.
QUERIES, PARENTS = 2048, 2048


@dataclass
class Level:
    """The nodes of one level: keys and values, and how many tokens are below each."""

    k: Heads
    v: Heads
    count: Float[Tensor, "batch nodes"]


@dataclass
class Walk:
    """What a query met at one level: children by number, their scores, and which of them are in S."""

    child: Int[Tensor, "batch n children"]
    scores: Float[Tensor, "batch heads n children"]
    read: Bool[Tensor, "batch n children"]
    #: Log-probability of the child that was taken, and entropy of the choice; None at the leaves.
    log_prob: Float[Tensor, "batch n"] | None = None
    entropy: Float[Tensor, "batch n"] | None = None


@dataclass
class Retrieved:
    """An output with what its walk is trained by.

    Attributes:
        y: the output.
        leaves: the output of the same query over all tokens, for the same loss (w_ca, 1 in the paper).
        log_prob, entropy: of each query's way down.
    """

    y: Stream
    leaves: Stream
    log_prob: Float[Tensor, "batch n"]
    entropy: Float[Tensor, "batch n"]

    def policy_loss(self, reward: Float[Tensor, "batch n"], entropy_weight: float = 0.01) -> Tensor:
        """REINFORCE with an entropy bonus; the reward is an accuracy or a log-likelihood (w_rl, 1 in the paper)."""
        return -(self.log_prob * reward.detach()).mean() - entropy_weight * self.entropy.mean()


@dataclass
class Planted:
    """What decoding carries: the tree of the context."""

    levels: list[Level]
    cross: bool = True


class Aggregator(nn.Module):
    """Children (nodes, children, dim) -> their parents (nodes, dim): the mean after Transformer layers."""

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.attend = nn.ModuleList(Softmax.build(dim, heads) for _ in range(layers))
        self.mlp = nn.ModuleList(Mlp(dim, 2 * dim) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers))

    def forward(self, x: Tensor, keep: Bool[Tensor, "nodes children"]) -> Tensor:
        for i, (attend, mlp) in enumerate(zip(self.attend, self.mlp, strict=True)):
            x = x + attend(self.norms[2 * i](x), mask=keep)
            x = x + mlp(self.norms[2 * i + 1](x))
        there = keep.unsqueeze(-1).to(x.dtype)
        return (x * there).sum(1) / there.sum(1).clamp(min=1)


@register(CARD)
class TreeCrossAttention(Mechanism):
    """x (batch, n, dim) reads context (batch, m, context_dim).

    Args:
        branch: b, children of a node.
        layers: Transformer layers of the aggregator.
        bptt: whether gradients run through the aggregation from level to level.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        context_dim: int | None = None,
        branch: int = 2,
        layers: int = 1,
        bptt: bool = False,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "dim", dim, f"a multiple of heads = {heads}")
        expect(self.context_dim % heads == 0, "context_dim", self.context_dim, f"a multiple of heads = {heads}")
        expect(isinstance(branch, int) and branch >= 2, "branch", branch, "a number >= 2")
        expect(isinstance(layers, int) and layers >= 1, "layers", layers, "a number >= 1")
        self.heads, self.branch, self.bptt = heads, branch, bptt
        self.scale = math.sqrt(heads / dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k, self.v = (nn.Linear(self.context_dim, dim, bias=False) for _ in range(2))
        self.out = nn.Linear(dim, dim)
        self.aggregate = Aggregator(self.context_dim, heads, layers)

    def depth(self, m: int) -> int:
        """k: levels of inner nodes below the root over m tokens."""
        k = 0
        while self.branch ** (k + 1) <= m - 1:
            k += 1
        return k

    def _split(self, t: Stream) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _level(self, nodes: Tensor, count: Tensor) -> Level:
        return Level(self._split(in_full(self.k, nodes)), self._split(in_full(self.v, nodes)), count)

    def _grow(self, context: Tensor, mask: masks.Mask | None) -> list[Level]:
        """The tree, from the root's children to the leaves."""
        keep = masks.split(mask)[1]
        keep = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device) if keep is None else keep
        m, last = context.shape[1], self.branch ** self.depth(context.shape[1])
        short = -m % last
        nodes = F.pad(context, (0, 0, 0, short)).to(widened(context.dtype))
        count = F.pad(keep, (0, short)).to(nodes.dtype)
        levels = [self._level(nodes, count)]
        children = nodes.shape[1] // last
        for _ in range(self.depth(m)):
            below, counts = nodes.unflatten(1, (-1, children)), count.unflatten(1, (-1, children))
            below = below if self.bptt else below.detach()
            nodes = _in_parts(self._parents, PARENTS, below.flatten(0, 1), counts.flatten(0, 1) > 0, dim=0)
            nodes = nodes.unflatten(0, below.shape[:2])
            count, children = counts.sum(2), self.branch
            levels.append(self._level(nodes, count))
        return levels[::-1]

    def _parents(self, children: Tensor, keep: Tensor) -> Tensor:
        return in_full(self.aggregate, children, keep)

    def _walk(self, q: Heads, levels: list[Level], draw: bool) -> Iterator[Walk]:
        """Down the tree, level by level."""
        batch, _, n, _ = q.shape
        at = torch.zeros(batch, n, dtype=torch.long, device=q.device)
        before = 1
        for depth, level in enumerate(levels, 1):
            children = level.k.shape[2] // before
            before = level.k.shape[2]
            child = at.unsqueeze(-1) * children + torch.arange(children, device=q.device)
            scores = (q.unsqueeze(3) * _taken(level.k, child)).sum(-1) * self.scale
            there = level.count.gather(1, child.flatten(1)).view_as(child) > 0
            if depth == len(levels):
                yield Walk(child, scores, there)
                return
            p = dense.softmax(scores, there.unsqueeze(1))
            tiny = torch.finfo(p.dtype).tiny
            entropy, p = -(p * p.clamp(min=tiny).log()).sum(-1).mean(1), p.mean(1)
            with torch.no_grad():
                odds = p
                if draw:  # the largest of p / exponential noise is a draw from p
                    odds = p / torch.empty_like(p).exponential_().clamp(min=tiny)
                taken = odds.argmax(-1, keepdim=True)
                others = there & (torch.arange(children, device=q.device) != taken)
                at = child.gather(2, taken).squeeze(-1)
            yield Walk(child, scores, others, p.gather(2, taken).squeeze(-1).clamp(min=tiny).log(), entropy)

    def _shares(self, walks: list[Walk]) -> tuple[Tensor, ...]:
        """The attention over S, in the parts of the levels."""
        scores = torch.cat([walk.scores for walk in walks], -1)
        read = torch.cat([walk.read for walk in walks], -1).unsqueeze(1)
        return dense.softmax(scores, read).split([walk.scores.shape[-1] for walk in walks], -1)

    def _joined(self, shares: tuple[Tensor, ...], walks: list[Walk], levels: list[Level]) -> Stream:
        y: Any = 0
        for share, walk, level in zip(shares, walks, levels, strict=True):
            y = y + (share.unsqueeze(-2) @ _taken(level.v, walk.child)).squeeze(-2)
        return self._out(y)

    def _out(self, y: Heads) -> Stream:
        return self.out(y.transpose(1, 2).flatten(2).to(self.out.weight.dtype))

    def _queries(self, x: Stream) -> Heads:
        return self._split(in_full(self.q, x))

    def _ask(self, x: Stream, levels: list[Level]) -> Stream:
        def part(x: Stream) -> Stream:
            walks = list(self._walk(self._queries(x), levels, self.training))
            return self._joined(self._shares(walks), walks, levels)

        return _in_parts(part, max(QUERIES, x.shape[1] // 16), x, dim=1)

    def _forward(self, x, context, how):
        return self._ask(x, self._grow(context, how.mask))

    def retrieve(
        self, x: Stream, context: Tensor | None = None, *, mask: Keep | None = None, draw: bool = True
    ) -> Retrieved:
        """The output with what trains the walk; drawn, or the best child at each node."""
        x, context, how = self._checked(x, context, mask, False, None)
        levels, q = self._grow(context, how.mask), self._queries(x)
        walks = list(self._walk(q, levels, draw))
        keep = levels[-1].count > 0
        leaves = dense.attend(q, levels[-1].k, levels[-1].v, mask=masks.keys(keep), scale=self.scale)
        none = q.new_zeros(1, *x.shape[:2])  # a tree without inner nodes leaves nothing to choose
        log_prob = torch.cat([none, *(w.log_prob[None] for w in walks if w.log_prob is not None)]).sum(0)
        entropy = torch.cat([none, *(w.entropy[None] for w in walks if w.entropy is not None)]).sum(0)
        return Retrieved(
            self._joined(self._shares(walks), walks, levels),
            self._out(leaves),
            log_prob,
            entropy / max(1, len(walks) - 1),
        )

    def _weights(self, x, context, how):
        levels = self._grow(context, how.mask)
        walks = list(self._walk(self._queries(x), levels, self.training))
        leaves = (levels[-1].count > 0).to(widened(x.dtype))
        full = leaves.new_zeros(x.shape[0], self.heads, x.shape[1], leaves.shape[1])
        for share, walk, level in zip(self._shares(walks), walks, levels, strict=True):
            index = walk.child.unsqueeze(1).expand_as(share)
            table = share.new_zeros(*share.shape[:3], level.count.shape[1]).scatter(-1, index, share)
            table = table / level.count.clamp(min=1)[:, None, None]
            full = full + table.repeat_interleave(leaves.shape[1] // level.count.shape[1], -1)
        return (full * leaves[:, None, None])[..., : context.shape[1]].to(x.dtype)

    def _read(self, weights, x, context, how):
        levels = self._grow(context, how.mask)
        walks = list(self._walk(self._queries(x), levels, self.training))
        weights = weights.to(widened(weights.dtype))
        weights = F.pad(weights, (0, levels[-1].count.shape[1] - weights.shape[-1]))
        shares = []
        for walk, level in zip(walks, levels, strict=True):
            table = weights.unflatten(-1, (level.count.shape[1], -1)).sum(-1)
            share = table.gather(-1, walk.child.unsqueeze(1).expand(-1, self.heads, -1, -1))
            shares.append(share * walk.read.unsqueeze(1).to(share.dtype))
        return self._joined(tuple(shares), walks, levels)

    def _step(self, x, cache, context, how):
        cache = Planted(self._grow(context, how.mask)) if cache is None else cache
        return self._ask(x, cache.levels), cache


def _in_parts(function: Callable[..., Tensor], size: int, *tensors: Tensor, dim: int) -> Tensor:
    """``function`` of ``size`` slices at a time; of several, what it keeps for the gradient is computed again."""
    if tensors[0].shape[dim] <= size:
        return function(*tensors)
    parts = zip(*(t.split(size, dim) for t in tensors), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts], dim)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts], dim)


def _taken(
    t: Float[Tensor, "batch heads nodes head_dim"], child: Int[Tensor, "batch n children"]
) -> Float[Tensor, "batch heads n children head_dim"]:
    """The nodes that each query meets."""
    batch, heads, nodes, _ = t.shape
    head = torch.arange(batch * heads, device=t.device).view(batch, heads, 1) * nodes
    rows = (head + child.flatten(1).unsqueeze(1)).flatten()
    # Whole rows: many times faster on a CPU than a gather by element.
    return t.flatten(0, 2).index_select(0, rows).view(batch, heads, *child.shape[1:], t.shape[3])
