"""CrossViT: two scales of an image exchange through their class tokens.

Chen, Fan, Panda, "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", 2021,
arXiv 2103.14899.

The fusion block. Branch A has a class token and patches, a = [c ; P_a] (batch, 1 + n_a, d_a), branch B likewise. For A
(and at the same time for B, with the roles exchanged):

    c'  = f(c)                 f, g: LayerNorm, GELU, Linear to the other branch's width
    x'  = [c' ; P_b]
    c'' = c' + MHA(query N(c'), keys and values N(x'))          one query: linear in the number of tokens
    a  <- [g(c'') ; P_a]       no residual to c; the patches stay as they are

With ``rounds`` = L > 1 the third line is repeated, each time with weights of its own. Streams: two branches, both
written, each with its class token first. Beside plain multi-head attention: only the class tokens cross, and they go to
the other branch's space and back.

The network. Two ViT branches (small and large patches, each with class token and position embedding), then stages: a
few blocks of the small branch, more of the large one, then the fusion block. The output is the mean of both branches'
logits, each a linear map of the normalised class token. The dagger variants embed patches with three convolutions.

    create("crossvit", streams={"small": 96, "large": 192}, heads=3)     the fusion block
    create("crossvit", preset="tiny_240")                                the network
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslight.cards import Card, Evidence
from crosslight.errors import expect
from crosslight.fusion.base import Fusion, mechanism
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Branch = Float[Tensor, "batch tokens dim"]
    Images = Float[Tensor, "batch channels height width"]
    Logits = Float[Tensor, "batch classes"]

CARD = Card(
    id="crossvit",
    kind="fusion",
    group="cross-scale",
    title="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    year=2021,
    paper="2103.14899",
    code="IBM/CrossViT",
    summary="Two ViT branches of different patch size exchange by letting each class token attend to the other "
    "branch's patches.",
    cost="n",
    checked="timm.models.crossvit.CrossVit with the same weights; the parameter counts of its eleven variants",
    differs="With more than one round, each round reads the patches, as the paper says; the released code and timm "
    "hand only the class token on to the second (no published variant has one). Stochastic depth is left to training.",
    evidence=Evidence(
        claim="With fusion, two scales classify better than the mean of the two branches' logits",
        task="two-scales",
        metric="accuracy",
        margin=0.05,
        baseline="none",
    ),
)


class _Crossing(nn.Module):
    """One direction: the class token of a branch goes to the other's width, reads its patches, and comes back."""

    def __init__(
        self, dim: int, other: int, heads: int, rounds: int, attention: str, options: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.GELU(), nn.Linear(dim, other))
        self.norms = nn.ModuleList(nn.LayerNorm(other, eps=1e-6) for _ in range(rounds))
        self.attend = nn.ModuleList(
            mechanism(attention, dim=other, heads=heads, pattern="noncausal-cross", options=options)
            for _ in range(rounds)
        )
        self.back = nn.Sequential(nn.LayerNorm(other, eps=1e-6), nn.GELU(), nn.Linear(other, dim))

    def forward(self, own: Branch, other: Branch, mask: Tensor | None) -> Branch:
        c = self.into(own[:, :1])
        for norm, attend in zip(self.norms, self.attend, strict=True):
            x = norm(torch.cat([c, other[:, 1:]], 1))
            c = c + attend(x[:, :1], x, mask=mask)
        return torch.cat([self.back(c), own[:, 1:]], 1)

    def weights(self, own: Branch, other: Branch, mask: Tensor | None) -> Tensor:
        """Of the last round: (batch, heads, 1, tokens of the other branch), the class token itself first."""
        attend: Any
        c = self.into(own[:, :1])
        for i, (norm, attend) in enumerate(zip(self.norms, self.attend, strict=True), start=1):
            x = norm(torch.cat([c, other[:, 1:]], 1))
            if i == len(self.norms):
                break
            c = c + attend(x[:, :1], x, mask=mask)
        return attend.weights(x[:, :1], x, mask=mask)


class CrossFusion(Fusion):
    """The fusion block: two branches (batch, 1 + patches, width), class token first, in and out.

    Args:
        streams: names and widths of the two branches.
        heads: attention heads in the space of each branch (one int for both).
        rounds: L, cross-attentions one after another in each direction.
        attention: the mechanism by which a class token reads, with ``attention_options``.
    """

    card: ClassVar[Card] = CARD

    def __init__(
        self,
        streams: Mapping[str, int],
        heads: int | Sequence[int] = 8,
        *,
        rounds: int = 1,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(streams)
        expect(len(self.widths) == 2, "streams", ", ".join(self.widths), "the two branches")
        expect(rounds >= 1, "rounds", rounds, "1 or more")
        (a, dim_a), (b, dim_b) = self.widths.items()
        self.pairs = ((a, b), (b, a))
        heads_a, heads_b = (heads, heads) if isinstance(heads, int) else heads
        self.crossings = nn.ModuleList(
            _Crossing(dim, other, h, rounds, attention, attention_options)
            for dim, other, h in ((dim_a, dim_b, heads_b), (dim_b, dim_a, heads_a))
        )

    @property
    def flow(self):
        return {own: (own, other) for own, other in self.pairs}

    @classmethod
    def sample(cls, **options):
        block = cls(**{"streams": {"small": 16, "large": 24}, "heads": 2, **options})
        return block, {name: torch.randn(2, 7 - i, width) for i, (name, width) in enumerate(block.widths.items())}

    def _forward(self, streams, masks):
        return {
            own: crossing(streams[own], streams[other], self._readable(masks.get(other)))
            for crossing, (own, other) in zip(self.crossings, self.pairs, strict=True)
        }

    def _weights(self, streams, masks):
        maps: dict[tuple[str, str], Tensor] = {}
        crossing: Any
        for crossing, (own, other) in zip(self.crossings, self.pairs, strict=True):
            maps[own, other] = crossing.weights(streams[own], streams[other], self._readable(masks.get(other)))
        return maps

    @staticmethod
    def _readable(mask):
        """In the other's sequence the reader's own class token stands first, and it may always read itself."""
        return None if mask is None else F.pad(mask[:, 1:], (1, 0), value=True)


class _Block(nn.Module):
    """A pre-norm ViT block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attend = mechanism("softmax", dim=dim, heads=heads, pattern="noncausal-self", options=None)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Branch) -> Branch:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _embedding(patch: int, channels: int, dim: int, convs: bool) -> nn.Module:
    """(batch, channels, height, width) -> (batch, dim, height / patch, width / patch)."""
    if not convs:
        return nn.Conv2d(channels, dim, patch, patch)
    expect(patch in (12, 16), "patch_size", patch, "12 or 16 with convs=True")
    second, third = ((3, 0), (1, 1)) if patch == 12 else ((2, 1), (2, 1))
    return nn.Sequential(
        nn.Conv2d(channels, dim // 4, 7, 4, 3),
        nn.ReLU(),
        nn.Conv2d(dim // 4, dim // 2, 3, second[0], second[1]),
        nn.ReLU(),
        nn.Conv2d(dim // 2, dim, 3, third[0], third[1]),
    )


class _Stage(nn.Module):
    """Blocks of both branches, then the fusion block (or none)."""

    def __init__(self, branches: Sequence[nn.Module], fusion: nn.Module | None) -> None:
        super().__init__()
        self.branches, self.fusion = nn.ModuleList(branches), fusion

    def forward(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        small, large = self.branches[0](small), self.branches[1](large)
        if self.fusion is None:
            return small, large
        out = self.fusion({"small": small, "large": large})
        return out["small"], out["large"]


def _preset(dims, blocks, heads, mlp_ratio=3, convs=False, image_size=(240, 224)):
    return {
        "image_size": image_size,
        "dims": dims,
        "blocks": blocks,
        "heads": heads,
        "mlp_ratio": mlp_ratio,
        "convs": convs,
    }


@register(CARD)
class CrossViT(nn.Module):
    """The network: images (batch, channels, height, width) -> logits (batch, classes).

    `build`, which `create` calls, gives the fusion block instead where ``streams`` are given.

    Args:
        image_size: side of the image in the small-patch and the large-patch branch; input is resized to it (bicubic).
        patch_size, dims, heads, blocks: of the two branches; ``blocks`` is per stage.
        mlp_ratio: hidden width of the blocks' MLPs as a multiple of their width.
        stages: K, each with one fusion block.
        convs: embed patches with three convolutions (the dagger variants).
        rounds: L of the fusion blocks; 0 leaves fusion out, so that only the logits of the branches are averaged.
        attention: the mechanism of the fusion blocks, with ``attention_options``.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny_240": _preset((96, 192), (1, 4), (3, 3), 4),
        "small_240": _preset((192, 384), (1, 4), (6, 6), 4),
        "base_240": _preset((384, 768), (1, 4), (12, 12), 4),
        "9_240": _preset((128, 256), (1, 3), (4, 4)),
        "15_240": _preset((192, 384), (1, 5), (6, 6)),
        "18_240": _preset((224, 448), (1, 6), (7, 7)),
        "9_dagger_240": _preset((128, 256), (1, 3), (4, 4), convs=True),
        "15_dagger_240": _preset((192, 384), (1, 5), (6, 6), convs=True),
        "18_dagger_240": _preset((224, 448), (1, 6), (7, 7), convs=True),
        "15_dagger_408": _preset((192, 384), (1, 5), (6, 6), convs=True, image_size=(408, 384)),
        "18_dagger_408": _preset((224, 448), (1, 6), (7, 7), convs=True, image_size=(408, 384)),
    }
    #: Parameters of the published variants, as timm builds them.
    published: ClassVar[dict[str, int]] = {
        "tiny_240": 7_014_800,
        "small_240": 26_856_272,
        "base_240": 105_025_232,
        "9_240": 8_553_296,
        "15_240": 27_528_464,
        "18_240": 43_271_408,
        "9_dagger_240": 8_776_592,
        "15_dagger_240": 28_209_008,
        "18_dagger_240": 44_266_976,
        "15_dagger_408": 28_500_080,
        "18_dagger_408": 44_606_560,
    }
    sample = CrossFusion.sample

    def __init__(
        self,
        *,
        image_size: tuple[int, int] = (240, 224),
        patch_size: tuple[int, int] = (12, 16),
        dims: tuple[int, int] = (96, 192),
        heads: tuple[int, int] = (3, 3),
        blocks: tuple[int, int] = (1, 4),
        mlp_ratio: float = 4,
        stages: int = 3,
        convs: bool = False,
        rounds: int = 1,
        channels: int = 3,
        classes: int = 1000,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for size, patch in zip(image_size, patch_size, strict=True):
            expect(size % patch == 0, "image_size", image_size, f"multiples of the patch sizes {patch_size}")
        self.image_size, self.channels = tuple(image_size), channels
        tokens = [1 + (size // patch) ** 2 for size, patch in zip(image_size, patch_size, strict=True)]
        self.embed = nn.ModuleList(_embedding(p, channels, d, convs) for p, d in zip(patch_size, dims, strict=True))
        self.class_token = nn.ParameterList(nn.Parameter(torch.empty(1, 1, d)) for d in dims)
        self.position = nn.ParameterList(nn.Parameter(torch.empty(1, n, d)) for n, d in zip(tokens, dims, strict=True))

        def stage() -> _Stage:
            branches = [
                nn.Sequential(*(_Block(d, h, mlp_ratio) for _ in range(n)))
                for d, h, n in zip(dims, heads, blocks, strict=True)
            ]
            if rounds == 0:
                return _Stage(branches, None)
            streams = dict(zip(("small", "large"), dims, strict=True))
            how = {"attention": attention, "attention_options": attention_options}
            return _Stage(branches, CrossFusion(streams, heads, rounds=rounds, **how))  # type: ignore[arg-type]

        self.stages = nn.ModuleList(stage() for _ in range(stages))
        self.norms = nn.ModuleList(nn.LayerNorm(d, eps=1e-6) for d in dims)
        self.heads = nn.ModuleList(nn.Linear(d, classes) for d in dims)
        for parameter in (*self.class_token, *self.position):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def build(cls, streams: Mapping[str, int] | None = None, **own: Any) -> CrossViT | CrossFusion:
        """The fusion block where ``streams`` are given, else the network."""
        if streams is None:
            return cls(**own)
        block_options = ("heads", "rounds", "attention", "attention_options")
        extra = [name for name in own if name not in block_options]
        expect(not extra, "options of 'crossvit'", ", ".join(extra), f"with streams only {', '.join(block_options)}")
        return CrossFusion(streams, **own)

    def branches(self, images: Images) -> tuple[Branch, Branch]:
        """The tokens of both branches after the last stage, class token first."""
        expect(
            images.dim() == 4 and images.shape[1] == self.channels,
            "images",
            tuple(images.shape),
            f"(batch, {self.channels}, height, width)",
        )
        tokens = []
        for size, embed, token, position in zip(
            self.image_size, self.embed, self.class_token, self.position, strict=True
        ):
            x = images
            if x.shape[2:] != (size, size):
                x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
            x = embed(x).flatten(2).transpose(1, 2)
            tokens.append(torch.cat([token.expand(len(x), -1, -1), x], 1) + position)
        small, large = tokens
        for stage in self.stages:
            small, large = stage(small, large)
        return small, large

    def forward(self, images: Images) -> Logits:
        logits = [
            head(norm(tokens[:, 0]))
            for head, norm, tokens in zip(self.heads, self.norms, self.branches(images), strict=True)
        ]
        return torch.stack(logits).mean(0)
