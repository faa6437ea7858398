"""DOEI: attention says which patches and classes to trust, and the embeddings themselves are rebuilt by it.

Zhu, Zhang, Pang, Wang, Wen, Bai, Ergu, Cai and Zhao, "DOEI: Dual Optimization of Embedding Information for
Attention-Enhanced Class Activation Maps", 2025, arXiv 2502.15885.

A stream of C class tokens, one a category, then P patches; A is its attention, the mean over heads, E its embeddings.

    c_kj = A_k,j / max_j A_k,j        confidence of patch j in class k, class-to-patch; 0 for absent classes     (C, P)
    H    = weighted mean of           hybrid affinity, symmetric, 1 on the diagonal; R: its rows over their sum  (P, P)
             exp(-|rgb_i - rgb_j|^2 / 2 sigma^2),  max(cos(E_i, E_j), 0),  (A_ij + A_ji) / 2 over its maximum
    accepted_kj: c_kj >= high, and (R c_k)_j >= mean(c_k): patches alike are confident too
    patches    W = diag(max_k c_kj accepted_kj) R - damp diag(1 - max_k c_kj / low where that is below low)
    classes    W = diag(u) - B        u_k: what patches give to class k, over the largest; B: class-to-class
               attention between the different present classes, over each row's sum with its own       (C, C)
    E'   = E + strength W E           for patches and for classes

It has no parameters and is put between the blocks of a segmenter that knows image labels only: with the right
patches amplified and classes that occur together kept apart, class activation maps (`cam`) are to cover objects better.
The strength is to grow from block to block, say as l / L in block l of L; each layer is given its own. `rebuild` is
the change W E by itself. The layer is softmax attention plus strength W x; inside
``with attn.given(present=labels, colours=rgb):`` it knows the labels of the image and the mean colours of its patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from crosslight.attention.base import AttentionLayer
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stream = Float[Tensor, "batch n dim"]
    Square = Float[Tensor, "batch n n"]
    Patches = Float[Tensor, "batch patches patches"]
    Present = Bool[Tensor, "batch classes"]

CARD = Card(
    id="doei",
    kind="token",
    group="scores",
    title="DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps",
    year=2025,
    paper="2502.15885",
    code="AIGeeksGroup/DOEI",
    summary="Attention between class tokens and patches also rebuilds the embeddings: confident patches are amplified, "
    "others damped, classes pulled apart.",
    patterns=("noncausal-self",),
    why_not="Class tokens and patches of one image judge each other; a patch read later would judge the earlier ones.",
    cost="n^2",
    mask="keys",
    small={"classes": 3},
    checked="torch.nn.MultiheadAttention at strength 0; the affinity and the two weight matrices written out",
    differs="The released repository, as we saw it, holds no code, and we had the abstract and a summary only. That "
    "confident tokens are amplified and others damped by weights from class-to-patch attention, the same "
    "between classes, and that colours, embeddings and self-attention decide on candidates, is the paper's; "
    "each formula, threshold and weight above is our reconstruction, and an option. Here the change is made "
    "to what the layer is given, which in a pre-norm block is the normalised embedding; `rebuild` serves the"
    " place between blocks. The tasks have no class tokens: in the evidence the first row of pixels stands "
    "for them, and the claim is only that the change does no harm.",
    evidence=Evidence(
        claim="rebuilding the embeddings costs nothing in reading digits",
        task="digits",
        metric="accuracy",
        margin=-0.02,
        options={"classes": 8},
    ),
)


@dataclass(frozen=True)
class Rule:
    """How trust is made of attention.

    Attributes:
        high, low: confidence from which on a patch is amplified, and below which it is damped.
        damp: how much, relative to amplification.
        mix: weights of colours, embeddings and self-attention in the affinity; colours count if they are given.
        sigma: the distance of colours (0 to 1 a channel) that still counts as near.
    """

    high: float = 0.5
    low: float = 0.1
    damp: float = 0.5
    mix: tuple[float, float, float] = (1.0, 1.0, 1.0)
    sigma: float = 0.15


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where the whole is, with finite gradients."""
    return part / whole.masked_fill(whole == 0, 1) * (whole != 0)


def affinity(
    patches: Stream,
    attention: Patches,
    colours: Float[Tensor, "batch patches 3"] | None = None,
    rule: Rule = Rule(),
    keep: Bool[Tensor, "batch patches"] | None = None,
) -> Patches:
    """H, 0 where one of the two patches is masked."""
    unit = F.normalize(patches, dim=-1)
    own = torch.eye(patches.shape[1], dtype=torch.bool, device=patches.device)
    seen = own.new_ones(own.shape) if keep is None else keep[:, :, None] & keep[:, None, :]
    alike = (0.5 * (attention + attention.mT)).masked_fill(~seen | own, 0)
    parts = [(unit @ unit.mT).clamp(min=0), _over(alike, alike.amax((1, 2), keepdim=True))]
    weights = list(rule.mix[1:])
    if colours is not None:
        # Differences instead of products: near colours are told apart in low precision too.
        distance = (colours[:, :, None] - colours[:, None]).square().sum(-1)
        parts.append((-distance / (2 * rule.sigma**2)).exp().to(patches.dtype))
        weights.append(rule.mix[0])
    mixed = torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(0) / sum(weights)
    return torch.where(own, torch.ones_like(mixed), mixed) * seen


def confidence(attention: Square, classes: int, present: Present) -> Float[Tensor, "batch classes patches"]:
    """c: how much each present class reads of each patch, 1 for what it reads most."""
    c = attention[:, :classes, classes:]
    return _over(c, c.amax(-1, keepdim=True)) * present.unsqueeze(-1)


def rebuild(
    x: Stream,
    attention: Square,
    classes: int,
    *,
    present: Present | None = None,
    colours: Float[Tensor, "batch patches 3"] | None = None,
    rule: Rule = Rule(),
    keep: Bool[Tensor, "batch n"] | None = None,
) -> Stream:
    """W E: what is added to class tokens and patches at strength 1; ``keep`` is False for padding."""
    if x.shape[1] <= classes:
        return torch.zeros_like(x)
    keep = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    present = keep[:, :classes] if present is None else present.bool() & keep[:, :classes]
    there = keep[:, classes:]
    named, patches = x[:, :classes], x[:, classes:]

    c = confidence(attention, classes, present).masked_fill(~there.unsqueeze(1), 0)
    h = affinity(patches, attention[:, classes:, classes:], colours, rule, there)
    share = _over(h, h.sum(-1, keepdim=True))
    mean = _over(c.sum(-1, keepdim=True), there.sum(-1)[:, None, None].to(c.dtype))
    # The tolerance lets patches that are all equally confident be accepted.
    accepted = (c >= rule.high) & (c @ share.mT >= mean * (1 - 1e-6))
    gain = (c * accepted).amax(1)
    best = c.amax(1)
    loss = (1 - best / rule.low).clamp(min=0) if rule.low else torch.zeros_like(best)
    loss = rule.damp * loss * present.any(1, keepdim=True)
    change = gain.unsqueeze(-1) * (share @ patches) - loss.unsqueeze(-1) * patches

    given = _over(
        (attention[:, classes:, :classes] * there.unsqueeze(-1)).sum(1), there.sum(1, keepdim=True).to(x.dtype)
    )
    given = given * present
    given = _over(given, given.amax(1, keepdim=True))
    pairs = attention[:, :classes, :classes] * present.unsqueeze(1) * present.unsqueeze(2)
    own = torch.eye(classes, dtype=torch.bool, device=x.device)
    others = _over(pairs, pairs.sum(-1, keepdim=True)).masked_fill(own, 0)
    return torch.cat([given.unsqueeze(-1) * named - others @ named, change], 1)


@register(CARD)
class DOEI(AttentionLayer):
    """softmax attention, and strength W x.

    Args:
        dim, heads, bias: as in `AttentionLayer`.
        classes: class tokens, which the stream starts with.
        strength: of the change; 0 is plain attention.
        high, low, damp, mix, sigma: as in `Rule`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        bias: bool = True,
        classes: int = 20,
        strength: float = 0.1,
        high: float = 0.5,
        low: float = 0.1,
        damp: float = 0.5,
        mix: Sequence[float] = (1.0, 1.0, 1.0),
        sigma: float = 0.15,
    ) -> None:
        expect(heads > 0 and dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        expect(classes > 0, "classes", classes, "a positive int")
        expect(0 <= low <= high <= 1, "low, high", (low, high), "0 <= low <= high <= 1")
        held = len(mix) == 3 and min(mix) >= 0 and mix[1] + mix[2] > 0
        expect(held, "mix", tuple(mix), "three weights >= 0, of which the last two are not both 0")
        expect(sigma > 0, "sigma", sigma, "a number > 0")
        super().__init__(Softmax(heads, dim // heads), dim, bias=bias)
        self.classes, self.strength = classes, strength
        self.rule = Rule(high, low, damp, (mix[0], mix[1], mix[2]), sigma)
        self._given: tuple[Tensor | None, Tensor | None] = None, None

    @contextmanager
    def given(
        self, present: Present | None = None, colours: Float[Tensor, "batch patches 3"] | None = None
    ) -> Iterator[None]:
        """Inside, the classes of the images and the mean colours of their patches are known."""
        before, self._given = self._given, (present, colours)
        try:
            yield
        finally:
            self._given = before

    def _rebuilt(self, weights: Tensor, x: Stream, how) -> Stream:
        present, colours = self._given
        keep = masks.split(how.mask)[1]
        return rebuild(x, weights.mean(1), self.classes, present=present, colours=colours, rule=self.rule, keep=keep)

    def _forward(self, x, context, how):
        if not self.strength:
            return super()._forward(x, context, how)
        return self._read(self._weights(x, context, how), x, context, how)

    def _read(self, weights, x, context, how):
        y = super()._read(weights, x, context, how)
        return y + self.strength * self._rebuilt(weights, x, how) if self.strength else y

    def cam(self, x: Stream, scores: Float[Tensor, "batch classes patches"]) -> Float[Tensor, "batch classes patches"]:
        """Class activation maps: patch scores times class-to-patch confidence, spread over alike patches."""
        a, (present, colours) = self.weights(x).mean(1), self._given
        c = self.classes
        if present is None:
            present = torch.ones(len(x), c, dtype=torch.bool, device=x.device)
        h = affinity(x[:, c:], a[:, c:, c:], colours, self.rule)
        return (confidence(a, c, present.bool()) * scores) @ _over(h, h.sum(-1, keepdim=True)).mT
