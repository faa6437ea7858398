"""Skim-Attention: who reads whom on a page follows from where the words stand alone, and is worked out once.

Nguyen, Scialom, Staiano, Piwowarski, "Skim-Attention: Learning to Focus via Document Layout", 2021, arXiv 2109.01078.

Word i has a box (x0, y0, x1, y1) in 0..1000. With learned embeddings E of coordinates and sizes:

    l_i = LN(E_x(x0) + E_y(y0) + E_x(x1) + E_y(y1) + E_h(y1 - y0) + E_w(x1 - x0))              (batch, n, layout_dim)
    A = softmax((L W_Q) (L W_K)^T / sqrt(d))                                                 (batch, heads, n, n)
    y = W_o [A_h X W_V]_h                                                                    (batch, n, dim)

The text x has no part in A. Boxes are given as ``boxes=`` (integers, (batch or 1, n, 4)). Without them tokens stand in
the cells of ``grid=``, or in lines of ``line`` words in reading order. ``layout="centres"`` sees of a box its centre
only, ``layout="order"`` the place in the sequence only.

`Skimformer` is the network, ``create("skim-attention", preset="base")``: text embeddings without positions, one A, and
layers that only mix values by it, X <- LN(X + W_o [A_h X W_V]_h), X <- LN(X + FFN(X)). Options: a small encoder over L
(``layout_layers``), and Longformer windows in place of all pairs (``window``).

`skimming` is the paper's SkimmingMask: a trained A, its k largest entries a query, as a mask for any row; `Layout` is
the embedding of boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight.attention.backbone import Mlp
from crosslight.attention.base import AttentionLayer, How, head_width
from crosslight.attention.softmax import Softmax
from crosslight.cards import Card, Evidence
from crosslight.engines import masks
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Grid
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Stream = Float[Tensor, "batch n dim"]
    Boxes = Int[Tensor, "#batch n 4"]
    Heads = Float[Tensor, "batch heads n head_dim"]

See = Literal["boxes", "centres", "order"]
PAGE = 1000

CARD = Card(
    id="skim-attention",
    kind="token",
    group="positions-masks",
    title="Skim-Attention: Learning to Focus via Document Layout",
    year=2021,
    paper="2109.01078",
    code="recitalAI/skim-attention",
    summary="Queries and keys come from the boxes of the words on the page, values from the text: one attention matrix "
    "for all layers.",
    patterns=("noncausal-self", "causal-self"),
    why_not="The text asks nothing: across two streams the output would not depend on the one that reads.",
    cost="n^2",
    decode="kv",
    checked="torch.nn.MultiheadAttention on layout embeddings and text with the same weights; transformers' LayoutLM "
    "embeddings of boxes; the network against transformers' BERT layers given the same matrix; its size that of the "
    "authors' code",
    differs="The paper is noncausal; causal calls add the causal mask. Boxes that are not given are cells of a page, "
    "which the paper does not have. Dropout is left out. In the network a window applies in every layer, without the "
    "global tokens that Longformer adds and their weights; its pooler is left out.",
    evidence=Evidence(
        claim="with pixels as boxes, attention by place alone reads digits as well as attention by content and place",
        task="digits",
        metric="accuracy",
        margin=0.0,
    ),
)


def reading_order(n: int, line: int, *, offset: int = 0, device: torch.device | None = None) -> Boxes:
    """Boxes of ``n`` words in lines of ``line``, on a page of as many lines; words beyond it stand in the last line."""
    word = torch.arange(offset, offset + n, device=device)
    return _cells((word // line).clamp(max=line - 1), word % line, line, line)


def cells(grid: Grid, *, device: torch.device | None = None) -> Boxes:
    """Boxes of the cells of a grid (height, width)."""
    expect(len(grid) == 2, "grid", grid, "(height, width)")
    token = torch.arange(grid[0] * grid[1], device=device)
    return _cells(token // grid[1], token % grid[1], *grid)


def _cells(row: Tensor, column: Tensor, height: int, width: int) -> Boxes:
    x0, y0 = column * PAGE // width, row * PAGE // height
    return torch.stack([x0, y0, x0 + PAGE // width, y0 + PAGE // height], -1).unsqueeze(0)


def skimming(weights: Float[Tensor, "batch heads n m"], k: int) -> Mask:
    """The ``k`` keys that each query of each head reads most by ``weights`` (all where there are fewer), as a mask."""
    expect(isinstance(k, int) and k >= 1, "skimming(k)", k, "a number >= 1")
    most = weights.topk(min(k, weights.shape[-1]), dim=-1).indices
    return masks.Pairs(torch.zeros_like(weights, dtype=torch.bool).scatter(-1, most, True))


class Layout(nn.Module):
    """Boxes as vectors.

    Args:
        size: coordinates go from 0 to size - 1; for "order", the longest sequence.
        see: "boxes", "centres", or "order", which is given the first and last place instead of boxes.
    """

    def __init__(self, dim: int, size: int = 1024, see: See = "boxes", eps: float = 1e-12) -> None:
        super().__init__()
        expect(see in get_args(See), "layout", repr(see), f"one of {', '.join(get_args(See))}")
        self.see, self.size = see, size
        names = {"boxes": "xyhw", "centres": "xy", "order": "t"}[see]
        self.tables = nn.ModuleDict({name: nn.Embedding(size, dim) for name in names})
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, boxes: Boxes) -> Float[Tensor, "#batch n dim"]:
        x0, y0, x1, y1 = boxes.unbind(-1)
        t = self.tables
        if self.see == "centres":
            return self.norm(t["x"]((x0 + x1) // 2) + t["y"]((y0 + y1) // 2))
        return self.norm(t["x"](x0) + t["y"](y0) + t["x"](x1) + t["y"](y1) + t["h"](y1 - y0) + t["w"](x1 - x0))

    def order(self, n: int, offset: int = 0) -> Float[Tensor, "1 n dim"]:
        """The vectors of places in the sequence."""
        expect(offset + n <= self.size, "x", f"{offset + n} tokens", f"at most size = {self.size} with layout='order'")
        place = torch.arange(offset, offset + n, device=self.norm.weight.device)
        return self.norm(self.tables["t"](place)).unsqueeze(0)


@dataclass(frozen=True)
class Placed(How):
    """How a call attends, and where its tokens stand."""

    boxes: Tensor | None = None


class LayoutBlock(nn.Module):
    """One post-norm layer of the encoder over the layout, as in BERT."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.attend, self.mlp = Softmax.build(dim, heads), Mlp(dim, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Stream) -> Stream:
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.mlp(x))


class SkimBlock(nn.Module):
    """X <- LN(X + W_o [A_h X W_V]_h), then X <- LN(X + FFN(X))."""

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.heads = heads
        self.v, self.out = nn.Linear(dim, heads * head_dim), nn.Linear(heads * head_dim, dim)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps), Mlp(dim, hidden)

    def forward(self, x: Stream, mix: Callable[[Heads], Heads]) -> Stream:
        """``mix`` takes values (batch, heads, n, head_dim) to what is read."""
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        x = self.norm1(x + self.out(mix(v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.mlp(x))


class Skim(nn.Module):
    """A of a layout: embedding, the encoder over it if any, queries and keys."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, layout: See, size: int, layers: int, layout_heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.heads, self.layout = heads, Layout(dim, size, layout)
        self.encoder = nn.Sequential(*(LayoutBlock(dim, layout_heads, hidden) for _ in range(layers)))
        self.q, self.k = nn.Linear(dim, heads * head_dim), nn.Linear(dim, heads * head_dim)
        self.core = Softmax(heads, head_dim)

    def forward(self, boxes: Boxes) -> tuple[Heads, Heads]:
        see = self.layout
        where = self.encoder(see.order(boxes.shape[1]) if see.see == "order" else see(boxes))
        q, k = (p(where).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k))
        return q, k


class Skimformer(nn.Module):
    """The paper's encoder: (tokens, boxes) -> (batch, n, dim).

    Args:
        vocab, types: sizes of the embeddings of words and of token types.
        dim, layers, heads, head_dim, hidden: those of the text's layers; ``hidden`` is the width inside an FFN.
        layout_dim, layout, size: those of the layout's embedding.
        layout_layers, layout_heads: of the encoder over the layout.
        window: words read words at most window / 2 places away (LongSkimformer); all unless given.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"vocab": 512, "dim": 64, "layers": 2, "heads": 4, "head_dim": 16, "hidden": 128, "layout_dim": 64},
        "base": {},
        "base-contextual": {"layout_layers": 2},
        "base-long": {"window": 512},
    }
    published: ClassVar[dict[str, int]] = {"base": 98_652_672, "base-contextual": 112_828_416}

    def __init__(
        self,
        vocab: int = 30522,
        types: int = 2,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        head_dim: int = 64,
        hidden: int = 3072,
        layout_dim: int = 768,
        layout: See = "boxes",
        size: int = 1024,
        layout_layers: int = 0,
        layout_heads: int = 12,
        window: int | None = None,
    ) -> None:
        super().__init__()
        expect(window is None or window >= 2, "window", window, "a number >= 2, or None")
        self.words, self.types = nn.Embedding(vocab, dim), nn.Embedding(types, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.skim = Skim(layout_dim, heads, head_dim, layout, size, layout_layers, layout_heads, hidden)
        self.blocks = nn.ModuleList(SkimBlock(dim, heads, head_dim, hidden) for _ in range(layers))
        self.window = window

    def weights(self, boxes: Boxes, mask: Mask | Tensor | None = None) -> Float[Tensor, "#batch heads n n"]:
        """A, which all layers share."""
        q, k = self.skim(boxes)
        return self.skim.core.weights(q, k, mask=self._rule(mask, boxes))

    def _rule(self, mask: Mask | Tensor | None, boxes: Boxes) -> Mask | None:
        batch, n = boxes.shape[:2]
        given = masks.as_mask(mask, batch=batch, heads=self.skim.heads, n=n, m=n)
        return masks.join(None if self.window is None else masks.window(self.window // 2), given)

    def forward(
        self,
        tokens: Int[Tensor, "batch n"],
        boxes: Boxes,
        types: Int[Tensor, "batch n"] | None = None,
        mask: Mask | Tensor | None = None,
    ) -> Stream:
        kind = self.types.weight[0] if types is None else self.types(types)
        x = self.norm(self.words(tokens) + kind)
        if mask is not None or self.window is not None:  # else one A serves all pages of the same layout
            boxes = boxes.expand(tokens.shape[0], -1, -1)
        mix: Callable[[Tensor], Tensor]
        if self.window is None:
            mix = self.weights(boxes, mask).matmul
        else:  # A would be n x n, mostly zeros: the blocks inside the windows are read again in each layer
            (q, k), rule = self.skim(boxes), self._rule(mask, boxes)
            mix = partial(self.skim.core, q, k, mask=rule)
        for block in self.blocks:
            x = block(x, mix)
        return x


@register(CARD)
class SkimAttention(AttentionLayer):
    """softmax attention with queries and keys from boxes.

    Args:
        dim, heads, head_dim, bias: as in `AttentionLayer`.
        layout_dim: width of the layout's embedding, dim unless given.
        layout: "boxes", "centres" or "order".
        size: coordinates go from 0 to size - 1; with "order", the longest sequence.
        line: words of a line, where neither boxes nor a grid are given.
    """

    network: ClassVar[type[Skimformer]] = Skimformer

    def __init__(
        self,
        dim: int,
        heads: int = 12,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        layout_dim: int | None = None,
        layout: See = "boxes",
        size: int = 1024,
        line: int = 32,
    ) -> None:
        expect(1 <= line <= PAGE, "line", line, f"1 to {PAGE}")
        expect(layout == "order" or size > PAGE, "size", size, f"more than {PAGE}")
        super().__init__(Softmax(heads, head_width(dim, heads, head_dim)), dim, bias=bias)
        self.line, self.layout = line, Layout(layout_dim or dim, size, layout)
        width = heads * self.head_dim
        self.q, self.k = (nn.Linear(layout_dim or dim, width, bias) for _ in range(2))

    def forward(self, x, context=None, *, boxes=None, mask=None, causal=False, grid=None):
        """As `Mechanism.forward`; ``boxes`` are those of x, integers (batch or 1, n, 4)."""
        return self._forward(*self._placed(x, context, boxes, mask, causal, grid))

    def weights(self, x, context=None, *, boxes=None, mask=None, causal=False, grid=None):
        return self._weights(*self._placed(x, context, boxes, mask, causal, grid))

    def read(self, weights, x, context=None, *, boxes=None, mask=None, causal=False, grid=None):
        return self._read(weights, *self._placed(x, context, boxes, mask, causal, grid))

    def step(self, x, cache=None, *, context=None, mask=None, boxes=None):
        if boxes is None:
            return super().step(x, cache, context=context, mask=mask)
        self._checked(x, context, mask, True, None)
        return self._step(x, cache, None, Placed(causal=True, boxes=self._checked_boxes(boxes, x)))

    def _placed(self, x: Any, context: Any, boxes: Any, mask: Any, causal: bool, grid: Grid | None):
        x, context, how = self._checked(x, context, mask, causal, grid)
        return x, context, Placed(how.mask, causal, how.cross, grid, self._checked_boxes(boxes, x))

    def _checked_boxes(self, boxes: Tensor | None, x: Tensor) -> Tensor | None:
        if boxes is not None:
            held = boxes.dim() == 3 and boxes.shape[0] in (1, x.shape[0]) and boxes.shape[1:] == (x.shape[1], 4)
            shape = f"integers (batch or 1, {x.shape[1]}, 4)"
            expect(held and not boxes.is_floating_point(), "boxes", f"{boxes.dtype} {tuple(boxes.shape)}", shape)
        return boxes

    def where(
        self, x: Stream, boxes: Boxes | None, grid: Grid | None = None, offset: int = 0
    ) -> Float[Tensor, "#batch n layout_dim"]:
        """L of the tokens of x."""
        if self.layout.see == "order":
            return self.layout.order(x.shape[1], offset)
        if boxes is None and grid is not None:
            boxes = cells(grid, device=x.device)
        if boxes is None:
            boxes = reading_order(x.shape[1], self.line, offset=offset, device=x.device)
        return self.layout(boxes)

    def _heads(self, x, context, how, offset=0):
        where = self.where(x, getattr(how, "boxes", None), how.grid, offset)
        # A layout may be one for the whole batch.
        q, k = (self._split(p(where), self.heads).expand(x.shape[0], -1, -1, -1) for p in (self.q, self.k))
        return q, k, self._values(context)
