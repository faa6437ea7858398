"""Seeing the attention of a model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosslight.errors import CrosslightError, expect
from crosslight.hosts.base import Call, Entry, Site, Where
from crosslight.hosts.find import enter, select, withdraw

if TYPE_CHECKING:
    from jaxtyping import Float

    Weights = Float[Tensor, "batch heads n m"]


@dataclass(frozen=True, eq=False)
class Sight:
    """One attention call that was seen: where, its matrix, and whether it read another stream."""

    site: Site
    map: Weights
    cross: bool


class Seen:
    """What `watch` saw.

    ``seen[name]`` is the last map of a site, ``seen.maps[name]`` all of them, ``seen.grad(name)`` its gradient after
    a backward pass; iteration gives (name, map) in call order, ``seen.calls`` the same with more detail.
    """

    def __init__(self, sites: list[Site], grad: bool) -> None:
        self.sites = sites
        self.maps: dict[str, list[Weights]] = {}
        self.calls: list[Sight] = []
        self._grad = grad

    def record(self, weights: Weights, call: Call) -> Weights:
        if torch._C._current_graph_task_id() != -1:
            return weights  # a checkpointed layer that is recomputed in the backward pass was seen before
        if self._grad and torch.is_grad_enabled():
            weights = weights if weights.requires_grad else weights.detach().requires_grad_()
            weights.retain_grad()
        map = weights if self._grad else weights.detach()
        self.maps.setdefault(call.site.name, []).append(map)
        cross = call.context is not None or call.site.stream == "cross"
        self.calls.append(Sight(call.site, map, cross))
        return weights

    def clear(self) -> None:
        """Forget the maps, for instance between batches."""
        self.maps.clear()
        self.calls.clear()

    def grad(self, name: str, call: int = -1) -> Weights:
        """Gradient of what was differentiated with respect to a site's map (of its last call)."""
        self[name]
        gradient = self.maps[name][call].grad
        if gradient is None:
            raise CrosslightError(
                f"grad: {name!r} has no gradient, expected watch(..., grad=True), a run with gradients enabled and a "
                "backward pass from an output that depends on it"
            )
        return gradient

    def __getitem__(self, name: str) -> Weights:
        names = [s.name for s in self.sites]
        expect(name in names, "site", repr(name), f"one of {', '.join(names)}")
        if name not in self.maps:
            raise CrosslightError(f"site: {name!r} has not been called yet, expected a run of the model inside watch")
        return self.maps[name][-1]

    def __iter__(self) -> Iterator[tuple[str, Weights]]:
        return ((sight.site.name, sight.map) for sight in self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __contains__(self, name: object) -> bool:
        return name in self.maps


@contextmanager
def watch(model: nn.Module, where: Where = None, *, grad: bool = False) -> Iterator[Seen]:
    """See the attention matrices of every call inside the block.

    Args:
        model: any model whose attention Crosslight knows, see `crosslight.hosts.sites`.
        where: a glob on module paths ("*decoder*"), a predicate on `Site`, or None for all.
        grad: keep the maps in the graph, so that ``seen.grad(name)`` can be read after a backward pass.

    Yields:
        `Seen`. The maps are those that were used, with every rule of `steer` applied and before dropout.

    Raises:
        CrosslightError: no attention that Crosslight knows, or none that ``where`` names.
    """
    chosen = select(model, where)
    seen = Seen(chosen, grad)
    entries = enter(Entry(seen.record, site, watches=True) for site in chosen)
    try:
        yield seen
    finally:
        withdraw(entries)
