"""Reversed attention: a token does not gather from the tokens that it attends to, it sends itself to them.

Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", 2023, arXiv 2304.03282.

    A_ij = softmax over receivers j of q_i . k_j / sqrt(d)      child i, parents j; q of senders, k of receivers
    P_i  = softmax over heads of W_s z_i / 0.1                  head selector: which relation the child takes
    M_i  = M_i of the layer before * sigmoid(MLP(z_i))          message controller, one number a token, 1 at first
    y_j  = W_o [sum_i A_ij P_i M_i v_i for each head]           (batch, n, dim)

A is the matrix of ordinary attention, read by its columns: each sender gives away mass 1 in all (times P M), and what
a receiver gets is free, so that a token which nobody sends to is a leaf. M can only fall with depth; a token whose M
is small has ended. `weights` is A^T P M, (batch, heads, n, m), and its sum over heads (`dependencies`) is the soft
dependency tree. The mass that a receiver gets says what the lite models prune.

Two passes over tiles of scores compute it, one for the sums over receivers and one for the messages, so that no n x m
tensor is kept. `send` hands on M and the mass received; ``with attn.after(mass):`` is a call after other layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.attention.backbone import Mlp, initialise, to_tokens
from crosslight.attention.base import How, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.backend import forced
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Stream = Float[Tensor, "batch n dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Mass = Float[Tensor, "batch n"]

CARD = Card(
    id="dependencyvit",
    kind="token",
    group="scores",
    title="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    year=2023,
    paper="2304.03282",
    code="dingmyu/DependencyViT",
    summary="Attention reversed: each token sends itself to the tokens it attends to, by a head and an amount of its "
    "choice.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="A sender shares itself out among all receivers, so what the first gets depends on the last.",
    cost="n^2",
    mask="keys",
    checked="the messages written out sender by sender; transposed plain attention; conserved mass; the layers of the "
    "network one by one",
    differs="We had no access to the authors' code: head selector, message controller (hidden width dim / 2, biases)"
    " and the mass by which lite models prune follow a timm-style reimplementation that we read, without its"
    " layer scale. The published parameter counts could not be confirmed and are not asserted. Padding "
    "neither sends nor receives. In cross-attention, which the paper does not have, the context sends and x "
    "receives. The spanning tree that the paper takes of the dependency matrix is left to the reader.",
    evidence=Evidence(
        claim="with messages sent in place of gathered, digits are read at least as well",
        task="digits",
        metric="accuracy",
        margin=0.0,
    ),
)


@register(CARD)
class ReversedAttention(Mechanism):
    """Attention from senders (the context) to receivers (x).

    Args:
        dim, heads, context_dim, bias: as in `AttentionLayer`.
        selector: senders choose heads (P); False is P = 1.
        controller: senders choose an amount (M); False is M = 1.
        temperature: of the head selector.
        controller_hidden: hidden width of the message controller, half of the context's unless given.
    """

    network: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim: int,
        heads: int = 12,
        *,
        context_dim: int | None = None,
        bias: bool = True,
        selector: bool = True,
        controller: bool = True,
        temperature: float = 0.1,
        controller_hidden: int | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(temperature > 0, "temperature", temperature, "a number > 0")
        self.heads, self.scale, self.temperature = heads, (dim // heads) ** -0.5, temperature
        width = self.context_dim
        self.q, self.v = nn.Linear(width, dim, bias), nn.Linear(width, dim, bias)
        self.k, self.out = nn.Linear(dim, dim, bias), nn.Linear(dim, dim, bias)
        self.selector = nn.Linear(width, heads, bias=False) if selector else None
        hidden = max(1, width // 2) if controller_hidden is None else controller_hidden
        self.controller = (
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1)) if controller else None
        )
        self._before: Tensor | None = None

    @contextmanager
    def after(self, mass: Mass) -> Iterator[None]:
        """Inside, the senders come with the M (batch, m) that earlier layers left them."""
        previous, self._before = self._before, mass
        try:
            yield
        finally:
            self._before = previous

    def _split(self, t: Tensor) -> Heads:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mass(self, context: Stream) -> Mass:
        """M of the senders after this layer."""
        mass = context.new_ones(context.shape[:2])
        if self.controller is not None:
            mass = self.controller(context).squeeze(-1).sigmoid()
        return mass if self._before is None else self._before * mass

    def _amounts(self, context: Stream, mass: Mass, how: How) -> Float[Tensor, "batch heads m"]:
        """P M, zero for padding."""
        amounts = mass.unsqueeze(1).expand(-1, self.heads, -1)
        if self.selector is not None:
            amounts = amounts * (self.selector(context) / self.temperature).softmax(-1).mT
        keep = masks.split(how.mask)[1]
        return amounts if keep is None else amounts.masked_fill(~keep.unsqueeze(1), 0)

    def _scored(self, x: Stream, context: Stream, how: How) -> tuple[Heads, Heads, Tensor | None, Tensor]:
        """q of senders, k of receivers, which receivers there are, and the log of each sender's sum over them."""
        q, k = self._split(self.q(context)) * self.scale, self._split(self.k(x))
        keep = None if how.cross else masks.split(how.mask)[1]
        keep = None if keep is None else keep[:, None, None]
        n, m = k.shape[2], q.shape[2]

        def part(start: int, stop: int) -> Tensor:
            return _scores(q[:, :, start:stop], k, keep).logsumexp(-1, keepdim=True)

        return q, k, keep, dense.by_rows(part, m, len(x) * self.heads * n)

    def _weights(self, x, context, how):
        q, k, keep, total = self._scored(x, context, how)
        a = (_scores(q, k, keep) - total).exp().to(x.dtype)
        return a.mT * self._amounts(context, self.mass(context), how).unsqueeze(2)

    def _messages(self, x: Stream, v: Heads, context: Stream, how: How) -> Heads:
        """A^T v."""
        q, k, keep, total = self._scored(x, context, how)

        def part(start: int, stop: int) -> Tensor:
            seen = None if keep is None else keep[..., start:stop]
            return (_scores(q, k[:, :, start:stop], seen) - total).exp().to(v.dtype).mT @ v

        return dense.by_rows(part, k.shape[2], len(x) * self.heads * q.shape[2])

    def _merge(self, y: Heads) -> Stream:
        return self.out(y.transpose(1, 2).flatten(2))

    def _read(self, weights, x, context, how):
        return self._merge(weights @ self._split(self.v(context)))

    def _forward(self, x, context, how):
        if forced() == "reference":
            return self._read(self._weights(x, context, how), x, context, how)
        amounts = self._amounts(context, self.mass(context), how)
        return self._merge(self._messages(x, self._split(self.v(context)) * amounts.unsqueeze(-1), context, how))

    def send(self, x: Stream, before: Mass | None = None) -> tuple[Stream, Mass, Mass]:
        """Self-attention within a network: the output, M for the next layer, and the mass that each token received."""
        x, context, how = self._checked(x, None, None, False, None)
        mass = self.mass(context) if before is None else self.mass(context) * before
        amounts = self._amounts(context, mass, how).unsqueeze(-1)
        # One more channel, in which every sender sends 1, receives the mass.
        v = torch.cat([self._split(self.v(context)) * amounts, amounts], -1)
        y = self._messages(x, v, context, how)
        return self._merge(y[..., :-1]), mass, y[..., -1].sum(1)

    def dependencies(self, x: Stream) -> Float[Tensor, "batch n n"]:
        """The soft dependency matrix: row j, column i is what child i sends to parent j."""
        return self.weights(x).sum(1)


def _scores(q: Heads, k: Heads, keep: Tensor | None) -> Tensor:
    """Rows of senders, columns of receivers; in at least float32, as the softmax is in two parts."""
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    return scores if keep is None else scores.masked_fill(~keep, torch.finfo(scores.dtype).min)


class DependencyBlock(nn.Module):
    """x + send(norm x), then x + mlp(norm x); between them only ``kept`` tokens stay, if that is given."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(dim, eps=1e-6), ReversedAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim)

    def forward(self, x: Stream, mass: Mass, kept: int | None = None) -> tuple[Stream, Mass]:
        y, mass, received = self.attend.send(self.norm1(x), mass)
        x = x + y
        if kept is not None and kept < x.shape[1]:
            index = received.topk(kept, 1).indices.sort(1).values
            x, mass = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2])), mass.gather(1, index)
        return x + self.mlp(self.norm2(x)), mass


class DependencyViT(nn.Module):
    """Images (batch, channels, side, side) -> logits (batch, classes): a ViT of reversed attention, without a class
    token; features are weighted by M before the mean.

    Args:
        prune: blocks, from 1 on, after whose attention tokens are dropped (the lite models: 2, 5, 8, 11).
        ratio: share of the tokens at the start that each of these drops.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"image": 8, "patch": 2, "dim": 32, "depth": 2, "heads": 4, "classes": 10, "channels": 1},
        "t": {"dim": 192},
        "s": {"dim": 384},
        "lite_t": {"dim": 192, "prune": (2, 5, 8, 11)},
        "lite_s": {"dim": 384, "prune": (2, 5, 8, 11)},
    }

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        heads: int = 12,
        *,
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        prune: Sequence[int] = (),
        ratio: float = 0.16,
    ) -> None:
        super().__init__()
        expect(image % patch == 0, "image", image, f"a multiple of patch = {patch}")
        expect(all(1 <= i <= depth for i in prune), "prune", tuple(prune), f"blocks from 1 to {depth}")
        expect(ratio >= 0 and ratio * len(prune) < 1, "ratio", ratio, f"less than 1 / {len(prune) or 1}, and >= 0")
        self.prune, self.ratio = tuple(sorted(prune)), ratio
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2, dim) * 0.02)
        self.blocks = nn.ModuleList(DependencyBlock(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        initialise(self)

    def features(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Stream, Mass]:
        """Normalised tokens after the last block and their M."""
        x = to_tokens(self.embed(images))[0]
        expect(x.shape[1] == self.positions.shape[1], "images", tuple(images.shape), "the side that the network has")
        x, start, mass = x + self.positions, x.shape[1], x.new_ones(x.shape[:2])
        for number, block in enumerate(self.blocks, 1):
            kept = None
            if number in self.prune:
                kept = int((1 - (self.prune.index(number) + 1) * self.ratio) * start)
            x, mass = block(x, mass, kept)
        return self.norm(x), mass

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x, mass = self.features(images)
        return self.head((x * mass.unsqueeze(-1)).mean(1))


ReversedAttention.network = DependencyViT
