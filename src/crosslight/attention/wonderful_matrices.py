"""Dynamic mask attention: each key says by its value how much it wants to be read, and only the keenest are kept.

Shi, Wu, "Wonderful Matrices: Combining for a More Efficient and Effective Foundation Model Architecture", 2024,
arXiv 2412.11834.

    q_i, k_j = R_i RMSNorm(W_q x_i), R_j RMSNorm(W_k z_j);    v_j = W_v z_j            R_i: rotation by position
    m_j  = exp(a softplus(W_dt v_j))                      (batch, groups, m), a learned for each group, 0 at first
    K_i  = the w keys with the largest m_j of those that i may read; of equal ones the later
    y_i  = W_o sum_j softmax_{j in K_i} (q_i . k_j / sqrt(d) + m_j) v_j

m_j travels in two more channels of the key (a number and what rounding took from it, as in half precision most m would
be equal), against ones in the query. In causal attention a key is not read any more once there are w better ones,
earlier or later. A full pass is then a scan over blocks of queries, each on the w keys that are left from before and
its own, as in dynamic-mask-attention; decoding keeps w keys.

The paper combines this with two more parts, which are here to be used beside it. `RotarySSD` is state space duality
whose C and B are rotated by position as q and k are, so that both kinds of layers know positions in one way:

    y_i = sum_{j <= i} exp(g_{j+1} + ... + g_i) (R_i C_i . R_j B_j) x_j

`CrossDomainMoE` is a gated MLP that all tokens share plus k of E tiny experts, found by product keys: with 2 sqrt(E)
router scores (r, c), expert (a, b) scores r_a + c_b; y = MLP(x) + sum_k softmax(score)_k act(u_k . x) o_k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core, head_width
from crosslight.attention.dynamic_mask_attention import attend, scan
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, linear, masks
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Rotary, Rotation
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CARD = Card(
    id="wonderful-matrices",
    kind="token",
    group="sparse",
    title="Wonderful Matrices: Combining for a More Efficient and Effective Foundation Model Architecture",
    year=2024,
    paper="2412.11834",
    code="LoserCheems/WonderfulMatrices",
    summary="A mask made from the values: a bias on each key, and only the keys with the largest ones are read.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n",
    mask="keys",
    decode="state",
    small={"keep_window": 24},
    checked="transformers' DogeAttention and DogeCDMoE with the same weights (1e-5); plain causal attention with a = 0",
    differs="Of keys with equal m the later ones are kept, where the released code leaves it to topk. The released "
    "router splits its scores so that tokens mix; here each token has its own. Key/value heads are called groups, as "
    "each has a mask of its own. The cost holds for a fixed w.",
    evidence=Evidence(
        claim="recalls many pairs better than plain rotary attention at a small width",
        task="zoology-mqar",
        metric="accuracy",
        margin=0.02,
        task_options={"length": 64, "pairs": 16, "vocab": 128},
        baseline_options={"position": "rope"},
    ),
)

#: Comparisons of keys that are held at a time.
CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Until(Mask):
    """Query i reads key j as long as i < until[b, h, j]."""

    until: Int[Tensor, "batch heads m"]

    def visible(self, b, h, i, j):
        return i < self.until[b, h, j]


def lifetimes(
    m: Float[Tensor, "batch groups m"], keep: Bool[Tensor, "batch m"] | None, window: int
) -> Int[Tensor, "batch groups m"]:
    """For each key the first position at which ``window`` keys beat it: larger ones, or equal ones that are later."""
    length = m.shape[2]
    place = torch.arange(length, device=m.device)
    rows = max(1, CHUNK // (m.shape[0] * m.shape[1] * length))
    parts = []
    for start in range(0, length, rows):
        here = slice(start, start + rows)
        own, other = m[:, :, here, None], m[:, :, None, :]
        beats = (other > own) | ((other == own) & (place > place[here, None]))
        if keep is not None:
            beats = beats & keep[:, None, None, :]
        parts.append((beats.cumsum(-1, dtype=torch.int32) < window).sum(-1))
    return torch.cat(parts, 2)


def size(k: Tensor) -> Float[Tensor, "batch groups m"]:
    """The m of keys that carry it."""
    wide = torch.promote_types(k.dtype, torch.float32)
    return k[..., -2].to(wide) + k[..., -1].to(wide)


def ranks(k: Tensor, keep: Bool[Tensor, "batch m"] | None) -> Float[Tensor, "batch groups m"]:
    """m without gradient, -inf where masked."""
    m = size(k.detach())
    return m if keep is None else m.masked_fill(~keep[:, None], -math.inf)


@dataclass
class Kept:
    """What decoding carries: the keys, with their m, and the values that may still be read."""

    k: Float[Tensor, "batch groups kept dim"]
    v: Float[Tensor, "batch groups kept value_dim"]


class DynamicMask(Core):
    """softmax(q k^T) v over the kept keys, of queries (batch, heads, n, width) that are scaled and end in two ones,
    and keys (batch, groups, m, width) that end in their m, in two parts."""

    grouped = True

    def __init__(self, heads: int, head_dim: int, keep_window: int = 2048) -> None:
        super().__init__(heads, head_dim)
        expect(isinstance(keep_window, int) and keep_window >= 1, "keep_window", keep_window, "a number >= 1")
        self.keep_window = keep_window

    def _best(self, rank: Float[Tensor, "batch groups m"]) -> Int[Tensor, "batch groups window"]:
        """The keys of which each query reads, where all may read all, in their order."""
        order = rank.flip(2).sort(dim=2, descending=True, stable=True).indices[..., : self.keep_window]
        return (rank.shape[2] - 1 - order).sort(2).values

    @torch.no_grad()
    def _rule(self, q: Tensor, k: Tensor, mask: Mask | None, causal: bool) -> Mask | None:
        keep = masks.split(mask)[1]
        if k.shape[2] <= self.keep_window:
            return mask
        if causal:
            until = lifetimes(size(k), keep, self.keep_window)
            return masks.join(Until(until.repeat_interleave(self.heads // k.shape[1], 1)), mask)
        best = self._best(ranks(k, keep))
        chosen = torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device).scatter(2, best, True)
        rows = dense.repeat_heads(chosen.unsqueeze(2), self.heads).expand(-1, -1, q.shape[2], -1)
        return masks.join(masks.Pairs(rows), mask)

    def forward(self, q, k, v, *, mask=None, causal=False):
        if forced() == "reference" or k.shape[2] <= self.keep_window:
            return attend(q, k, v, self._rule(q, k, mask, causal), causal)
        keep = masks.split(mask)[1]
        rank = ranks(k, keep)
        if causal:
            return scan(q, k, v, rank, self.keep_window, masked=keep is not None)[0]
        # All queries read the same keys, and no others are touched.
        best = self._best(rank)
        rule = None
        if keep is not None:
            held = keep[:, None].expand(-1, k.shape[1], -1).gather(2, best).unsqueeze(2)
            rule = masks.Pairs(dense.repeat_heads(held, self.heads).expand(-1, -1, q.shape[2], -1))
        return attend(q, _take(k, best), _take(v, best), rule)

    def weights(self, q, k, *, mask=None, causal=False):
        return dense.weights(q, k, mask=self._rule(q, k, mask, causal), causal=causal, scale=1.0)

    def step(self, q, k, v, state=None, **extra):
        if state is None and q.shape[2] > 1:
            y, state = self(q, k, v, causal=True), Kept(k, v)
        else:
            expect(q.shape[2] == 1, "x", f"{q.shape[2]} tokens", "one token at a time after the first call")
            state = Kept(k, v) if state is None else Kept(torch.cat([state.k, k], 2), torch.cat([state.v, v], 2))
            y = None
        if state.k.shape[2] > self.keep_window:
            best = self._best(ranks(state.k, None))
            state = Kept(_take(state.k, best), _take(state.v, best))
        return attend(q, state.k, state.v) if y is None else y, state


def _take(t: Tensor, index: Int[Tensor, "batch groups kept"]) -> Tensor:
    return t.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, t.shape[3]))


@register(CARD)
class DynamicMaskAttention(AttentionLayer):
    """Grouped rotary attention with a dynamic mask.

    Args:
        dim, heads, head_dim, context_dim, position: as in `AttentionLayer`; rotary unless given.
        groups: key/value heads, as many as heads unless given.
        bias: whether the projections have biases.
        keep_window: w, the number of keys that a query reads.
        eps: of the RMS norms of queries and keys.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        groups: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        position: str | nn.Module | None = "rope",
        keep_window: int = 2048,
        eps: float = 1e-6,
    ) -> None:
        core = DynamicMask(heads, head_width(dim, heads, head_dim), keep_window)
        super().__init__(core, dim, kv_heads=groups, context_dim=context_dim, bias=bias, position=position)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, eps=eps), nn.RMSNorm(self.head_dim, eps=eps)
        self.dt = nn.Linear(self.kv_heads * self.head_dim, self.kv_heads, bias)
        self.a = nn.Parameter(torch.zeros(self.kv_heads))

    def _queries(self, x):
        return self.q_norm(super()._queries(x))

    def _keys(self, context):
        return self.k_norm(super()._keys(context))

    def _heads(self, x, context, how, offset=0):
        q, k, v = super()._heads(x, context, how, offset)
        wide = torch.promote_types(v.dtype, torch.float32)
        bias = None if self.dt.bias is None else self.dt.bias.to(wide)
        dt = F.linear(v.transpose(1, 2).flatten(2).to(wide), self.dt.weight.to(wide), bias)
        m = (self.a.to(wide)[:, None] * F.softplus(dt.transpose(1, 2).contiguous())).exp().unsqueeze(-1)
        high = m.to(v.dtype)
        return self._open(q), torch.cat([k, self._filled(k), high, (m - high.to(wide)).to(v.dtype)], -1), v

    def _open(self, q: Tensor) -> Tensor:
        """Scaled, with the channels that meet m."""
        return torch.cat([q / math.sqrt(self.head_dim), self._filled(q), q.new_ones(()).expand(*q.shape[:3], 2)], -1)

    def _filled(self, t: Tensor) -> Tensor:
        """Zeros up to a multiple of 8 channels with those of m: CUDA's kernels take a mask at such widths only."""
        return t.new_zeros(()).expand(*t.shape[:3], -(self.head_dim + 2) % 8)

    def _step(self, x, cache, context, how):
        if not how.cross or cache is None:
            return super()._step(x, cache, context, how)
        q = self._queries(x)
        if isinstance(self.position, Rotation):
            q = self.position.rotate(q, offset=cache.length)
        k, v, mask = cache.state
        y = self.core(self._open(q), k, v, mask=mask)
        return self._merge(y, x), type(cache)(cache.length + x.shape[1], cache.state, True)


class RotarySSD(nn.Module):
    """State space duality with rotated C and B, in its chunked, quadratic and recurrent form.

    c and b are (batch, heads, n, state), x (batch, heads, n, d), log_decay (batch, heads, n), none positive.
    """

    def __init__(self, state: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.rotary = Rotary(state, base)

    def forward(self, c: Tensor, b: Tensor, x: Tensor, log_decay: Tensor) -> Tensor:
        return linear.attend(self.rotary.rotate(c), self.rotary.rotate(b), x, causal=True, log_decay=log_decay)

    def weights(self, c: Tensor, b: Tensor, log_decay: Tensor) -> Tensor:
        """The matrix whose product with x `forward` gives."""
        return linear.weights(self.rotary.rotate(c), self.rotary.rotate(b), causal=True, log_decay=log_decay)

    def step(
        self, c: Tensor, b: Tensor, x: Tensor, log_decay: Tensor, state: linear.LinearState | None = None
    ) -> tuple[Tensor, linear.LinearState]:
        """The next token, with n = 1, and the state after it."""
        place = 0 if state is None else state.length
        c, b = self.rotary.rotate(c, offset=place), self.rotary.rotate(b, offset=place)
        return linear.step(c, b, x, state, log_decay=log_decay)


class CrossDomainMoE(nn.Module):
    """A shared gated MLP plus the best of many experts of one hidden unit each: (..., dim) -> (..., dim).

    Args:
        hidden: inner width of the shared MLP.
        experts: a square number.
        top: experts that a token uses.
    """

    def __init__(self, dim: int, hidden: int, experts: int = 16384, top: int = 64) -> None:
        super().__init__()
        self.side, self.top = math.isqrt(max(experts, 0)), top
        expect(experts > 0 and self.side**2 == experts, "experts", experts, "a square number")
        expect(0 < top <= experts, "top", top, f"1 to the {experts} experts")
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.router = nn.Linear(dim, 2 * self.side, bias=False)
        self.read, self.write = nn.Embedding(experts, dim), nn.Embedding(experts, dim)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the ``top`` experts, the best first: a sum among the best has both terms among them."""
        rows, columns = self.router(x).unflatten(-1, (2, self.side)).topk(min(self.top, self.side), -1)
        scores = (rows[..., 0, :, None] + rows[..., 1, None, :]).flatten(-2)
        numbers = (columns[..., 0, :, None] * self.side + columns[..., 1, None, :]).flatten(-2)
        best, place = scores.topk(self.top, -1)
        return best, numbers.gather(-1, place)

    def forward(self, x: Tensor) -> Tensor:
        scores, numbers = self.route(x)
        unit = F.silu((self.read(numbers) @ x.unsqueeze(-1)).squeeze(-1)) * scores.softmax(-1)
        routed = (unit.unsqueeze(-2) @ self.write(numbers)).squeeze(-2)
        return self.down(F.silu(self.gate(x)) * self.up(x)) + routed
