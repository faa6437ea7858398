"""VAR: visual attention redistribution, from image sink tokens to the rest of the image.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", 2025, arXiv 2503.03321.

    phi(x) = max_{d in D_sink} |x_d| / RMS(x)               x the layer's input; a token is a sink if phi(x) > tau
    a row is image-centric if     sum_image A >= min_image_mass
                         and      sum_{image sinks} A <= rho * sum_image A
    in these rows:   A_j <- p A_j                           for every sink j, in image and text
                     A_j <- A_j + Omega A_j / sum_rest A    for the rest of the image, Omega = (1 - p) sum_sinks A

Rows still sum to 1; ratios inside the rest of the image stay. Only queries outside the image are edited. D_sink are the
dimensions of massive activations of the language model, found once a model: 1415 and 2533 for LLaMA-2-7B. The paper
leaves the first two layers and the last alone (`where`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosslight import registry
from crosslight.cards import Card, Evidence
from crosslight.errors import CrosslightError, expect
from crosslight.hosts import Call, Site, sites
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

CARD = Card(
    id="var-visual-sink",
    kind="control",
    group="vision-language",
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    year=2025,
    paper="2503.03321",
    code="seilk/VisAttnSink",
    summary="Moves attention from image sink tokens to the rest of the image, in the heads that look at the image.",
    checked="row sums, untouched rows bit for bit, kept ratios, planted massive dimensions",
    evidence=Evidence(
        claim="with a planted sink that draws attention, the edit raises the accuracy of answers about the image",
        task="planted-sink",
        metric="accuracy",
        margin=0.02,
        baseline="none",
        options={"image": (0, 16), "dims": (0, 1), "tau": 4.0},
    ),
)


@register(CARD)
class VisualAttentionRedistribution:
    """The rule. Steer with it where the paper does: ``steer(model, rule, where=rule.where(model))``.

    Args:
        image: first image token and the one after the last, as positions in the sequence.
        dims: D_sink, the dimensions of massive activations.
        tau, rho, min_image_mass, p: as in the equations.
        strength: 0 changes nothing, 1 is the paper's edit; between them p goes from 1 to its value.
    """

    def __init__(
        self,
        image: tuple[int, int],
        dims: Sequence[int] = (1415, 2533),
        tau: float = 20.0,
        rho: float = 0.5,
        min_image_mass: float = 0.2,
        p: float = 0.6,
        strength: float = 1.0,
    ) -> None:
        expect(len(image) == 2 and 0 <= image[0] < image[1], "image", image, "(first, one after the last)")
        expect(len(dims) > 0, "dims", dims, "at least one dimension")
        expect(0 <= p <= 1, "p", p, "a number from 0 to 1")
        expect(0 <= strength <= 1, "strength", strength, "a number from 0 to 1")
        self.image, self.dims = image, tuple(dims)
        self.tau, self.rho, self.min_image_mass, self.p, self.strength = tau, rho, min_image_mass, p, strength
        self._seen: dict[str, Bool[Tensor, "batch m"]] = {}

    @classmethod
    def sample(cls, **options: Any) -> tuple[VisualAttentionRedistribution, dict[str, Any]]:
        """An instance, and a model with inputs in which image token 2 is a sink, for the conformance suite."""
        x = torch.randn(2, 8, 16).clamp(-2, 2)
        x[:, 2, 0] = 60.0
        model = nn.Sequential(registry.create("softmax", dim=16, heads=2)).eval()
        known = {"image": (1, 6), "dims": (0,), "tau": 3.5, "rho": 1.0, "min_image_mass": 0.0}
        return cls(**{**known, **options}), {"model": model, "inputs": x}

    def where(self, model: nn.Module) -> Callable[[Site], bool]:
        """The layers that the paper edits: all but the first two and the last."""
        names = [site.name for site in sites(model) if site.stream == "self"]
        expect(len(names) > 3, "model", f"{len(names)} self-attention layers", "more than 3, of which 3 are left alone")
        return lambda site: site.name in names[2:-1]

    def sinks(self, hidden: Float[Tensor, "batch n dim"]) -> Bool[Tensor, "batch n"]:
        """Which tokens are sinks, from the layer's input."""
        width = hidden.shape[-1]
        expect(max(self.dims) < width, "dims", self.dims, f"dimensions of a layer of width {width}")
        rms = hidden.float().square().mean(-1).sqrt().clamp(min=1e-12)
        return hidden[..., list(self.dims)].abs().amax(-1).float() / rms > self.tau

    def __call__(self, weights: Float[Tensor, "batch heads n m"], call: Call) -> Float[Tensor, "batch heads n m"]:
        hidden = call.residual if call.residual is not None else call.hidden
        if hidden is None:
            raise CrosslightError(f"host: got no layer input at {call.site.name}, expected one that shows it")
        n, m = weights.shape[-2:]
        sink = self._remembered(self.sinks(hidden), call.site.name, m)
        key = torch.arange(m, device=weights.device)
        image = (key >= self.image[0]) & (key < self.image[1])
        query = torch.arange(m - n, m, device=weights.device)
        asked = ~((query >= self.image[0]) & (query < self.image[1]))[:, None]

        sink = sink[:, None, None, :]
        rest = image & ~sink
        image_mass = (weights * image).sum(-1, keepdim=True)
        image_sink_mass = (weights * (image & sink)).sum(-1, keepdim=True)
        rest_mass = (weights * rest).sum(-1, keepdim=True)
        edited = (
            asked
            & (image_mass >= self.min_image_mass)
            & (image_sink_mass <= self.rho * image_mass)
            & (rest_mass > 0)
            & sink.any(-1, keepdim=True)
        )
        p = 1 - self.strength * (1 - self.p)
        budget = (1 - p) * (weights * sink).sum(-1, keepdim=True)
        moved = torch.where(sink, p * weights, weights)
        moved = torch.where(rest, weights * (1 + budget / rest_mass.clamp(min=torch.finfo(weights.dtype).tiny)), moved)
        return torch.where(edited, moved, weights)

    def _remembered(self, new: Bool[Tensor, "batch n"], site: str, m: int) -> Bool[Tensor, "batch m"]:
        """Sinks among all m keys: in generation a layer sees new tokens only, and the earlier ones are remembered."""
        if new.shape[1] != m:
            before = self._seen.get(site)
            known = before is not None and before.shape[1] + new.shape[1] == m and before.shape[0] == new.shape[0]
            got = f"{new.shape[1]} tokens before {m} keys"
            expect(known, "model", got, "the whole sequence first, then its next tokens")
            assert before is not None
            new = torch.cat([before, new], 1)
        self._seen[site] = new
        return new
