"""Symbolic masks on FlexAttention: the block table of a mask becomes its block mask, the rule itself its mask_mod.

On CUDA this is the fast way, forward and backward. On CPU FlexAttention has no backward and takes long to compile.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from crosslight.engines.masks import Mask
from crosslight.engines.plans import block_table
from crosslight.errors import CrosslightError

#: Side of the blocks, the size that the CUDA kernels are made for.
BLOCK = 128


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the CUDA kernels take these tensors."""
    widths = {q.shape[-1], v.shape[-1]}
    return q.is_cuda and q.dtype != torch.float64 and all(w >= 16 and w & (w - 1) == 0 for w in widths)


def block_mask(mask: Mask | None, n: int, m: int, device: torch.device) -> BlockMask | None:
    """FlexAttention's form of a mask, made from its blocks and never from the matrix."""
    if mask is None:
        return None
    some, every = (t.to(device) for t in block_table(mask, n, m, BLOCK, BLOCK))
    # The kernels treat a block that sticks out as partial.
    every = every.clone()
    every[n // BLOCK :] = False
    every[:, m // BLOCK :] = False
    partial_count, partial = _listed(some & ~every)
    full_count, full = _listed(every)
    return BlockMask.from_kv_blocks(
        partial_count, partial, full_count, full, BLOCK_SIZE=BLOCK, mask_mod=_rule(mask), seq_lengths=(n, m)
    )


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their numbers first."""
    order = (~table).to(torch.int32).argsort(dim=1, stable=True)
    return table.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


def _rule(mask: Mask) -> Any:
    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask.visible(b, h, i, j)

    return visible


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """As the executor of `engines.sparse`."""
    if not q.is_cuda and (want_lse or (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)))):
        raise CrosslightError(
            f"backend: got 'flex' on {q.device.type}, where FlexAttention has neither gradients nor log-sum-exps, "
            "expected 'gather'"
        )
    run = flex_attention if torch.compiler.is_compiling() else _compiled()
    made = block_mask(mask, q.shape[2], k.shape[2], q.device)
    how = {"block_mask": made, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if not want_lse:
        return run(q, k, v, **how), None
    return run(q, k, v, **how, return_lse=True)


__all__ = ["attend", "block_mask", "serves"]
