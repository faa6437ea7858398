"""L2ViT: linear global attention with a floor under its denominator, and convolutions that concentrate it again.

Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv 2501.16182.

    Q = ReLU(X W_q),  K = ReLU(X W_k),  V = X W_v                                   (n, d) of each head
    LGA: O_i = q_i (t sum_j k_j^T v_j) / max(q_i . sum_j k_j, c)                     t learned a head, from d^(-1/2)
    LCM: Z = DWC(BatchNorm(GELU(DWC(Y))))                                           7 x 7 depthwise on the image
    y = Y + LCM(LayerNorm(Y)),   Y = W_o [O_1 ; ... ; O_h]                          (batch, n, dim)

Weights stay positive, as those of softmax; what linear attention lacks is their concentration, and the local
concentration module brings each token back to its neighbourhood. The floor c keeps the division stable: where it
binds, rows sum to less than t. Time O(n d^2). With ``grid=(H, W)`` the convolutions are those of the image; without it
tokens are one row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosslight.attention.base import AttentionLayer, Core, How
from crosslight.cards import Card, Evidence
from crosslight.engines import linear, masks
from crosslight.engines.dense import repeat_heads
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads n dim"]
    Stream = Float[Tensor, "batch n dim"]

CARD = Card(
    id="l2vit",
    kind="token",
    group="linear",
    title="The Linear Attention Resurrection in Vision Transformer",
    year=2025,
    paper="2501.16182",
    code="ChuanyangZheng/L2ViT",
    summary="ReLU linear attention with a bounded denominator, re-concentrated by depthwise convolutions.",
    patterns=("noncausal-self", "noncausal-cross"),
    why_not="The convolutions that concentrate the output read to all sides of a token.",
    cost="n",
    mask="keys",
    small={"floor": 1.0, "kernel": 3},
    checked="the explicit row-normalised matrix of ReLU features times t; the convolutions through torch modules",
    differs="In the paper the module LCM is a residual branch of its own in the block, over the sum of attention and "
    "stream; here it is one over the attention's output, as a layer does not see its residual stream. Patch embedding, "
    "positions by convolution and the window attention of every other block are the model's.",
    evidence=Evidence(
        claim="linear attention with LCM is on par with softmax attention on images",
        task="digits",
        metric="accuracy",
        margin=-0.03,
        options={"floor": 1.0},
    ),
)


class LocalConcentration(nn.Module):
    """LCM: tokens as an image, depthwise convolution, GELU, batch norm, depthwise convolution."""

    def __init__(self, dim: int, kernel: int = 7) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.first = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.scale = nn.BatchNorm2d(dim)
        self.second = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Stream, grid: tuple[int, ...] | None, keep: Bool[Tensor, "batch n"] | None) -> Stream:
        """Cells that are not kept are zero before each convolution."""
        shape = grid or (1, x.shape[1])
        held = None if keep is None else keep.unflatten(1, shape).unsqueeze(1)

        def kept(t: Tensor) -> Tensor:
            return t if held is None else t.masked_fill(~held, 0)

        image = self.norm(x).transpose(1, 2).unflatten(-1, shape)
        image = self.scale(nn.functional.gelu(self.first(kept(image))))
        return self.second(kept(image)).flatten(2).transpose(1, 2)


class L2ViTLayer(AttentionLayer):
    """The layer around `L2ViT`, which concentrates what it read."""

    def __init__(self, core: L2ViT, dim: int, **own: Any) -> None:
        super().__init__(core, dim, **own)
        self.lcm = LocalConcentration(dim, core.kernel) if core.kernel else None

    def _concentrated(self, y: Heads, x: Stream, how: How) -> Stream:
        merged = self._merge(y, x)
        if self.lcm is None:
            return merged
        # Padding of a context says nothing of the queries.
        return merged + self.lcm(merged, how.grid, None if how.cross else masks.split(how.mask)[1])

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        return self._concentrated(self.core(q, k, v, mask=how.mask), x, how)

    def _read(self, weights, x, context, how):
        return self._concentrated(self.core.read(weights, self._values(context)), x, how)


@register(CARD)
class L2ViT(Core):
    """q (batch, heads, n, d), k and v (batch, kv_heads, m, d).

    Args:
        floor: c, the least denominator; 100 in the released model, for some thousand tokens.
        kernel: side of the layer's two convolutions, an odd number; 0 for attention alone.
    """

    grouped = True
    layer = L2ViTLayer

    def __init__(self, heads: int, head_dim: int, *, floor: float = 100.0, kernel: int = 7) -> None:
        super().__init__(heads, head_dim)
        expect(floor > 0, "floor", floor, "a number > 0")
        expect(kernel == 0 or (kernel > 0 and kernel % 2 == 1), "kernel", kernel, "an odd number, or 0")
        self.floor, self.kernel = floor, kernel
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 1 / math.sqrt(head_dim)))

    def forward(self, q, k, v, *, mask=None, causal=False):
        return linear.attend(*self._features(q, k, mask), v)

    def weights(self, q, k, *, mask=None, causal=False):
        return linear.weights(*self._features(q, k, mask))

    def _features(self, q: Heads, k: Heads, mask: masks.Mask | None) -> tuple[Heads, Heads]:
        """ReLU features, those of the queries times t and over the denominator."""
        q, k, keep = q.relu(), k.relu(), masks.split(mask)[1]
        if keep is not None:
            k = k.masked_fill(~keep[:, None, :, None], 0)
        total = (q * repeat_heads(k.sum(2, keepdim=True), self.heads)).sum(-1, keepdim=True)
        return q * self.temperature / total.clamp(min=self.floor), k
