"""NiNformer: a small MLP-Mixer makes the gate that multiplies each token.

Abdullah and Aydin, "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", 2024,
arXiv 2403.02411.

    v = x + T(LN_t(x))         T: an MLP over the tokens of each channel, n -> hidden -> n, GELU
    v = v + C(LN_c(v))         C: an MLP over the channels of each token, dim -> hidden -> dim, GELU
    y = (x W + b) * v          elementwise, no softmax and no sigmoid                      (batch, n, dim)

MLP-Mixer adds what it mixes; here it gates a linear map of the token, so that what a token passes on depends on all
others. (gMLP gates with one linear map over tokens, and half of the channels.) No n x n matrix is built; the MLPs over
tokens are those of the first n positions out of ``max_length``, so tokens need no position of their own.

`weights` is the matrix by which T reads: GELU(h) is h times Phi(h), the normal distribution function, so that T is
W_2 diag(Phi(h)) W_1 on each channel: dim matrices (n, n). `read` mixes by a given matrix and then gates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F
from torch.special import ndtr

from crosslight.attention.activator import shortened
from crosslight.attention.backbone import Mlp
from crosslight.attention.base import Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Stream = Float[Tensor, "batch n dim"]

CARD = Card(
    id="ninformer",
    kind="token",
    group="gates",
    title="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
    year=2024,
    paper="2403.02411",
    code="Abdullah-88/NiNformer",
    summary="No attention: an inner MLP-Mixer makes a gate, which multiplies a linear map of each token.",
    patterns=("noncausal-self",),
    why_not="The hidden units of the token MLP read all positions of one stream at once.",
    cost="n",
    mask="keys",
    small={"max_length": 1024},
    checked="the released gating unit written out with the same weights; x W + b times x where the mixer is silent",
    differs="The released code fixes the number of tokens; here it is at most max_length. One hidden width serves "
    "both inner MLPs and the block's in the released code, 2 dim; so it does here. That the block uses one "
    "LayerNorm twice is the block's choice.",
    evidence=Evidence(
        claim="a gate that mixes tokens reads digits at least as well as softmax attention",
        task="digits",
        metric="accuracy",
        margin=0.0,
        options={"max_length": 64},
    ),
)


@register(CARD)
class NiNformer(Mechanism):
    """The mixer gating unit, (x W + b) * mixer(x).

    Args:
        dim: width of x and of the output.
        heads: for a call like that of other rows; gating has no heads.
        token_hidden, channel_hidden: hidden units of the inner MLPs, 2 dim unless given.
        max_length: the longest stream.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        max_length: int = 512,
    ) -> None:
        super().__init__(dim)
        token_hidden = 2 * dim if token_hidden is None else token_hidden
        channel_hidden = 2 * dim if channel_hidden is None else channel_hidden
        for name, value in (
            ("token_hidden", token_hidden),
            ("channel_hidden", channel_hidden),
            ("max_length", max_length),
        ):
            expect(value > 0, name, value, "a positive int")
        self.max_length = max_length
        self.token_norm, self.channel_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_in, self.token_out = nn.Linear(max_length, token_hidden), nn.Linear(token_hidden, max_length)
        self.channel_mix = Mlp(dim, channel_hidden)
        self.proj = nn.Linear(dim, dim)

    def _tokens(self, x: Stream, how) -> Float[Tensor, "batch dim n"]:
        """What the token MLP reads, channel by channel; masked tokens are zero."""
        expect(x.shape[1] <= self.max_length, "x", f"{x.shape[1]} tokens", f"at most {self.max_length}, max_length")
        z, keep = self.token_norm(x), masks.split(how.mask)[1]
        return (z if keep is None else z.masked_fill(~keep.unsqueeze(-1), 0)).mT

    def _gate(self, x: Stream, mixed: Float[Tensor, "batch dim n"]) -> Stream:
        v = x + mixed.mT
        return self.proj(x) * (v + self.channel_mix(self.channel_norm(v)))

    def _forward(self, x, context, how):
        z = self._tokens(x, how)
        return self._gate(x, shortened(self.token_out, F.gelu(shortened(self.token_in, z)), x.shape[1]))

    def _weights(self, x, context, how):
        z, n = self._tokens(x, how), x.shape[1]
        share = ndtr(shortened(self.token_in, z))
        matrix = (self.token_out.weight[:n] * share.unsqueeze(-2)) @ self.token_in.weight[:, :n]
        keep = masks.split(how.mask)[1]
        return matrix if keep is None else matrix.masked_fill(~keep[:, None, None], 0)

    def _read(self, weights, x, context, how):
        z = self._tokens(x, how)
        rest = ndtr(shortened(self.token_in, z)) * self.token_in.bias
        return self._gate(x, (weights @ z.unsqueeze(-1)).squeeze(-1) + shortened(self.token_out, rest, x.shape[1]))
