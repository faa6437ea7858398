"""What every kind token row attends to in the atlas: one 8 x 8 digit, and the layer that looks at it."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import crosslight
from crosslight import registry

SIDE = 8
DIM, HEADS = 32, 4
#: Pixel 3 of scikit-learn's digits (a three), a row a line and a pixel a character, from 0 to g = 16.
DIGIT = "007fd100 08d6f400 021dd000 002fb100 0001cc10 00001a80 00845e90 007dd900"
#: The pixel whose reading is shown: row 4, column 4, on the stroke.
QUERY = 4 * SIDE + 4
#: Size of the features. Large, so that a layer that was never trained has preferences.
STRENGTH = 2.5
#: Sizes that fit 64 tokens, where neither the defaults nor those of the card's tests do.
SIZES: dict[str, dict[str, Any]] = {
    "aki-mma": {"images": 32, "prompt": 48},
    "dat-plus-plus": {"size": 8},
    "ee-mllm": {"images": 32},
    "kmax-deeplab": {"assign": "argmax", "context_grid": (SIDE, SIDE)},
    "lacing": {"images": 32},
    "landmark-attention": {"block": 7},
    "moda": {"images": 32, "prompt": 48},
    "mw-mae": {"windows": [4, 8, 16, 0]},
    "uni-encoder": {"context": 16, "candidate": 8},
}


@dataclass(frozen=True)
class Look:
    """What `weights` of a layer shows in one pattern: (matrices, n, 64)."""

    pattern: str
    weights: Tensor
    signed: bool


@cache
def digit() -> Tensor:
    """The example as grey values from 0 to 1, (8, 8)."""
    return torch.tensor([[int(pixel, 17) / 16 for pixel in line] for line in DIGIT.split()])


@cache
def tokens(dim: int = DIM) -> Tensor:
    """The example as 64 tokens, (1, 64, dim): the grey value and sines of row and column, projected at random."""
    ink = digit().flatten()[:, None] - digit().mean()
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float() / SIDE
    waves = [f(math.pi * k * p) for p in places.T[..., None] for k in (1, 2) for f in (torch.sin, torch.cos)]
    features = torch.cat([4 * ink, *waves], 1)
    features = features - features.mean(0)
    generator = torch.Generator().manual_seed(0)
    x = features @ torch.randn(features.shape[1], dim, generator=generator)
    return (STRENGTH * x / x.square().mean().sqrt())[None]


def options(id: str) -> dict[str, Any]:
    """With what the layer is built."""
    entry = registry.index()[id]
    heads = {} if entry["options"].get("heads") in (None, "1") else {"heads": HEADS}
    return {"dim": DIM, **heads, **entry["small"], **SIZES.get(id, {})}


@cache
def looks(id: str) -> tuple[Look, ...]:
    """What a layer that was never trained (seed 0) reads of the example, in the patterns that the atlas shows.

    Raises:
        NotImplementedError: the row has no matrix.
    """
    patterns = registry.index()[id]["patterns"]
    shown = [p for p in ("noncausal-self", "causal-self") if p in patterns] or patterns[:1]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer = crosslight.create(id, **options(id)).eval()
        return tuple(_look(layer, pattern) for pattern in shown)


def _look(layer: Any, pattern: str) -> Look:
    cross = pattern.endswith("cross")
    x = tokens(layer.dim)
    asks = None if cross and layer.learned_queries else x
    grid = {"grid": (SIDE, SIDE)} if "grid" in inspect.signature(layer.weights).parameters else {}
    weights = layer.weights(asks, x if cross else None, causal=pattern.startswith("causal"), **grid)[0]
    return Look(pattern, weights, bool((weights < -1e-6).any()))
