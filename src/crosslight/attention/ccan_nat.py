"""Context-aware cross-attention: each query reads all of the source, and once more what is near its best match.

Ding, Wang, Wu, Tao and Tu, "Context-Aware Cross-Attention for Non-Autoregressive Translation", 2020, arXiv 2011.00770.

    psi = Q K^T / sqrt(d)                                               (batch, heads, n, m)
    A_global = softmax_j psi_ij
    A_local  = softmax_j psi_ij over |j - c_i| <= w, 0 elsewhere        c_i = argmax_j psi_ij, the peak of the query
    g_i = sigmoid(W_g Q_i)                                              one number a query and head
    A = g A_local + (1 - g) A_global,    y = W_o [A_1 V_1 ; ... ; A_h V_h]

Both softmaxes take the same scores, so that the gate's d + 1 numbers, shared by the heads, are all that is added. The
paper puts it into the lower cross-attention layers of a decoder that predicts all tokens at once (Mask-Predict), whose
cross-attention is too diffuse without. The window is centred on what the query matches best and, with
``centre="position"``, on the token at the query's own position (the last one, where the source is shorter). The
position of the peak has no gradient. Rows sum to 1, or to 1 - g where all of a position's window is masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.engines.backend import forced
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]

Centre = Literal["peak", "position"]

CARD = Card(
    id="ccan-nat",
    kind="token",
    group="scores",
    title="Context-Aware Cross-Attention for Non-Autoregressive Translation",
    year=2020,
    paper="2011.00770",
    code="alphadl/CCAN",
    summary="Mixes attention over everything with attention inside a window around each query's peak, by a gate.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    small={"radius": 2},
    checked="torch.nn.MultiheadAttention with the gate closed, or with a window of the whole source; the formulas "
    "query by query",
    differs="The paper is noncausal cross-attention; the other patterns are ours. The window follows the authors' "
    "code, which centres it on the peak; its default reach, 3, and the gate from the scaled query are the code's too. "
    "There the gate g weighs the global part: ours is 1 - g of it.",
    evidence=Evidence(
        claim="A decoder that reads a window around its best match beside all of the source copies it better",
        task="copy",
        metric="accuracy",
        margin=0.01,
    ),
)


class ContextAwareLayer(AttentionLayer):
    """The layer around `ContextAware`, whose windows may depend on the position of the query in decoding."""

    def _offset(self, extra: dict[str, Any], length: int) -> dict[str, Any]:
        return super()._offset(extra, length) | {"offset": length}


@register(CARD)
class ContextAware(Core):
    """(g A_local + (1 - g) A_global) v; q (batch, heads, n, d), k and v (batch, heads, m, d).

    Args:
        radius: w, how far the window reaches to each side.
        centre: "peak", the key with the query's highest score, or "position", the key at the query's position.
    """

    takes_bias = True
    layer = ContextAwareLayer

    def __init__(self, heads: int, head_dim: int, *, radius: int = 3, centre: Centre = "peak") -> None:
        super().__init__(heads, head_dim)
        expect(isinstance(radius, int) and radius >= 0, "radius", radius, "a number >= 0")
        expect(centre in get_args(Centre), "centre", repr(centre), f"one of {', '.join(get_args(Centre))}")
        self.radius, self.centre = radius, centre
        self.to_gate = nn.Linear(head_dim, 1)

    def gate(self, q: Tensor) -> Float[Tensor, "batch heads n 1"]:
        """g, the share of the local part."""
        return self.to_gate(q * self.head_dim**-0.5).sigmoid()

    def _scored(self, q: Heads, k: Heads, mask: Any, causal: bool, bias: Any, offset: int) -> tuple[Any, ...]:
        """Scores, what is visible, the global softmax and the centres c, (..., n, 1)."""
        scores, keep = dense.scores(q, k, bias=bias, offset=offset), dense.visible(q, k, mask, causal, offset)
        everywhere = dense.softmax(scores, keep)
        if self.centre == "peak":
            return scores, keep, everywhere, everywhere.argmax(-1, keepdim=True)
        i = torch.arange(offset, offset + q.shape[2], device=q.device)
        return scores, keep, everywhere, i.clamp(max=k.shape[2] - 1)[:, None].expand(*scores.shape[:3], 1)

    def _mixed(self, q: Heads, k: Heads, v: Heads, mask: Any, causal: bool, bias: Any, offset: int) -> Heads:
        """The output of some queries, the first at ``offset``; windows are gathered."""
        scores, keep, everywhere, centre = self._scored(q, k, mask, causal, bias, offset)
        (n, m), reach = scores.shape[2:], 2 * self.radius + 1
        at = centre + torch.arange(-self.radius, self.radius + 1, device=q.device)
        inside, at = (at >= 0) & (at < m), at.clamp(0, m - 1)
        if keep is not None:
            inside = inside & keep.expand_as(scores).gather(-1, at)
        local = dense.softmax(scores.gather(-1, at), inside)
        near = v.gather(2, at.flatten(2).unsqueeze(-1).expand(-1, -1, -1, v.shape[3])).unflatten(2, (n, reach))
        g = self.gate(q)
        return g * (local.unsqueeze(-2) @ near).squeeze(-2) + (1 - g) * (everywhere @ v)

    def forward(self, q, k, v, *, mask=None, causal=False, bias=None, offset=0):
        n, m, reach = q.shape[2], k.shape[2], 2 * self.radius + 1
        if forced() == "reference":
            return self.weights(q, k, mask=mask, causal=causal, bias=bias, offset=offset) @ v

        def part(start: int, stop: int) -> Tensor:
            last = min(m, offset + stop) if causal else m
            b = bias
            if isinstance(b, Tensor):
                b = (b if b.shape[-2] == 1 else b[..., start:stop, :])[..., :last]
            qk, at = (q[:, :, start:stop], k[:, :, :last]), offset + start
            if reach >= last:  # windows that hold nearly everything
                return self.weights(*qk, mask=mask, causal=causal, bias=b, offset=at) @ v[:, :, :last]
            return self._mixed(*qk, v[:, :, :last], mask, causal, b, at)

        return dense.by_rows(part, n, q.shape[0] * q.shape[1] * (m + min(reach, m) * v.shape[3]))

    def weights(self, q, k, *, mask=None, causal=False, bias=None, offset=0):
        scores, keep, everywhere, centre = self._scored(q, k, mask, causal, bias, offset)
        near = (torch.arange(k.shape[2], device=k.device) - centre).abs() <= self.radius
        g = self.gate(q)
        local = dense.softmax(scores, near if keep is None else near & keep)
        return g * local + (1 - g) * everywhere
