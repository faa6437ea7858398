"""Multi-window multi-head attention: every head has a window of its own, and some read everything.

Yadav, Theodoridis, Hansen and Tan, "Masked Autoencoders with Multi-Window Local-Global Attention Are Better Audio
Learners", 2023, arXiv 2306.00561.

    windows w_1 .. w_h, one a head; the stream is cut into windows of w_h tokens, the last one shorter
    A_h = softmax(Q_h K_h^T / sqrt(d) + b_h)   over the keys of the query's window        (batch, heads, n, n)
    b_h = table_h[i - j + w_h - 1]             learned, 2 w_h - 1 numbers                 (w_h, w_h)
    w_h = 0                                    plain attention over all keys, without b_h
    y = W_o [A_1 V_1 ; ... ; A_h V_h]                                                     (batch, n, dim)

One layer then mixes several local scales with a global view. Heads of equal window are computed together, in time
n * w_h and without an n x n tensor; only the global heads are quadratic. The paper puts the layer into the decoder of
a masked autoencoder: windows 2, 5, 10, 25, 50, 125 and two global heads, for 250 patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import Core
from crosslight.cards import Card, Evidence
from crosslight.engines import dense, masks
from crosslight.engines.backend import forced
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.errors import expect
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int

#: The decoder of the paper.
PUBLISHED = (2, 5, 10, 25, 50, 125, 0, 0)

CARD = Card(
    id="mw-mae",
    kind="token",
    group="heads",
    title="Masked Autoencoders with Multi-Window Local-Global Attention Are Better Audio Learners",
    year=2023,
    paper="2306.00561",
    code="SarthakYadav/mwmae-jax-official",
    summary="Each head attends inside windows of its own size, some heads globally: several scales in one layer.",
    patterns=("noncausal-self", "causal-self"),
    why_not="Windows cut one stream; the tokens of another have no place in them.",
    cost="n^2",
    decode="kv",
    small={"windows": (5, 0)},
    checked="multi-head attention with windows of the whole length; each head written out window by window",
    differs="The paper takes windows that divide the length; here the last window is shorter. The released code can "
    "also shift windows, which the paper does not use. The encoder, and masking, are the model's. The cost is that of "
    "the global heads: without them it is n.",
    evidence=Evidence(
        claim="A byte language model whose heads see several scales is better than one of global heads only",
        task="language",
        metric="bits_per_byte",
        margin=0.0,
    ),
)


@dataclass(frozen=True, eq=False)
class OfHeads(Mask):
    """A rule for some of the heads: head h of these is head ``heads[h]`` of the rule."""

    inner: Mask
    heads: Int[Tensor, " heads"]

    def visible(self, b, h, i, j):
        return self.inner.visible(b, self.heads[h], i, j)


def spread(heads: int) -> tuple[int, ...]:
    """The published windows, or as many of them, from the first to the last."""
    last = len(PUBLISHED) - 1
    return tuple(PUBLISHED[last - round((heads - 1 - h) * last / max(heads - 1, 1))] for h in range(heads))


@register(CARD)
class MultiWindow(Core):
    """softmax inside windows; q, k, v (batch, heads, n, d).

    Args:
        windows: tokens a window, one number a head, 0 for a global head; those of the paper unless given, with fewer
            or more heads spread over these.
    """

    def __init__(self, heads: int, head_dim: int, windows: Sequence[int] | None = None) -> None:
        super().__init__(heads, head_dim)
        self.windows = spread(heads) if windows is None else tuple(windows)
        expect(len(self.windows) == heads, "windows", f"{len(self.windows)} of them", f"one for each of {heads} heads")
        expect(min(self.windows) >= 0, "windows", self.windows, "numbers >= 0")
        #: Heads of equal window, which are computed together.
        self.groups = {w: [h for h in range(heads) if self.windows[h] == w] for w in sorted(set(self.windows))}
        self.tables = nn.ParameterDict(
            {
                str(w): nn.Parameter(nn.init.trunc_normal_(torch.empty(len(members), 2 * w - 1), std=0.02))
                for w, members in self.groups.items()
                if w
            }
        )
        order = [h for members in self.groups.values() for h in members]
        self.back = sorted(range(heads), key=order.__getitem__)

    def _bias(self, window: int, i: Tensor, j: Tensor) -> Float[Tensor, "1 heads n m"] | None:
        """b of the heads of a window; outside of the window any number."""
        if not window:
            return None
        return self.tables[str(window)][:, (i - j + window - 1).clamp(0, 2 * window - 2)].unsqueeze(0)

    def _plain(self, q: Tensor, k: Tensor, window: int, mask: Mask | None, causal: bool, offset: int = 0) -> dict:
        """The heads of a window as dense attention: what `dense` has to be told."""
        if mask is not None and masks.split(mask)[2] is not None:
            mask = OfHeads(mask, torch.tensor(self.groups[window], device=q.device))
        i = torch.arange(offset, offset + q.shape[2], device=q.device)[:, None]
        bias = self._bias(window, i, torch.arange(k.shape[2], device=q.device))
        rule = masks.join(masks.same_block(window) if window else None, mask)
        return {"mask": rule, "causal": causal, "bias": bias, "offset": offset}

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, window: int, mask: Mask | None, causal: bool) -> Tensor:
        """The heads of a window, each window as an element of the batch."""
        batch, _, n = q.shape[:3]
        size = min(window, n)
        short = -n % size
        # A position in each window: (windows, size).
        at = torch.arange(n + short, device=q.device).view(-1, size)
        i, j = at[None, :, None, :, None], at[None, :, None, None, :]
        keep = (j < n).expand(batch, -1, 1, size, -1) if short else None
        if mask is not None:
            b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1, 1)
            h = torch.tensor(self.groups[window], device=q.device).view(1, 1, -1, 1, 1)
            seen = mask.visible(b, h, i.clamp(max=n - 1), j.clamp(max=n - 1)) & (j < n)
            keep = seen.expand(batch, len(at), -1, size, size)

        def cut(t: Tensor) -> Tensor:
            return F.pad(t, (0, 0, 0, short)).unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)

        rule = None if keep is None else masks.Pairs(keep.flatten(0, 1))
        y = dense.attend(
            cut(q), cut(k), cut(v), mask=rule, causal=causal, bias=self._bias(window, at[0][:, None], at[0])
        )
        return y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]

    def forward(self, q, k, v, *, mask=None, causal=False):
        if forced() == "reference":
            return self.weights(q, k, mask=mask, causal=causal) @ v
        parts = []
        for window, members in self.groups.items():
            qkv = q[:, members], k[:, members], v[:, members]
            if window:
                parts.append(self._windowed(*qkv, window, mask, causal))
            else:
                parts.append(dense.attend(*qkv, **self._plain(*qkv[:2], window, mask, causal)))
        return torch.cat(parts, 1)[:, self.back]

    def weights(self, q, k, *, mask=None, causal=False):
        parts = []
        for window, members in self.groups.items():
            qk = q[:, members], k[:, members]
            parts.append(dense.weights(*qk, **self._plain(*qk, window, mask, causal)))
        return torch.cat(parts, 1)[:, self.back]

    def step(self, q, k, v, state=None, **extra):
        state = KVCache.start(k, v) if state is None else state.append(k, v)
        offset = state.length - q.shape[2]
        parts = []
        for window, members in self.groups.items():
            start = offset // window * window if window else 0  # nothing before the window is read
            qkv = q[:, members], state.keys[:, members, start:], state.values[:, members, start:]
            parts.append(dense.attend(*qkv, **self._plain(*qkv[:2], window, None, True, offset - start)))
        return torch.cat(parts, 1)[:, self.back], state
