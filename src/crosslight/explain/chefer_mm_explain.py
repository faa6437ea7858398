"""Relevance of the tokens of one, two or more streams, from attention maps and their gradients.

Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers",
2021, arXiv 2103.15679.

R_sq (batch, n_s, n_q) is the relevance of stream q's tokens for those of stream s; at first R_ss = I and R_sq = 0.
In the order of the forward pass, for each attention call with matrix A (batch, heads, n, m), y the explained output:

    Abar = mean_heads (dy/dA * A)^+
    self-attention of s:            R_ss += Abar R_ss,     R_sq += Abar R_sq
    queries in s, keys in q:        R_sq += Rbar_ss^T Abar Rbar_qq,     R_ss += Abar R_qs
    Rbar = (R - I) / rowsum(R - I) + I

Both directions of a co-attention layer use the maps from before the layer. The explanation of a token of stream s are
its rows of R_ss and R_sq, without its own residual 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosslight.cards import Card, Evidence
from crosslight.errors import CrosslightError, expect
from crosslight.explain.base import Reading, Target, run, small_host
from crosslight.hosts import Site, watch
from crosslight.hosts.base import Where
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

CARD = Card(
    id="chefer-mm-explain",
    kind="explain",
    group="explain",
    title="Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers",
    year=2021,
    paper="2103.15679",
    code="hila-chefer/Transformer-MM-Explainability",
    summary="Carries gradient-weighted attention through all layers to the tokens of every stream.",
    checked="the closed product of one stream, the rules written out for two streams and for encoder-decoder, limits",
    differs="Where R - I has a row of zeros its normalisation is 0 / 0; here the row stays zero.",
    evidence=Evidence(
        claim="dropping the tokens of highest relevance lowers accuracy more than those of highest attention",
        task="pointer-vqa",
        metric="drop",
        margin=0.02,
        baseline="none",
    ),
)

#: (site, whether it read another stream, n, m) -> names of the query's and the key's stream.
Streams = Callable[[Site, bool, int, int], tuple[str, str]]


@register(CARD)
class Relevance:
    """``Relevance()(model, inputs, target) -> Reading``.

    Args:
        token: which token of the output's stream is explained; its row is the reading's scores.
        stream: the stream of the explained token; that of the last attention call unless given.
        streams: names the streams of a call. Unless given, sites below an "encoder" or "decoder" belong to it, and
            in other models streams are told apart by their lengths.
        where: which sites take part, as in `crosslight.watch`.
    """

    def __init__(
        self, token: int = 0, stream: str | None = None, streams: Streams | None = None, where: Where = None
    ) -> None:
        self.token, self.stream, self.streams, self.where = token, stream, streams, where

    @classmethod
    def sample(cls, **options: Any) -> tuple[Relevance, dict[str, Any]]:
        """An instance and inputs for it, for the conformance suite."""
        model, inputs = small_host()
        return cls(**options), {"model": model, "inputs": inputs, "target": lambda out: out[:, 0].sum(-1)}

    def __call__(self, model: nn.Module, inputs: Any, target: Target) -> Reading:
        """Explain.

        Args:
            model: any host, in eval mode.
            inputs: one input, a tuple, or a mapping of named inputs.
            target: from the model's output the explained score, a scalar or one number a sample.

        Returns:
            Scores by stream, (batch, tokens), and the full R by pair of streams, without the identity of R_ss.
        """
        expect(callable(target), "target", type(target).__name__, "a function of the model's output")
        with torch.enable_grad(), watch(model, self.where, grad=True) as seen:
            score = target(run(model, inputs)).sum()
        calls = seen.calls
        if not calls:
            raise CrosslightError("model: ran without an attention call at the chosen sites, expected at least one")
        gradients = torch.autograd.grad(score, [c.map for c in calls], allow_unused=True)
        name = self.streams or _names([(c.site, c.cross, *c.map.shape[-2:]) for c in calls])
        layers = []
        for c, g in zip(calls, gradients, strict=True):
            s, q = name(c.site, c.cross, *c.map.shape[-2:])
            a = c.map.detach()
            bar = torch.zeros_like(a[:, 0]) if g is None else (g * a).clamp(min=0).mean(1)
            layers.append((s, q, bar))
        relevance = propagate(layers)

        stream = self.stream or layers[-1][0]
        known = {s for s, _ in relevance}
        expect(stream in known, "stream", repr(stream), f"one of {', '.join(sorted(known))}")
        scores = {q: r[:, self.token] for (s, q), r in relevance.items() if s == stream}
        return Reading(scores, relevance)


def relevance(model: nn.Module, inputs: Any, target: Target, **options: Any) -> Reading:
    """Relevance of every stream's tokens for ``target``; ``options`` as in `Relevance`."""
    return Relevance(**options)(model, inputs, target)


def propagate(layers: list[tuple[str, str, Float[Tensor, "batch n m"]]]) -> dict[tuple[str, str], Tensor]:
    """R - I of every pair of streams from (query stream, key stream, Abar) of each call in order."""
    sizes: dict[str, Tensor] = {}
    for s, q, a in layers:
        sizes.setdefault(s, torch.eye(a.shape[1], dtype=a.dtype, device=a.device).expand(a.shape[0], -1, -1))
        sizes.setdefault(q, torch.eye(a.shape[2], dtype=a.dtype, device=a.device).expand(a.shape[0], -1, -1))
    r = {
        (s, q): i if s == q else i.new_zeros(i.shape[0], i.shape[1], sizes[q].shape[1])
        for s, i in sizes.items()
        for q in sizes
    }
    for group in _together(layers):
        added = []
        for s, q, a in group:
            if s == q:
                added += [((s, other), a @ r[s, other]) for other in sizes]
            else:
                added.append(((s, q), _normalised(r[s, s]).transpose(1, 2) @ a @ _normalised(r[q, q])))
                added.append(((s, s), a @ r[q, s]))
        for pair, change in added:
            r[pair] = r[pair] + change
    return {(s, q): m - sizes[s] if s == q else m for (s, q), m in r.items()}


def _together(layers):
    """Calls whose updates belong to one layer: the two directions of a co-attention."""
    groups: list[list] = []
    for s, q, a in layers:
        last = groups[-1] if groups else []
        if s != q and len(last) == 1 and (last[0][0], last[0][1]) == (q, s):
            last.append((s, q, a))
        else:
            groups.append([(s, q, a)])
    return groups


def _normalised(r: Float[Tensor, "batch n n"]) -> Float[Tensor, "batch n n"]:
    identity = torch.eye(r.shape[1], dtype=r.dtype, device=r.device)
    rest = r - identity
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / torch.where(total > 0, total, 1), 0) + identity


def _names(calls: list[tuple[Site, bool, int, int]]) -> Streams:
    """How to tell the streams of these calls apart."""
    cross = [(n, m) for _, crosses, n, m in calls if crosses]
    if not cross:
        return lambda site, crosses, n, m: ("input", "input")
    if any("decoder" in site.name for site, *_ in calls):

        def by_path(site: Site, crosses: bool, n: int, m: int) -> tuple[str, str]:
            if crosses:
                return "decoder", "encoder"
            return ("decoder", "decoder") if "decoder" in site.name else ("encoder", "encoder")

        return by_path
    if any(n == m for n, m in cross):
        raise CrosslightError(
            "streams: got None for two streams of the same length, expected a function (site, cross, n, m) -> names"
        )
    lengths = {length: None for _, _, n, m in calls for length in (n, m)}
    named = {length: f"stream {i}" for i, length in enumerate(lengths)}
    return lambda site, crosses, n, m: (named[n], named[m])
