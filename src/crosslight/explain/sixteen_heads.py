"""Importance of attention heads, and pruning by it.

Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", 2019, arXiv 1905.10650.

    MHAtt(x, q) = sum_h xi_h Att_h(x, q),    xi_h = 1
    I_h = E_x | dL/dxi_h | = E_x | Att_h(x)^T dL/dAtt_h(x) |,    then divided by the L2 norm over the heads of a layer

Heads are removed over all layers in the order of I_h. A gate xi_h is a factor on the rows of the head's matrix, so it
works in every host (`HeadGates`); in our own layers a gated-out head can be cut out for good (`prune`), which removes
4 * dim * head_dim weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer
from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.explain.base import Reading, small_host
from crosslight.hosts import Call, sites, steer
from crosslight.hosts.base import Where
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

CARD = Card(
    id="sixteen-heads",
    kind="explain",
    group="explain",
    title="Are Sixteen Heads Really Better than One?",
    year=2019,
    paper="1905.10650",
    code="pmichel31415/are-16-heads-really-better-than-1",
    summary="Scores every head by the gradient of the loss with respect to a gate on it, and prunes in that order.",
    checked="|<Att_h, dL/dAtt_h>| a sample, zeroed slices of the output projection, parameter counts after pruning",
    evidence=Evidence(
        claim="with half of the heads removed a transformer keeps more accuracy by importance than in random order",
        task="prune-heads",
        metric="accuracy",
        margin=0.05,
        baseline="none",
    ),
)


class HeadGates:
    """A rule for `crosslight.steer`: factors on the heads of each site, 1 keeps a head and 0 removes it.

    Args:
        gates: by site name, (heads,) or (batch, heads). Sites without an entry are left alone.
    """

    def __init__(self, gates: Mapping[str, Float[Tensor, "... heads"]]) -> None:
        self.gates = gates

    def __call__(self, weights: Float[Tensor, "batch heads n m"], call: Call) -> Float[Tensor, "batch heads n m"]:
        gate = self.gates.get(call.site.name)
        return weights if gate is None else weights * gate[..., None, None].to(weights)


@register(CARD)
class HeadImportance:
    """``HeadImportance()(model, batches, loss) -> Reading`` with scores (heads,) by site.

    Args:
        normalise: divide the scores of a site by their L2 norm, as in the paper.
        where: which sites take part, as in `crosslight.watch`.
    """

    def __init__(self, normalise: bool = True, where: Where = None) -> None:
        self.normalise, self.where = normalise, where

    @classmethod
    def sample(cls, **options: Any) -> tuple[HeadImportance, dict[str, Any]]:
        """An instance and inputs for it, for the conformance suite."""
        model, inputs = small_host()
        return cls(**options), {"model": model, "batches": [inputs], "loss": lambda m, x: m(x).square().sum((1, 2))}

    def __call__(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> Reading:
        """One forward and backward pass over ``batches``.

        Args:
            loss: from model and batch the loss, one number a sample (batch,), or their mean.
        """
        total: dict[str, Tensor] = {}
        count = 0
        for batch in batches:
            gates: dict[str, Tensor] = {}

            def gate(weights: Tensor, call: Call, gates: dict[str, Tensor] = gates) -> Tensor:
                # A gate a sample: the expectation of absolute values needs each sample's own gradient.
                xi = gates.get(call.site.name)
                if xi is None:
                    xi = gates[call.site.name] = torch.ones(weights.shape[:2], device=weights.device).requires_grad_()
                return weights * xi[..., None, None].to(weights.dtype)

            with torch.enable_grad():
                with steer(model, gate, self.where):
                    value = loss(model, batch)
                size = next(iter(gates.values())).shape[0]
                value = value.sum() if value.dim() else value * size
            for name, g in zip(gates, torch.autograd.grad(value, list(gates.values())), strict=True):
                total[name] = total.get(name, 0) + g.abs().sum(0)
            count += size
        expect(count > 0, "batches", "none", "at least one batch")
        scores = {name: t / count for name, t in total.items()}
        if self.normalise:
            scores = {name: s / s.norm().clamp(min=1e-12) for name, s in scores.items()}
        return Reading(scores, unit="head")


def head_importance(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], **options: Any
) -> Reading:
    """Importance of every head; ``options`` as in `HeadImportance`."""
    return HeadImportance(**options)(model, batches, loss)


def keep_most_important(reading: Reading, share: float) -> dict[str, Float[Tensor, " heads"]]:
    """Gates that keep the ``share`` of all heads with the highest scores; each site keeps its best one.

    Args:
        share: of the heads of all sites, from 0 to 1.
    """
    expect(0 <= share <= 1, "share", share, "a number from 0 to 1")
    flat = torch.cat(list(reading.scores.values()))
    kept = torch.zeros_like(flat)
    kept[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = 1
    gates = dict(zip(reading.scores, kept.split([len(s) for s in reading.scores.values()]), strict=True))
    for name, scores in reading.scores.items():
        gates[name][scores.argmax()] = 1
    return gates


def prune(model: nn.Module, gates: Mapping[str, Float[Tensor, " heads"]]) -> nn.Module:
    """Cut the heads whose gate is 0 out of our own attention layers, in place.

    Raises:
        CrosslightError: a site that is no `AttentionLayer`, has grouped heads or a core with parameters of its own,
            or would lose all heads.
    """
    known = {site.name: site for site in sites(model)}
    for name, gate in gates.items():
        expect(name in known, "gates", repr(name), f"sites of the model: {', '.join(known)}")
        layer = known[name].module
        expect(
            isinstance(layer, AttentionLayer) and layer.kv_heads == layer.heads and not list(layer.core.parameters()),
            "gates",
            f"{name}, a {type(layer).__name__}",
            "a Crosslight layer with as many key as query heads, whose core has no parameters",
        )
        assert isinstance(layer, AttentionLayer)
        kept = gate.nonzero().squeeze(-1).tolist()
        expect(len(kept) > 0, "gates", f"no head kept at {name}", "at least one")
        _cut(layer, kept)
    return model


def _cut(layer: AttentionLayer, kept: Sequence[int]) -> None:
    d = layer.head_dim
    rows = torch.cat([torch.arange(h * d, (h + 1) * d) for h in kept]).to(layer.out.weight.device)
    for projection in (layer.q, layer.k, layer.v):
        projection.weight = nn.Parameter(projection.weight.detach()[rows])
        if projection.bias is not None:
            projection.bias = nn.Parameter(projection.bias.detach()[rows])
        projection.out_features = len(rows)
    layer.out.weight = nn.Parameter(layer.out.weight.detach()[:, rows])
    layer.out.in_features = len(rows)
    layer.heads = layer.kv_heads = layer.core.heads = len(kept)
