"""A layer for images, in which a depthwise convolution of the values stands beside attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from crosslight.attention import grouped
from crosslight.attention.base import AttentionLayer, Core, How
from crosslight.engines import dense, masks

if TYPE_CHECKING:
    from jaxtyping import Float

    Heads = Float[Tensor, "batch heads n dim"]


class LocalLayer(AttentionLayer):
    """out(core(q, k, v) + conv(v)), the values as an image of ``grid`` or one row, with zeros for masked tokens.

    In cross-attention there is no convolution, as the values stand at other places than the queries.

    Args:
        kernel: side of the convolution, 0 for none; ``name`` is that of the attribute that holds it.
    """

    def __init__(self, core: Core, dim: int, *, kernel: int, name: str = "conv", **own: Any) -> None:
        super().__init__(core, dim, **own)
        width, self._name = self.heads * self.head_dim, name
        self.add_module(name, nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) if kernel else None)

    def _local(self, v: Heads, how: How) -> Heads | float:
        conv = getattr(self, self._name)
        if conv is None or how.cross:
            return 0.0
        keep = masks.split(how.mask)[1]
        v = v if keep is None else v.masked_fill(~keep[:, None, :, None], 0)
        image = v.transpose(-1, -2).flatten(1, 2).unflatten(-1, grouped.plane(how.grid, v.shape[2]))
        return conv(image).flatten(2).unflatten(1, (self.heads, -1)).transpose(-1, -2)

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        return self._merge(self.core(q, k, v, mask=how.mask, **self._extra(how)) + self._local(v, how), x)

    def _read(self, weights, x, context, how):
        v = dense.repeat_heads(self._values(context), self.heads)
        return self._merge(self.core.read(weights, v) + self._local(v, how), x)
