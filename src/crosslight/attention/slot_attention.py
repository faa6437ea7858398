"""Slot attention: a few slots compete for the inputs, and refine what they have won over several rounds.

Locatello et al., "Object-Centric Learning with Slot Attention", 2020, arXiv 2006.15055.

    slots ~ N(mu, diag(sigma^2))                                   (batch, slots, dim), mu and sigma learned
    k, v = W_k LN(z), W_v LN(z)                                    (batch, m, dim)
    repeat `iterations` times:
        B_ij = softmax over slots i of W_q LN(slots_i) . k_j / sqrt(dim), plus eps
        A_ij = B_ij / sum_j B_ij                                   (batch, 1, slots, m)
        slots = GRU(A v, slots);  slots = slots + MLP(LN(slots))
    y = slots

The softmax runs over the slots, so each input is shared out among them; plain attention would let all slots read the
same inputs. The slots share all parameters and differ only in how they start: permuting the starts permutes the
output, and their number may change after training. ``attn(None, context=z)`` draws the slots, also in eval mode, as
the paper does; ``attn(x, context=z)`` starts from x.

Several rounds with a GRU are not linear in the values. `weights` is the matrix of the last round and `read` does the
last round with the given matrix, so that read(weights) is still the output for a given x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crosslight.attention.base import Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

CARD = Card(
    id="slot-attention",
    kind="token",
    group="slots",
    title="Object-Centric Learning with Slot Attention",
    year=2020,
    paper="2006.15055",
    code="google-research/google-research",
    summary="A few exchangeable slots compete for the inputs by a softmax over slots, in several GRU rounds.",
    patterns=("noncausal-cross",),
    why_not="Slots have no order and read a context in full, in rounds.",
    cost="n",
    mask="keys",
    linear_in_values=False,
    checked="the slot-attention package (lucidrains) with the same weights",
    differs="The projections have no biases, as in the authors' code; heads > 1 lets the slots compete in each head "
    "by itself, which the paper does not do.",
    evidence=Evidence(
        claim="Separates generated shapes without labels, where the same layer with a softmax over inputs does not",
        task="shapes-ari",
        metric="ari",
        margin=0.3,
        options={"slots": 4},
        baseline="slot-attention",
        baseline_options={"slots": 4, "compete": False},
    ),
)


@register(CARD)
class SlotAttention(Mechanism):
    """(batch, slots, dim) slots that have read (batch, m, context_dim).

    Args:
        dim: width of the slots.
        heads: heads in which the slots compete; 1 in the paper.
        context_dim: width of the inputs, dim unless given.
        slots: how many are drawn where x is None.
        iterations: rounds.
        mlp_hidden: inner width of the MLP, 2 dim unless given.
        eps: added to the shares before they are normalised over the inputs.
        compete: False is the ablation: a plain softmax over the inputs.
    """

    learned_queries = True

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        context_dim: int | None = None,
        slots: int = 7,
        iterations: int = 3,
        mlp_hidden: int | None = None,
        eps: float = 1e-8,
        compete: bool = True,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(slots > 0, "slots", slots, "a positive int")
        expect(iterations > 0, "iterations", iterations, "a positive int")
        self.heads, self.slots, self.iterations, self.eps, self.compete = heads, slots, iterations, eps, compete
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)))
        self.log_deviation = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)))
        self.norm_context, self.norm_slots, self.norm_mlp = (
            nn.LayerNorm(width) for width in (self.context_dim, dim, dim)
        )
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(self.context_dim, dim, bias=False)
        self.v = nn.Linear(self.context_dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        hidden = 2 * dim if mlp_hidden is None else mlp_hidden
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _start(self, x: Tensor | None, context: Tensor) -> Tensor:
        if x is not None:
            return x
        noise = torch.randn(context.shape[0], self.slots, self.dim, dtype=self.mean.dtype, device=context.device)
        return self.mean + self.log_deviation.exp() * noise

    def _shares(self, slots: Tensor, k: Tensor, keep: Tensor | None) -> Tensor:
        """The matrix of one round: what each slot takes of each input, (batch, heads, slots, m)."""
        scores = dense.scores(self._split(self.q(self.norm_slots(slots))), k)
        seen = None if keep is None else keep[:, None, None, :]
        if not self.compete:
            return dense.softmax(scores, seen)
        shares = scores.softmax(2) + self.eps
        if seen is not None:
            shares = shares.masked_fill(~seen, 0.0)
        return shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)

    def _update(self, slots: Tensor, shares: Tensor, v: Tensor) -> Tensor:
        read = (shares @ v).transpose(1, 2).flatten(2)
        slots = self.gru(read.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, slots.shape[:2])
        return slots + self.mlp(self.norm_mlp(slots))

    def _last_round(self, x: Tensor | None, context: Tensor, how) -> tuple[Tensor, Tensor, Tensor]:
        """The slots before the last round, the matrix of that round, and the values."""
        z = self.norm_context(context)
        k, v, keep = self._split(self.k(z)), self._split(self.v(z)), masks.split(how.mask)[1]
        slots = self._start(x, context)
        for _ in range(self.iterations - 1):
            slots = self._update(slots, self._shares(slots, k, keep), v)
        return slots, self._shares(slots, k, keep), v

    def _forward(self, x, context, how):
        return self._update(*self._last_round(x, context, how))

    def _weights(self, x, context, how):
        return self._last_round(x, context, how)[1]

    def _read(self, weights, x, context, how):
        slots, _, v = self._last_round(x, context, how)
        return self._update(slots, weights, v)
