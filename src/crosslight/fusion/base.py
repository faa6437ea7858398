"""The contract of kind fusion: a block through which two or more named streams exchange.

    block = crosslight.create("crossvit", streams={"small": 96, "large": 192}, heads=3)
    out = block({"small": a, "large": b}, masks={"large": keep})

A block is built from ``streams``, the name and width of each stream; the order gives the roles that a row's docstring
names. It takes tensors (batch, tokens, width) by those names and returns a tensor for each stream that it writes.
`Fusion.flow` says which those are and what each of them reads, and the conformance suite proves it with gradients.
Blocks stack: ``streams = {**streams, **block(streams)}``.

What a stream reads another with can be any mechanism of kind token, by its id: ``attention="agent-attention"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from crosslight import registry
from crosslight.cards import Card
from crosslight.errors import CrosslightError, expect

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Streams = Mapping[str, Float[Tensor, "batch tokens width"]]
    Masks = Mapping[str, Bool[Tensor, "batch tokens"]]


class Fusion(nn.Module):
    """Named streams in, named streams out. Subclasses write `flow`, `_forward`, `sample` and, where they have
    attention maps, `_weights`; the public methods check their input first.

    Args:
        streams: name -> width of every stream, two at least.
    """

    card: ClassVar[Card]

    def __init__(self, streams: Mapping[str, int]) -> None:
        super().__init__()
        expect(
            isinstance(streams, Mapping) and len(streams) >= 2,
            "streams",
            streams,
            "a mapping from the names of two or more streams to their widths",
        )
        for name, width in streams.items():
            expect(isinstance(width, int) and width > 0, f"streams[{name!r}]", width, "a positive int")
        self.widths = dict(streams)

    # What a block writes ----------------------------------------------------------------------------------------
    @property
    def flow(self) -> dict[str, tuple[str, ...]]:
        """For each stream of the output, the input streams that it depends on; others have no gradient to it."""
        raise NotImplementedError

    def _forward(self, streams: Streams, masks: Masks) -> dict[str, Tensor]:
        raise NotImplementedError

    def _weights(self, streams: Streams, masks: Masks) -> dict[tuple[str, str], Tensor]:
        raise CrosslightError(f"weights: {self.card.id} has no attention maps to show")

    @classmethod
    def sample(cls, **options: Any) -> tuple[Self, dict[str, Tensor]]:
        """A small block built with ``options`` over the row's own, in float32, and random input for it (batch 2).

        The suite, the docs and the benchmarks take their examples from here.
        """
        raise NotImplementedError

    # What a user calls ------------------------------------------------------------------------------------------
    def forward(self, streams: Streams, masks: Masks | None = None) -> dict[str, Tensor]:
        """Exchange.

        Args:
            streams: every stream of the block, (batch, tokens, width) by name.
            masks: for any of the streams, bool (batch, tokens), True = other tokens may read this one.

        Returns:
            name -> tensor, for the streams that `flow` lists.

        Raises:
            CrosslightError: a missing or unknown stream, a wrong width, dtype or device, a mask that does not fit.
        """
        return self._forward(*self._checked(streams, masks))

    def weights(self, streams: Streams, masks: Masks | None = None) -> dict[tuple[str, str], Tensor]:
        """Attention maps by (who asks, who is read), each (batch, heads, asking tokens, read tokens)."""
        return self._weights(*self._checked(streams, masks))

    def _checked(self, streams: Streams, masks: Masks | None) -> tuple[Streams, Masks]:
        names, masks = list(self.widths), {} if masks is None else masks
        expect(isinstance(streams, Mapping), "streams", type(streams).__name__, f"a mapping with {', '.join(names)}")
        missing, unknown = [n for n in names if n not in streams], [n for n in streams if n not in names]
        expect(not missing, "streams", f"no {', '.join(missing)}", f"all of {', '.join(names)}")
        expect(not unknown, "streams", f"unknown {', '.join(unknown)}", f"only {', '.join(names)}")
        unknown = [n for n in masks if n not in names]
        expect(not unknown, "masks", f"unknown {', '.join(unknown)}", f"only {', '.join(names)}")
        weight = next(self.parameters(), None)
        batch = None
        for name, width in self.widths.items():
            t, argument = streams[name], f"streams[{name!r}]"
            if not isinstance(t, Tensor) or t.dim() != 3 or t.shape[2] != width or t.shape[1] == 0:
                got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                raise CrosslightError(f"{argument}: got {got}, expected (batch, tokens >= 1, {width})")
            batch = t.shape[0] if batch is None else batch
            expect(t.shape[0] == batch, argument, f"batch {t.shape[0]}", f"batch {batch} as {names[0]}")
            if weight is not None and not torch.is_autocast_enabled(t.device.type):
                expect(t.dtype == weight.dtype, argument, t.dtype, f"{weight.dtype}, the dtype of the block")
                expect(t.device == weight.device, argument, f"a tensor on {t.device}", f"one on {weight.device}")
            if name in masks:
                mask = masks[name]
                fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == t.shape[:2]
                came = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                expect(fits, f"masks[{name!r}]", came, f"torch.bool {tuple(t.shape[:2])}, as the stream")
        return streams, masks


def mechanism(
    id: str,
    *,
    dim: int,
    heads: int,
    pattern: str,
    context_dim: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A mechanism of kind token for a place in a block, by its id; ``pattern`` is what the place asks of it."""
    given: dict[str, Any] = {"dim": dim, "heads": heads, **(options or {})}
    if context_dim not in (None, dim):
        given["context_dim"] = context_dim
    layer = registry.create(id, **given)
    fits = layer.card.kind == "token" and pattern in layer.card.patterns
    expect(fits, "attention", repr(id), f"a mechanism of kind token with {pattern} attention")
    return layer
