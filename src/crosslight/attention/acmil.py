"""ACMIL: gated attention pooling of a bag by several branches, whose strongest instances are masked in training.

Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", 2023,
arXiv 2311.07125.

    h_j = ReLU(W_r z_j)                                    instances, reduced                (batch, m, dim)
    g_j = tanh(V h_j) * sigmoid(U h_j)                     gated keys                        (batch, m, attention_dim)
    s_kj = w_k . g_j,  A_k = softmax_j(s_k)                branch k of ``heads``             (batch, heads, 1, m)
    training: of the ``top`` instances with the largest s_k a random share is masked before the softmax (STKIM)
    y = sum_j mean_k(A_kj) h_j                             the bag                           (batch, 1, dim)

One branch settles on a few instances. Several branches look for different ones (`diversity` is the loss that keeps
them apart: the mean cosine between branches), and masking moves attention to the rest. With one branch and top = 0
this is ABMIL (Ilse et al. 2018, arXiv 1802.04712). A head is a branch, so `weights` shows each.

``attn(None, context=z)`` is the paper's pooling: the branches ask. Each token of a given x asks with every branch,
w_k + W_x,k x_i. `BagClassifier` is the network: a classifier on each branch's own mean, one on the bag's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight.attention.base import LayerCache, Mechanism
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

CARD = Card(
    id="acmil",
    kind="token",
    group="scores",
    title="Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification",
    year=2023,
    paper="2311.07125",
    code="dazhangyu123/ACMIL",
    summary="A bag is pooled by several learned branches of gated attention; training masks their strongest instances.",
    patterns=("noncausal-cross", "causal-cross"),
    why_not="Learned branches pool a bag; a stream is not pooled by itself.",
    cost="n",
    decode="state",
    checked="gated attention (ABMIL) written out for each branch; shares before and after masking; the diversity loss",
    differs="The paper has learned branches only; queries from a stream x are ours, so that the pooling can be "
    "asked. The scores have no bias, which the softmax takes away. The released script sets K to the number "
    "of branches, the paper to 10. Where a bag has fewer instances than that, the share is taken of those "
    "that it has. The released variant with multi-head attention in each branch is not here. The evidence trains the "
    "paper's network with its loss, and K as in the script: 10 of 40 instances would hide what makes a bag positive.",
    evidence=Evidence(
        claim="from 60 bags, masked branches with classifiers of their own learn to tell bags better than gated "
        "attention alone (ABMIL)",
        task="pooled-bags",
        metric="auc",
        margin=0.01,
        options={"top": 5},
        baseline="acmil",
        baseline_options={"top": 0, "heads": 1},
    ),
)


def diversity(weights: Float[Tensor, "batch heads n m"]) -> Float[Tensor, ""]:
    """Mean cosine between the distributions of two branches: 1 if all are equal, 0 if they are disjoint or one."""
    heads = weights.shape[1]
    if heads == 1:
        return weights.new_zeros(())
    unit = F.normalize(weights, dim=-1)
    # All ordered pairs are |sum of the units|^2; each branch with itself is 1, or 0 where it reads nothing.
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, -1))
    return pairs.mean() / (heads * (heads - 1))


@register(CARD)
class ACMIL(Mechanism):
    """Gated attention pooling by branches.

    Args:
        dim: width of the reduced instances and of the output.
        heads: branches.
        context_dim: width of the instances, dim unless given.
        attention_dim: width of the gated keys.
        top: in training, how many of a branch's strongest instances may be masked (the paper's K); 0 masks none.
        share: the share of these that is masked.
    """

    learned_queries = True
    network: ClassVar[type[nn.Module]]

    def __init__(
        self,
        dim: int,
        heads: int = 5,
        *,
        context_dim: int | None = None,
        attention_dim: int = 128,
        top: int = 10,
        share: float = 0.6,
    ) -> None:
        super().__init__(dim, context_dim)
        expect(heads > 0, "heads", heads, "a positive int")
        expect(attention_dim > 0, "attention_dim", attention_dim, "a positive int")
        expect(top >= 0, "top", top, "a number >= 0")
        expect(0 <= share <= 1, "share", share, "a number from 0 to 1")
        self.heads, self.top, self.share = heads, top, share
        self.reduce = nn.Linear(self.context_dim, dim, bias=False)
        self.v, self.u = nn.Linear(dim, attention_dim), nn.Linear(dim, attention_dim)
        self.branches = nn.Linear(attention_dim, heads, bias=False)
        self.ask = nn.Linear(dim, heads * attention_dim, bias=False)

    def _queries(self, x: Tensor | None, batch: int) -> Float[Tensor, "batch heads n attention_dim"]:
        learned = self.branches.weight[None, :, None]
        if x is None:
            return learned.expand(batch, -1, -1, -1)
        return learned + self.ask(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _instances(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The gated keys and the reduced instances, each as one head that all branches share."""
        h = F.relu(self.reduce(context))
        return (self.v(h).tanh() * self.u(h).sigmoid()).unsqueeze(1), h.unsqueeze(1)

    def _dropped(self, scores: Tensor, keep: Tensor | None) -> Bool[Tensor, "batch heads n m"]:
        """A random share of the strongest instances of each branch."""
        seen = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep.expand_as(scores)
        ranked = scores.masked_fill(~seen, -torch.inf)
        strongest = ranked.topk(min(self.top, scores.shape[-1]), -1).indices
        there = seen.gather(-1, strongest)
        count = (self.share * there.sum(-1, keepdim=True)).floor()
        lot = torch.rand(there.shape, device=scores.device).masked_fill(~there, 2.0)
        chosen = lot.argsort(-1).argsort(-1) < count
        return torch.zeros_like(seen).scatter(-1, strongest, chosen)

    def _matrix(self, q: Tensor, g: Tensor, mask: Mask | None) -> Float[Tensor, "batch heads n m"]:
        scores, keep = dense.scores(q, g, scale=1.0), dense.visible(q, g, mask, False)
        if self.training and self.top:
            kept = ~self._dropped(scores.detach(), keep)
            keep = kept if keep is None else keep & kept
        return dense.softmax(scores, keep)

    def _pooled(self, q: Tensor, g: Tensor, h: Tensor, mask: Mask | None) -> Tensor:
        """The mean over branches."""
        if self.training and self.top:
            return (self._matrix(q, g, mask) @ h).mean(1)
        return dense.attend(q, g, h, mask=mask, scale=1.0).mean(1)

    def _forward(self, x, context, how):
        g, h = self._instances(context)
        return self._pooled(self._queries(x, len(context)), g, h, how.mask)

    def _weights(self, x, context, how):
        return self._matrix(self._queries(x, len(context)), self._instances(context)[0], how.mask)

    def _read(self, weights, x, context, how):
        return (weights @ self._instances(context)[1]).mean(1)

    def _step(self, x, cache, context, how):
        state = (*self._instances(context), how.mask) if cache is None else cache.state
        length = 0 if cache is None else cache.length
        return self._pooled(self._queries(x, len(x)), *state), LayerCache(length + x.shape[1], state, True)


class BagClassifier(nn.Module):
    """Bags (batch, m, features) -> logits of the bag (batch, classes), of each branch (batch, heads, classes), and
    the branches' distributions (batch, heads, m)."""

    #: Features and width of the released code: a ViT-S/16 trained on slides, a ResNet-18 trained on ImageNet, and
    #: pathology's CLIP, a ViT-B/16 and a ViT-L/14 at 336 pixels.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"features": 64, "dim": 32},
        "medical_ssl": {"features": 384, "dim": 128},
        "natural_supervised": {"features": 512, "dim": 256},
        "path_clip_b": {"features": 512, "dim": 256},
        "path_clip_l_336": {"features": 768, "dim": 384},
    }

    def __init__(
        self, features: int, dim: int, classes: int = 2, heads: int = 5, *, top: int = 10, share: float = 0.6
    ) -> None:
        super().__init__()
        self.attend = ACMIL(dim, heads, context_dim=features, top=top, share=share)
        del self.attend.ask  # nobody but the branches asks
        self.branch_heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(heads))
        self.head = nn.Linear(dim, classes)

    def forward(
        self, bags: Float[Tensor, "batch m features"], mask: Bool[Tensor, "batch m"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attend = self.attend
        g, h = attend._instances(bags)
        rule = masks.as_mask(mask, batch=len(bags), heads=attend.heads, n=1, m=bags.shape[1])
        weights = attend._matrix(attend._queries(None, len(bags)), g, rule)
        z = (weights @ h).squeeze(2)
        parts = torch.stack([head(z[:, k]) for k, head in enumerate(self.branch_heads)], 1)
        return self.head(z.mean(1)), parts, weights.squeeze(2)

    def loss(self, output: tuple[Tensor, Tensor, Tensor], target: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Cross-entropy of the bag, that of the branches, and their likeness; one branch is the bag itself."""
        logits, parts, weights = output
        if parts.shape[1] == 1:
            return F.cross_entropy(logits, target)
        own = F.cross_entropy(parts.flatten(0, 1), target.repeat_interleave(parts.shape[1]))
        return F.cross_entropy(logits, target) + own + diversity(weights.unsqueeze(2))


ACMIL.network = BagClassifier
