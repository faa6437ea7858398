"""Neural attention: a small network scores each pair of query and key, in place of their dot product.

DiGiugno and Mahmood, "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models", 2025,
arXiv 2502.17206.

    q' = W_q' q + b, k' = W_k' k + b                               d -> p channels, shared by the heads
    u_ij = act(W_1 [q'_i ; k'_j] + b_1)                            2 p -> p         (batch, heads, n, m, p)
    s_ij = w_3 . act(W_2 u_ij + b_2)                               p -> p/2 -> 1    (batch, heads, n, m)
    y = W_o [softmax(S_1) V_1 ; ... ; softmax(S_h) V_h]            no 1/sqrt(d)     (batch, n, dim)

With ``layers=1`` the score is w_3 . u_ij: additive attention, where act is tanh and p = d. W_1 [q' ; k'] is a sum of a
term of the query and one of the key, so that the pairs are never concatenated; u is built for as many queries at a time
as memory allows, and again in the backward pass. A dot product of a query bit and a key bit cannot follow their XOR;
this score can. The released text model has this layer first, and plain attention above it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense
from crosslight.engines.positions import Bias
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]

Activation = Literal["relu", "tanh"]

CARD = Card(
    id="neural-attention",
    kind="token",
    group="scores",
    title="Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
    year=2025,
    paper="2502.17206",
    code="awayfromzel/neural-attention-research",
    summary="Scores pairs of query and key by a small network with a hidden layer or two, in place of a dot product.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    small={"width": 8},
    checked="the released layer's concatenated form written out; additive attention with one hidden layer of tanh",
    differs="The bias of the last layer, which cancels in the softmax, is left out. The released default of p = d / 32 "
    "is at least 4 here.",
    evidence=Evidence(
        claim="a byte language model whose scores are networks is no worse than one with dot products",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
    ),
)


@register(CARD)
class NeuralAttention(Core):
    """softmax(network(q, k)) v; q (batch, heads, n, d), k and v (batch, heads, m, d).

    Args:
        width: p, channels of the first hidden layer; d / 32, at least 4, unless given.
        layers: hidden layers, 1 or 2; the second one has p / 2 channels.
        activation: "relu" or "tanh".
    """

    takes_bias = True

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        width: int | None = None,
        layers: int = 2,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(heads, head_dim)
        width = max(4, head_dim // 32) if width is None else width
        expect(layers in (1, 2), "layers", layers, "1 or 2")
        expect(isinstance(width, int) and width >= layers, "width", width, f"an int of at least {layers}")
        expect(activation in get_args(Activation), "activation", repr(activation), f"one of {get_args(Activation)}")
        self.width, self.activation = width, torch.relu if activation == "relu" else torch.tanh
        self.reduce_q, self.reduce_k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.first = nn.Linear(2 * width, width)
        self.second = nn.Linear(width, width // 2) if layers == 2 else None
        self.last = nn.Linear(width // layers, 1, bias=False)

    def _terms(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        """What query and key add to the first hidden layer: (batch, heads, n, p), (batch, heads, m, p)."""
        of_query, of_key = self.first.weight.chunk(2, 1)
        return (
            nn.functional.linear(self.reduce_q(q), of_query, self.first.bias),
            nn.functional.linear(self.reduce_k(k), of_key),
        )

    def _scores(self, q: Heads, k: Heads) -> Float[Tensor, "batch heads n m"]:
        u = self.activation(q.unsqueeze(3) + k.unsqueeze(2))
        if self.second is not None:
            u = self.activation(self.second(u))
        return self.last(u).squeeze(-1)

    def _rows(self, q, k, mask, causal, bias, offset):
        """The matrix of some queries, the first of which is at ``offset``; q and k are their terms."""
        scores = self._scores(q, k)
        if bias is not None:
            scores = scores + dense.dense_bias(bias, q, k, offset)
        return dense.softmax(scores, dense.visible(q, k, mask, causal, offset))

    def forward(self, q, k, v, *, mask=None, causal=False, bias: Tensor | Bias | None = None, offset=0):
        n, m = q.shape[2], k.shape[2]
        q, k = self._terms(q, k)

        def part(start: int, stop: int) -> Tensor:
            own = bias
            if isinstance(own, Tensor) and own.shape[-2] > 1:
                own = own[..., start:stop, :]
            return self._rows(q[:, :, start:stop], k, mask, causal, own, offset + start) @ v

        return dense.by_rows(part, n, len(q) * self.heads * m * self.width)

    def weights(self, q, k, *, mask=None, causal=False, bias: Tensor | Bias | None = None, offset=0):
        return self._rows(*self._terms(q, k), mask, causal, bias, offset)
