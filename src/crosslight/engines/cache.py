"""Explicit caches for decoding: what `step` carries from token to token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class KVCache:
    """Keys and values read so far. Grows by doubling, so a step costs amortised O(1) copies; `step` hands back the
    cache to use next, and the one passed in must not be used again."""

    k: Float[Tensor, "batch kv_heads capacity dim"]
    v: Float[Tensor, "batch kv_heads capacity value_dim"]
    length: int

    @classmethod
    def start(cls, k: Tensor, v: Tensor) -> KVCache:
        return cls(k, v, k.shape[2])

    def append(self, k: Tensor, v: Tensor) -> KVCache:
        length = self.length + k.shape[2]
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad or self.k.requires_grad):
            # Writing in place would break the graph of earlier steps.
            return KVCache(torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2), length)
        if length > self.k.shape[2]:
            self.k, self.v = _grown(self.keys, length), _grown(self.values, length)
        self.k[:, :, self.length : length] = k
        self.v[:, :, self.length : length] = v
        return KVCache(self.k, self.v, length)

    @property
    def keys(self) -> Float[Tensor, "batch kv_heads length dim"]:
        return self.k[:, :, : self.length]

    @property
    def values(self) -> Float[Tensor, "batch kv_heads length value_dim"]:
        return self.v[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes that the cached tokens take (capacity not counted)."""
        return self.keys.numel() * self.k.element_size() + self.values.numel() * self.v.element_size()


def _grown(t: Tensor, length: int) -> Tensor:
    bigger = t.new_empty(*t.shape[:2], max(2 * t.shape[2], length, 16), t.shape[3])
    bigger[:, :, : t.shape[2]] = t
    return bigger
