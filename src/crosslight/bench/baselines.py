"""Exact attention written out in plain torch, as the measure of everything else.

Each baseline is a function between heads, ``attend(q, k, v, mask, causal)``; `Layer` puts projections around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.engines.masks import Causal, Mask, join

Attend = Callable[[Tensor, Tensor, Tensor, "Mask | None", bool], Tensor]


def _keep(q: Tensor, k: Tensor, mask: Mask | None, causal: bool) -> Tensor:
    return _matrix(mask, causal, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.device)


@lru_cache(maxsize=1)  # making the matrix is no part of what is measured
def _matrix(mask: Mask | None, causal: bool, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    rule = join(Causal() if causal else None, mask)
    assert rule is not None
    return rule.dense(*shape, device=device)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool) -> Tensor:
    """`scaled_dot_product_attention`; a mask becomes a matrix."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_keep(q, k, mask, causal))


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, with the matrix in memory."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None or causal:
        scores = scores.masked_fill(~_keep(q, k, mask, causal), float("-inf"))
    return scores.softmax(-1) @ v


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool) -> Tensor:
    """Compiled FlexAttention with the mask as a block mask. On CPU it has no backward pass."""
    attend, block_mask = _flex()
    mask = join(Causal() if causal else None, mask)
    if mask is None:
        return attend(q, k, v)
    return attend(q, k, v, block_mask=block_mask(mask, q.shape[2], k.shape[2], q.device))


@cache
def _flex() -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @lru_cache(maxsize=4)
    def block_mask(mask: Mask, n: int, m: int, device: torch.device) -> Any:
        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # a bound method is refused
            return mask.visible(b, h, i, j)

        return create_block_mask(visible, None, None, n, m, device=str(device))

    return torch.compile(flex_attention), block_mask


BASELINES: dict[str, Attend] = {"sdpa": sdpa, "naive": naive, "flex": flex}


class Layer(nn.Module):
    """Four `nn.Linear` and a baseline between them, as one writes multi-head attention by hand."""

    def __init__(self, attend: Attend, dim: int, heads: int) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None, causal: bool = False
    ) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(source), self.v(source))
        )
        y = self.attend(q, k, v, mask, causal and context is None)
        return self.out(y.transpose(1, 2).flatten(2))
