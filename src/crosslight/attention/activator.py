"""Activator: a gated linear unit in place of attention.

"Activator: GLU Activations as The Core Functions of a Vision Transformer", 2024, arXiv 2405.15953.

    GLU(z) = W_3 (N(act(W_1 z)) * N(W_2 z))     act = GELU; N a LayerNorm over the hidden units, one for both branches

    axes "channel"         y_i = GLU(x_i)                                          each token by itself
    axes "token"           y^c = GLU(x^c), x^c the n numbers of channel c          the same unit for every channel
    axes "token-channel"   t = token GLU of x;  y = t + channel GLU of LN(x + t)   (batch, n, dim)

There is no softmax and no n x n matrix of the input: a channel is multiplied by W_3 and W_1, W_2 of (hidden, n), so
the cost is linear in n. The projections along tokens are those of the first n positions out of ``max_length``.

`weights` is the matrix that the unit stands for. Its value branch is linear, the gate and the deviation in N are gains
for each hidden unit: y = W_3 diag(g(x)) C W_2 x + c(x), C the centring of N. Along tokens that is one (n, n) matrix a
channel, so `weights` shows dim matrices; among channels a token reads itself only, and the matrix is the identity. The
paper's second form leaves out the MLP of the block as well; that is the block's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight.attention.base import Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Axes = Literal["channel", "token", "token-channel"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}

CARD = Card(
    id="activator",
    kind="token",
    group="gates",
    title="Activator: GLU Activations as The Core Functions of a Vision Transformer",
    year=2024,
    paper="2405.15953",
    code="Abdullah-88/Activator",
    summary="No attention: a gated linear unit over tokens, over channels, or one after the other.",
    patterns=("noncausal-self",),
    why_not="The gate is made of the stream itself, and hidden units along tokens read all positions at once.",
    cost="n",
    mask="keys",
    small={"max_length": 1024},
    checked="the gated unit written out; its Jacobian where the gate is constant; equivariance of the channel form",
    differs="In the released code the unit runs over channels only, so that tokens meet in the final mean alone: that "
    "is axes='channel'. The unit along tokens, which makes the row a replacement of attention, and its order before "
    "the channel unit are our reconstruction. norm=False is the unit without N.",
    evidence=Evidence(
        claim="gated units over tokens, then channels, read digits nearly as well as attention",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"max_length": 64},
    ),
)


def shortened(linear: nn.Linear, x: Float[Tensor, "*batch n"], size: int | None = None) -> Float[Tensor, "*batch out"]:
    """A linear map of which the first n inputs and the first ``size`` outputs are used."""
    bias = None if linear.bias is None else linear.bias[:size]
    return F.linear(x, linear.weight[:size, : x.shape[-1]], bias)


class GatedUnit(nn.Module):
    """GLU(z) over the last axis, (..., n) -> (..., n) for any n up to ``width``."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", norm: bool = True) -> None:
        super().__init__()
        expect(activation in ACTIVATIONS, "activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.gate, self.value, self.out = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(hidden) if norm else None

    def _gated(self, z: Tensor) -> Tensor:
        u = self.activation(shortened(self.gate, z))
        return u if self.norm is None else self.norm(u)

    def forward(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        v = shortened(self.value, z)
        v = v if self.norm is None else self.norm(v)
        return shortened(self.out, self._gated(z) * v, z.shape[-1])

    def _gain(self, z: Tensor) -> Float[Tensor, "*batch hidden"]:
        """g: what multiplies each centred hidden unit of the value branch."""
        u = self._gated(z)
        if self.norm is None:
            return u
        deviation = (shortened(self.value, z).var(-1, unbiased=False, keepdim=True) + self.norm.eps).sqrt()
        return u * self.norm.weight / deviation

    def _centred(self, v: Tensor) -> Tensor:
        """C v, over the last axis."""
        return v if self.norm is None else v - v.mean(-1, keepdim=True)

    def matrix(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n n"]:
        n = z.shape[-1]
        value = self._centred(self.value.weight[:, :n].T).T
        return (self.out.weight[:n] * self._gain(z).unsqueeze(-2)) @ value

    def constant(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """c(z), so that forward(z) = matrix(z) z + c(z)."""
        rest = self._gain(z) * self._centred(self.value.bias)
        if self.norm is not None:
            rest = rest + self._gated(z) * self.norm.bias
        return shortened(self.out, rest, z.shape[-1])


@register(CARD)
class Activator(Mechanism):
    """Gated linear units over tokens and channels.

    Args:
        dim: width of x and of the output.
        heads: for a call like that of other rows; gating has no heads.
        axes: "token-channel", "channel" (the released code) or "token".
        hidden: hidden units of either GLU, 2 dim unless given.
        activation: "gelu" (GEGLU) or "silu" (SwiGLU).
        norm: N inside the unit.
        max_length: the longest stream, for the unit along tokens.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        axes: Axes = "token-channel",
        hidden: int | None = None,
        activation: str = "gelu",
        norm: bool = True,
        max_length: int = 512,
    ) -> None:
        super().__init__(dim)
        expect(axes in get_args(Axes), "axes", repr(axes), f"one of {', '.join(get_args(Axes))}")
        expect(max_length > 0, "max_length", max_length, "a positive int")
        hidden = 2 * dim if hidden is None else hidden
        expect(hidden > 0, "hidden", hidden, "a positive int")
        self.axes, self.max_length = axes, max_length
        self.token = GatedUnit(max_length, hidden, activation, norm) if axes != "channel" else None
        self.channel = GatedUnit(dim, hidden, activation, norm) if axes != "token" else None
        self.between = nn.LayerNorm(dim) if axes == "token-channel" else None

    def _kept(self, x: Tensor, how) -> tuple[Tensor, Bool[Tensor, "batch n"] | None]:
        if self.token is not None:
            expect(x.shape[1] <= self.max_length, "x", f"{x.shape[1]} tokens", f"at most {self.max_length}, max_length")
        keep = masks.split(how.mask)[1]
        return (x if keep is None else x.masked_fill(~keep.unsqueeze(-1), 0)), keep

    def _channels(self, x: Tensor, t: Tensor) -> Tensor:
        """What follows the unit along tokens."""
        if self.channel is None:
            return t
        return t + self.channel(self.between(x + t)) if self.between is not None else self.channel(t)

    def _forward(self, x, context, how):
        kept, _ = self._kept(x, how)
        return self._channels(x, kept if self.token is None else self.token(kept.mT).mT)

    def _weights(self, x, context, how):
        kept, keep = self._kept(x, how)
        if self.token is None:
            matrix = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), 1, -1, -1)
        else:
            matrix = self.token.matrix(kept.mT)
        return matrix if keep is None else matrix.masked_fill(~keep[:, None, None], 0)

    def _read(self, weights, x, context, how):
        kept, _ = self._kept(x, how)
        t = (weights @ kept.mT.unsqueeze(-1)).squeeze(-1)
        return self._channels(x, (t if self.token is None else t + self.token.constant(kept.mT)).mT)
