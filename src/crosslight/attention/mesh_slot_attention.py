"""Slot attention by optimal transport: inputs and slots share a Sinkhorn plan whose entropy is minimised (MESH).

Zhang, Zhang, Lacoste-Julien, Burghouts and Snoek, "Unlocking Slot Attention by Changing Optimal Transport Costs", 2023,
arXiv 2301.13197.

    z = LN(context);  k, v = W_k z, W_v z;  a = s softmax over inputs of MLP(z)          s = scale, the number of slots
    repeat `iterations` times:
        q = W_q LN(slots);  b = s softmax over slots of MLP(LN(slots))
        C_0 = cost(q, k) + 0.001 noise                                                   (batch, heads, slots, m)
        C_t+1 = C_t - lr g / ||g||,  g = dH/dC of H = mean entropy of sinkhorn(C_t, a, b)       `mesh_steps` times
        T = sinkhorn(C, a, b)
        slots = GRU(T v, slots);  slots = slots + MLP(LN(slots))

    sinkhorn(C, a, b):  u = log a - lse over slots of (v - C),  v = log b - lse over inputs of (u - C), 5 times;
        T = exp(u + v - C), each call starting from the last u and v

A softmax over slots is transport with one marginal. Here the slots have one as well, and the plan is nearly that
without entropy, so that two slots in one place still part: the noise breaks the tie. It is drawn anew in training; in
eval mode it is one fixed pattern over slots and inputs, so that the output is a function of the input.

The gradient g is written out (`entropy_slope`), as a step of an algorithm that autograd differentiates like any other.
As for slot attention, `weights` is the matrix of the last round. T is not normalised: its rows sum to b.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosslight.attention.slot_attention import SlotAttention
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Plan = Float[Tensor, "batch heads slots m"]
    Inputs = Float[Tensor, "batch #heads 1 m"]
    Slots = Float[Tensor, "batch #heads slots 1"]

Cost = Literal["cosine", "dot", "l2"]

CARD = Card(
    id="mesh-slot-attention",
    kind="token",
    group="slots",
    title="Unlocking Slot Attention by Changing Optimal Transport Costs",
    year=2023,
    paper="2301.13197",
    code="davzha/MESH",
    summary="Slot attention whose shares are a transport plan between inputs and slots, made nearly hard.",
    patterns=("noncausal-cross",),
    why_not="Slots have no order and read a context in full, in rounds.",
    cost="n",
    mask="keys",
    linear_in_values=False,
    checked="the authors' algorithm with the entropy's gradient from autograd; scipy's linear_sum_assignment",
    differs="The released code takes the gradient steps as constants in the backward pass (`straight_through`). Its "
    "configuration has cost='l2' and mesh_lr=8; its dot product has the other sign, which W_q can learn. Noise in eval "
    "mode is a fixed pattern. heads > 1 makes a plan in each head, which the paper does not do.",
    evidence=Evidence(
        claim="Separates generated shapes without labels better than slot attention",
        task="shapes-ari",
        metric="ari",
        margin=0.0,
        options={"slots": 4},
        baseline="slot-attention",
        baseline_options={"slots": 4},
        budget={"steps": 600},
    ),
)

#: Least share of an input or a slot, so that logarithms stay finite.
LEAST = 1e-30


def sinkhorn(
    cost: Plan, log_a: Inputs, log_b: Slots, u: Tensor | None = None, v: Tensor | None = None, rounds: int = 5
) -> tuple[Plan, list[Tensor], list[Tensor]]:
    """The plan with marginals a over inputs and b over slots, and u and v of each round, the start of v before them."""
    us, vs = [], [torch.zeros_like(log_b) if v is None else v]
    for _ in range(rounds):
        us.append(log_a - (vs[-1] - cost).logsumexp(-2, keepdim=True))
        vs.append(log_b - (us[-1] - cost).logsumexp(-1, keepdim=True))
    return (us[-1] + vs[-1] - cost).exp(), us, vs


def entropy_slope(cost: Plan, plan: Plan, log_a: Inputs, log_b: Slots, us: list[Tensor], vs: list[Tensor]) -> Plan:
    """dH/dC of H = mean(-T log T), T clamped to [1e-20, 1], back through the rounds of `sinkhorn`."""
    inside = (plan >= 1e-20) & (plan <= 1)
    by_log = torch.where(inside, -plan * (plan.clamp(min=1e-20).log() + 1), 0.0) / (plan.shape[-2] * plan.shape[-1])
    by_u, by_v, slope = by_log.sum(-2, keepdim=True), by_log.sum(-1, keepdim=True), -by_log
    for u, v, before in zip(reversed(us), reversed(vs[1:]), reversed(vs[:-1]), strict=True):
        through = by_v * (u - cost + v - log_b).exp()  # the softmax over inputs, inside v
        slope = slope + through
        by_u = by_u - through.sum(-2, keepdim=True)
        through = by_u * (before - cost + u - log_a).exp()  # the softmax over slots, inside u
        slope = slope + through
        by_u, by_v = torch.zeros_like(by_u), -through.sum(-1, keepdim=True)
    return slope


def mesh(
    cost: Plan,
    log_a: Inputs,
    log_b: Slots,
    *,
    steps: int = 4,
    lr: float = 1.0,
    rounds: int = 5,
    straight_through: bool = False,
) -> Plan:
    """The Sinkhorn plan of the cost after steps that lower the plan's entropy; ties must be broken already."""
    v = None
    for _ in range(steps):
        plan, us, vs = sinkhorn(cost, log_a, log_b, v=v, rounds=rounds)
        slope = entropy_slope(cost, plan, log_a, log_b, us, vs)
        if straight_through:
            slope = slope.detach()
        norm = torch.linalg.vector_norm(slope, dim=(-2, -1), keepdim=True)
        cost, v = cost - lr * slope / norm.clamp(min=1e-12), vs[-1]
    return sinkhorn(cost, log_a, log_b, v=v, rounds=rounds)[0]


@register(CARD)
class MeshSlotAttention(SlotAttention):
    """(batch, slots, dim) slots that have read (batch, m, context_dim).

    Args:
        dim, heads, context_dim, slots, iterations, mlp_hidden: as for slot attention.
        cost: of giving an input to a slot: "cosine" (1 - their cosine), "dot" (-q.k / sqrt(d)) or "l2".
        mesh_steps: steps on the cost; 0 is plain Sinkhorn.
        mesh_lr: their length.
        sinkhorn_rounds: rounds of each Sinkhorn.
        noise: size of the noise that breaks ties.
        scale: s, what the inputs bring and the slots take in all; the number of slots unless given.
        straight_through: treat the steps as constants in the backward pass.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        slots: int = 7,
        iterations: int = 3,
        mlp_hidden: int | None = None,
        cost: Cost = "cosine",
        mesh_steps: int = 4,
        mesh_lr: float = 1.0,
        sinkhorn_rounds: int = 5,
        noise: float = 0.001,
        scale: float | None = None,
        straight_through: bool = False,
    ) -> None:
        super().__init__(dim, heads, context_dim=context_dim, slots=slots, iterations=iterations, mlp_hidden=mlp_hidden)
        expect(cost in get_args(Cost), "cost", repr(cost), f"one of {', '.join(get_args(Cost))}")
        expect(mesh_steps >= 0, "mesh_steps", mesh_steps, "a number >= 0")
        expect(sinkhorn_rounds > 0, "sinkhorn_rounds", sinkhorn_rounds, "a positive int")
        self.cost, self.noise, self.scale = cost, noise, scale
        self.mesh = partial(
            mesh, steps=mesh_steps, lr=mesh_lr, rounds=sinkhorn_rounds, straight_through=straight_through
        )
        hidden = 2 * dim if mlp_hidden is None else mlp_hidden
        self.share_inputs, self.share_slots = (
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1, bias=False))
            for width in (self.context_dim, dim)
        )

    def _noise(self, slots: Tensor, m: int) -> Tensor:
        """(batch or 1, 1, slots, m)."""
        if self.training:
            shape = (slots.shape[0], 1, slots.shape[1], m)
            return self.noise * torch.randn(shape, dtype=slots.dtype, device=slots.device)
        i, j = torch.arange(slots.shape[1], device=slots.device), torch.arange(m, device=slots.device)
        mixed = ((i[:, None] + 1) * 31153) ^ ((j + 1) * 40503)
        return self.noise * ((mixed % 8191).to(slots.dtype) / 4096 - 1)[None, None]

    def _costs(self, q: Tensor, k: Tensor) -> Plan:
        if self.cost == "l2":
            return torch.cdist(q, k)
        if self.cost == "dot":
            return -(q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return 1 - F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)

    def _plan(self, slots: Tensor, k: Tensor, log_a: Inputs, noise: Tensor, seen: Tensor | None) -> Plan:
        """The matrix of one round: what each slot takes of each input."""
        asking = self.norm_slots(slots)
        cost = self._costs(self._split(self.q(asking)), k).to(log_a.dtype)
        share = self.share_slots(asking).to(log_a.dtype).softmax(1) * (self.scale or slots.shape[1])
        plan = self.mesh(cost + noise, log_a, share.clamp(min=LEAST).log()[:, None])
        return plan if seen is None else plan.masked_fill(~seen, 0.0)

    def _last_round(self, x, context, how):
        z, keep = self.norm_context(context), masks.split(how.mask)[1]
        k, v, slots = self._split(self.k(z)), self._split(self.v(z)), self._start(x, context)
        seen = None if keep is None else keep[:, None, None, :]
        # At least float32: the plan is made of differences of logarithms.
        logits = self.share_inputs(z).to(torch.promote_types(z.dtype, torch.float32)).mT[:, None]
        if seen is not None:
            logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        log_a = (logits.softmax(-1) * (self.scale or slots.shape[1])).clamp(min=LEAST).log()
        noise = self._noise(slots.to(log_a.dtype), z.shape[1])
        for i in range(self.iterations):
            # The many small steps of a plan are made again in the backward pass: kept, they were most of the memory.
            plan = checkpoint(self._plan, slots, k, log_a, noise, seen, use_reentrant=False, preserve_rng_state=False)
            plan = plan.to(v.dtype)
            if i < self.iterations - 1:
                slots = self._update(slots, plan, v)
        return slots, plan, v
