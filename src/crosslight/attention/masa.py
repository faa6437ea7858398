"""MASA: the projections of all layers are sums of the same few matrices.

Zhussip, Shopkhoev, Ali and Lefkimmiatis, "Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary
Learning", 2025, arXiv 2508.04581.

    W_l^p = sum_s c_{l,s}^p D_s^p      p in {Q, K, V, O}, s = 1 .. S       (out, in), built from S atoms of that shape
    y = W_l^O [A_1 V_1 ; ... ; A_h V_h],  A = softmax(Q K^T / sqrt(d))     (batch, n, dim), plain attention

The atoms D^p of a kind are shared by all L layers of a model, the S numbers c_l^p are the layer's own: S d d_p + L S
weights a kind in place of L d d_p. S = L / 3 saves two thirds. Atoms and coefficients are trained together, from
scratch, by the usual optimiser. Biases stay each layer's own.

    layers = MatrixAtomSharing.stack(12, dim=256, heads=8, atoms=4)               # 12 layers, one dictionary a kind
    layers = MatrixAtomSharing.converted(trained, atoms=4)                        # matrix PCA of trained layers

`converted` takes the best approximation of rank S of the L flattened matrices: atoms are right singular vectors,
coefficients the rest. `merged` gives a layer with W_l built once, which is plain multi-head attention, for inference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

#: The projections of a layer by the letter of their kind.
NAMES = {"q": "q", "k": "k", "v": "v", "o": "out"}

CARD = Card(
    id="masa",
    kind="token",
    group="scores",
    title="Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning",
    year=2025,
    paper="2508.04581",
    summary="Projections of all layers are combinations of a few shared matrices, with S numbers a layer and kind.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    small={"atoms": 2},
    checked="any stack of plain layers with S = L and the identity as coefficients; the parameter count; the "
    "discarded singular values",
    differs="The initial scale of atoms and coefficients is ours: W_l starts with the variance of a plain layer. The "
    "data-aware correction of converted layers is not here.",
    evidence=Evidence(
        claim="A byte language model of six layers with two matrices a projection, a third of the attention's "
        "parameters, loses little",
        task="language-stack",
        metric="bits_per_byte",
        margin=-0.05,
        options={"atoms": 2},
        budget={"steps": 400},
    ),
)


class Atoms(nn.Module):
    """A dictionary: matrices that layers share."""

    def __init__(self, atoms: int, outputs: int, inputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear
        self.atoms = nn.Parameter(torch.empty(atoms, outputs, inputs).uniform_(-bound, bound))


class CombinedLinear(nn.Module):
    """A linear map whose matrix is a combination of atoms."""

    def __init__(self, dictionary: Atoms, bias: bool) -> None:
        super().__init__()
        count, outputs, inputs = dictionary.atoms.shape
        self.dictionary = dictionary
        self.coefficients = nn.Parameter(torch.randn(count) * count**-0.5)
        bound = inputs**-0.5
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        return torch.tensordot(self.coefficients, self.dictionary.atoms, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@register(CARD)
class MatrixAtomSharing(AttentionLayer):
    """Multi-head attention with combined projections. One layer by itself has its own dictionaries; `sibling` and
    `stack` make layers that share them.

    Args:
        dim, heads, head_dim, context_dim, bias, position: as in `AttentionLayer`.
        atoms: S, matrices in each dictionary. A third of the number of layers saves 66.7%; the default is that of 12.
        kinds: which projections are shared, "qkvo" or "qkv" (the output projection stays each layer's own).
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
        atoms: int = 4,
        kinds: str = "qkvo",
    ) -> None:
        expect(isinstance(atoms, int) and atoms > 0, "atoms", atoms, "a positive int")
        expect(bool(kinds) and set(kinds) <= set(NAMES), "kinds", repr(kinds), "some of the letters q, k, v, o")
        core = Softmax(heads, head_width(dim, heads, head_dim))
        super().__init__(core, dim, context_dim=context_dim, bias=bias, position=position)
        self.kinds = kinds
        for kind in kinds:
            outputs, inputs = getattr(self, NAMES[kind]).weight.shape
            setattr(self, NAMES[kind], CombinedLinear(Atoms(atoms, outputs, inputs), bias))

    def combined(self) -> list[CombinedLinear]:
        """The shared projections, in the order of `kinds`."""
        return [getattr(self, NAMES[kind]) for kind in self.kinds]

    def sibling(self) -> MatrixAtomSharing:
        """Another layer on the same dictionaries: fresh coefficients, biases and what is not shared."""
        other = copy.deepcopy(self, {id(p.dictionary): p.dictionary for p in self.combined()})
        for name in NAMES.values():
            old = getattr(self, name)
            if isinstance(old, CombinedLinear):
                new: nn.Module = CombinedLinear(old.dictionary, old.bias is not None)
            else:
                new = nn.Linear(old.in_features, old.out_features, old.bias is not None)
            setattr(other, name, new.to(old.weight))
        return other

    @classmethod
    def stack(cls, depth: int, **options: Any) -> nn.ModuleList:
        """``depth`` layers on the same dictionaries; ``options`` are those of a layer."""
        expect(depth >= 1, "depth", depth, "a positive int")
        first = cls(**options)
        return nn.ModuleList([first, *(first.sibling() for _ in range(depth - 1))])

    @classmethod
    def converted(
        cls, layers: Sequence[AttentionLayer], atoms: int, *, kinds: str = "qkvo", groups: int = 1
    ) -> nn.ModuleList:
        """Layers that share ``atoms`` matrices a kind, nearest to trained ones of equal sizes (matrix PCA).

        With ``groups``, neighbouring layers form so many groups of equal size, each with dictionaries of its own.
        """
        expect(len(layers) > 0 and len(layers) % groups == 0, "groups", groups, f"a divisor of {len(layers)} layers")
        size = len(layers) // groups
        cores = {layer.core.card.id for layer in layers}
        expect(cores == {"softmax"}, "layers", sorted(cores), "layers of softmax attention")
        grouped = next((layer for layer in layers if layer.kv_heads != layer.heads), None)
        expect(grouped is None, "layers", "one with grouped heads", "layers with as many key/value heads as heads")
        expect(1 <= atoms <= size, "atoms", atoms, f"at most the {size} layers of a group")
        made: list[MatrixAtomSharing] = []
        for start in range(0, len(layers), size):
            made += cls._shared(layers[start : start + size], atoms, kinds)
        return nn.ModuleList(made)

    @classmethod
    def _shared(cls, layers: Sequence[AttentionLayer], atoms: int, kinds: str) -> list[MatrixAtomSharing]:
        like = layers[0]
        first = cls(
            like.dim,
            like.heads,
            head_dim=like.head_dim,
            context_dim=like.context_dim,
            bias=like.q.bias is not None,
            atoms=atoms,
            kinds=kinds,
        ).to(like.q.weight)
        group = [first, *(first.sibling() for _ in layers[1:])]
        with torch.no_grad():
            for layer, old in zip(group, layers, strict=True):
                layer.position = copy.deepcopy(old.position)
                for kind, name in NAMES.items():
                    new, trained = getattr(layer, name), getattr(old, name)
                    if new.bias is not None:
                        new.bias.copy_(trained.bias)
                    if kind not in kinds:
                        new.weight.copy_(trained.weight)
            for name in (NAMES[kind] for kind in kinds):
                weights = torch.stack([getattr(layer, name).weight for layer in layers])
                weights = weights.to(torch.promote_types(weights.dtype, torch.float32))  # as half precision has no SVD
                u, s, v = torch.linalg.svd(weights.flatten(1), full_matrices=False)
                # Atoms of the size of a layer's matrix, so that coefficients are of order one.
                size = s[:atoms] / math.sqrt(len(layers))
                getattr(first, name).dictionary.atoms.copy_((size[:, None] * v[:atoms]).view(atoms, *weights.shape[1:]))
                for layer, row in zip(group, u[:, :atoms] * math.sqrt(len(layers)), strict=True):
                    getattr(layer, name).coefficients.copy_(row)
        return group

    @torch.no_grad()
    def merged(self) -> AttentionLayer:
        """The layer with its matrices built once: plain attention, for inference."""
        plain = Softmax.build(
            self.dim,
            self.heads,
            head_dim=self.head_dim,
            context_dim=self.context_dim,
            bias=self.q.bias is not None,
            position=copy.deepcopy(self.position),
        ).to(self.q.weight)
        for name in NAMES.values():
            new, old = getattr(plain, name), getattr(self, name)
            new.weight.copy_(old.weight)
            if old.bias is not None:
                new.bias.copy_(old.bias)
        return plain
