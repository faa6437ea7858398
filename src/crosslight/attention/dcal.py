"""Dual cross-attention: the few tokens that matter most read all others, and pairs of images disturb each other.

Zhu et al., "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification", 2022,
arXiv 2205.02151.

    attention rollout    S^_l = (S_l + I) / 2, S the mean over heads;  S^ = S^_l ... S^_1     (batch, n, n)
    GLCA    L = the token 0 (CLS) and the ``ratio`` of the others with the largest S^_0j
            y_i = W_o softmax(q_i K^T / sqrt(d)) V for i in L; other tokens read nothing     (batch, n, dim)
    PWCA    y_i = W_o softmax(q_i [K_1 ; K_2]^T / sqrt(d)) [V_1 ; V_2]                       all i of image 1

GLCA is the self-attention of the layer: of the queries only the local ones are computed, ratio n^2 in place of n^2.
The rollout of the layers below comes by ``with attn.ranked_by(importance):``; alone, the layer ranks by S^_0 of its
own. PWCA is its cross-attention with the weights of self-attention: ``attn(x_1, torch.cat([x_1, x_2], 1))``. The
second image is a distractor, in training only.

`DualViT` is the network: a ViT whose blocks also take pairs, and one block of GLCA with a head of its own on top.
`UncertaintyLoss` weighs the three losses. In a test the logits of ViT and GLCA are added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.attention.backbone import Mlp, initialise, to_tokens
from crosslight.attention.base import AttentionLayer, How
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Stream = Float[Tensor, "batch n dim"]

CARD = Card(
    id="dcal",
    kind="token",
    group="scores",
    title="Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
    year=2022,
    paper="2205.02151",
    summary="Only the tokens that matter most to CLS ask; in training an image also reads another, a distractor.",
    patterns=("noncausal-self", "noncausal-cross", "causal-cross"),
    why_not="Which tokens ask is ranked over the whole image.",
    cost="n^2",
    mask="keys",
    decode="kv",
    small={"ratio": 0.3},
    checked="torch.nn.MultiheadAttention on the rows that ask, and on pairs; timm's ViT for the self-attention branch "
    "of the network; rollout written out",
    differs="Alone, without the rollout of layers below, the layer ranks by its own attention. Tokens that do not ask "
    "keep their place and read nothing; the network carries the asking ones on alone, as the paper does. The number "
    "of local tokens is rounded up. The evidence is about GLCA in every layer: tasks have no pairs and one loss.",
    evidence=Evidence(
        claim="with a third of the tokens asking in every layer, digits are read nearly as well",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"ratio": 0.33},
    ),
)


def rollout(attentions: Sequence[Float[Tensor, "batch heads n n"]]) -> Float[Tensor, "batch n n"]:
    """How much of each input token is in each output token, from the attention of the layers, first layer first."""
    expect(len(attentions) > 0, "attentions", "none", "those of one layer or more")
    first = attentions[0]
    own = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    total = own
    for a in attentions:
        total = 0.5 * (a.mean(1) + own) @ total
    return total


def strongest(
    importance: Float[Tensor, "batch n"], ratio: float, keep: Bool[Tensor, "batch n"] | None = None
) -> Int[Tensor, "batch local"]:
    """Token 0 and the ``ratio`` of the others that is most important, in order."""
    if keep is not None:
        importance = importance.masked_fill(~keep, -torch.inf)
    best = importance[:, 1:].topk(math.ceil(ratio * (importance.shape[1] - 1)), -1).indices + 1
    return torch.cat([best.new_zeros(len(best), 1), best.sort(-1).values], 1)


@register(CARD)
class DualCrossAttention(AttentionLayer):
    """softmax attention in which the local tokens ask (self), or all of x (cross).

    Args:
        dim, heads, context_dim, bias: as in `AttentionLayer`.
        ratio: R, the share of the tokens beside CLS that ask; 0.1 for fine-grained classes, 0.3 for
            re-identification; 1 is plain attention.
    """

    network: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        context_dim: int | None = None,
        bias: bool = True,
        ratio: float = 0.1,
    ) -> None:
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(0 < ratio <= 1, "ratio", ratio, "a number above 0, at most 1")
        super().__init__(Softmax(heads, dim // heads), dim, context_dim=context_dim, bias=bias)
        self.ratio = ratio
        self._importance: Tensor | None = None
        self._chosen: Tensor | None = None

    @contextmanager
    def chosen(self, index: Int[Tensor, "batch local"]) -> Iterator[None]:
        """Inside, the tokens of ``index`` ask, CLS among them, and none is ranked."""
        before, self._chosen = self._chosen, index
        try:
            yield
        finally:
            self._chosen = before

    @contextmanager
    def ranked_by(self, importance: Float[Tensor, "batch n"]) -> Iterator[None]:
        """Inside, tokens are ranked by ``importance``: row 0 of the rollout of the layers below."""
        before, self._importance = self._importance, importance
        try:
            yield
        finally:
            self._importance = before

    def _asking(self, q: Tensor, k: Tensor, how: How) -> Int[Tensor, "batch local"]:
        """Token 0 and the most important others, in order."""
        if self._chosen is not None:
            return self._chosen
        n, importance = q.shape[2], self._importance
        if importance is None:
            # In at least float32, so that rounding decides as seldom as it can.
            cls, keys = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (q[:, :, :1], k))
            importance = dense.weights(cls, keys, mask=how.mask).mean(1)[:, 0]
        expect(importance.shape == (len(q), n), "importance", tuple(importance.shape), f"({len(q)}, {n}) as x")
        return strongest(importance, self.ratio, masks.split(how.mask)[1])

    def local(self, x: Stream) -> Int[Tensor, "batch local"]:
        """The tokens of x that ask."""
        x, _, how = self._checked(x, None, None, False, None)
        return self._asking(self._queries(x), self._keys(x), how)

    def _local(self, x: Stream, how: How) -> tuple[Tensor, Tensor, Tensor, Int[Tensor, "batch 1 local 1"]]:
        """Queries that ask, keys and values of all, and who asks."""
        q, k, v = self._heads(x, x, how)
        index = self._asking(q, k, how)[:, None, :, None]
        return q.gather(2, index.expand(-1, self.heads, -1, self.head_dim)), k, v, index

    def _forward(self, x, context, how):
        if how.cross or self.ratio == 1:
            return super()._forward(x, context, how)
        q, k, v, index = self._local(x, how)
        y = self.core(q, k, v, mask=how.mask)
        return self._merge(torch.zeros_like(v).scatter(2, index.expand_as(y), y), x)

    def _weights(self, x, context, how):
        if how.cross or self.ratio == 1:
            return super()._weights(x, context, how)
        q, k, _, index = self._local(x, how)
        a = self.core.weights(q, k, mask=how.mask)
        return a.new_zeros(*a.shape[:2], x.shape[1], a.shape[3]).scatter(2, index.expand_as(a), a)


class UncertaintyLoss(nn.Module):
    """sum_i (exp(-w_i) L_i + w_i) / 2 with learned w, 0 at first."""

    def __init__(self, losses: int = 3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(losses))

    def forward(self, *losses: Float[Tensor, ""]) -> Float[Tensor, ""]:
        expect(len(losses) == len(self.w), "losses", len(losses), len(self.w))
        return 0.5 * ((-self.w).exp() * torch.stack(losses) + self.w).sum()


class DualBlock(nn.Module):
    """x + attend(norm x), then x + mlp(norm x)."""

    def __init__(self, dim: int, heads: int, ratio: float = 1) -> None:
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(dim, eps=1e-6), DualCrossAttention(dim, heads, ratio=ratio)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim)

    def _rest(self, x: Stream) -> Stream:
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Stream) -> Stream:
        return self._rest(x + self.attend(self.norm1(x)))

    def paired(self, x: Stream, other: Stream) -> Stream:
        """PWCA: the same block, in which x reads ``other`` as well."""
        z = self.norm1(x)
        return self._rest(x + self.attend(z, torch.cat([z, self.norm1(other)], 1)))

    def local(self, x: Stream, importance: Float[Tensor, "batch n"]) -> Stream:
        """GLCA: the local tokens alone, CLS first, (batch, local, dim)."""
        expect(importance.shape == x.shape[:2], "importance", tuple(importance.shape), f"{tuple(x.shape[:2])} as x")
        z, index = self.norm1(x), strongest(importance, self.attend.ratio)
        with self.attend.chosen(index):
            y = self.attend(z)
        return self._rest((x + y).gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2])))


class DualViT(nn.Module):
    """Images (batch, channels, side, side) -> logits (batch, classes) of the ViT and of GLCA; with ``pair`` also those
    of the ViT under PWCA. The prediction is the sum of the first two.

    Args:
        ratio: R of the GLCA block.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"image": 8, "patch": 2, "dim": 32, "depth": 2, "heads": 4, "classes": 10, "channels": 1},
        "deit_tiny": {"dim": 192, "heads": 3},
        "deit_small": {"dim": 384, "heads": 6},
        "vit_base": {"dim": 768, "heads": 12},
    }

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        *,
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        ratio: float = 0.1,
    ) -> None:
        super().__init__()
        expect(image % patch == 0, "image", image, f"a multiple of patch = {patch}")
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image // patch) ** 2, dim) * 0.02)
        self.blocks = nn.ModuleList(DualBlock(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        self.local_block = DualBlock(dim, heads, ratio)
        self.local_norm, self.local_head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        initialise(self)

    def _tokens(self, images: Tensor) -> Stream:
        x = to_tokens(self.embed(images))[0]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        expect(x.shape[1] == self.positions.shape[1], "images", tuple(images.shape), "the side that the network has")
        return x + self.positions

    def features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        """CLS of the ViT and of GLCA; re-identification joins the two."""
        x, attentions = self._tokens(images), []
        block: Any
        for block in self.blocks:
            attentions.append(block.attend.weights(block.norm1(x)).detach())
            x = block(x)
        local = self.local_block.local(x, rollout(attentions)[:, 0])
        return self.norm(x)[:, 0], self.local_norm(local)[:, 0]

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        pair: Float[Tensor, "batch channels height width"] | None = None,
    ) -> tuple[Tensor, ...]:
        own, local = self.features(images)
        logits = self.head(own), self.local_head(local)
        if pair is None:
            return logits
        x, other = self._tokens(images), self._tokens(pair)
        block: Any
        for block in self.blocks:
            x, other = block.paired(x, other), block.paired(other, x)
        return *logits, self.head(self.norm(x)[:, 0])


DualCrossAttention.network = DualViT
