"""Finding the attention modules of a model, and taking and leaving seats at them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from torch import nn

from crosslight.errors import CrosslightError, expect
from crosslight.hosts import diffusers, functional, own, timm, torch_mha, transformers
from crosslight.hosts.base import SEAT, Entry, Seat, Site, Where, parameters_of

#: In this order a module is offered to them; the first to claim it has it.
ADAPTERS: tuple[ModuleType, ...] = (own, transformers, diffusers, timm, torch_mha, functional)
_by_name = {adapter.HOST: adapter for adapter in ADAPTERS}


def sites(model: nn.Module) -> list[Site]:
    """The attention modules of a model that Crosslight can watch, steer and swap, in the order of its modules."""
    found: list[Site] = []
    met: set[int] = set()

    def walk(module: nn.Module, name: str, parents: tuple[nn.Module, ...]) -> None:
        if id(module) in met:
            return
        met.add(id(module))
        for adapter in ADAPTERS:
            site = adapter.claim(module, name, parents)
            if site is not None:
                found.append(site)
                return
        for child_name, child in module.named_children():
            walk(child, f"{name}.{child_name}" if name else child_name, (*parents, module))

    walk(model, "", ())
    return found


def select(model: nn.Module, where: Where) -> list[Site]:
    """The sites that ``where`` names.

    Raises:
        CrosslightError: none is there, or none fits.
    """
    if not isinstance(model, nn.Module):
        raise CrosslightError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    every = sites(model)
    if not every:
        raise CrosslightError(
            f"model: {type(model).__name__} has no attention that Crosslight knows: it knows its own mechanisms, "
            "transformers, diffusers, timm, torch.nn.MultiheadAttention, and modules that call "
            "scaled_dot_product_attention in their forward"
        )
    if where is None:
        return every
    expect(isinstance(where, str) or callable(where), "where", repr(where), "a glob on module paths or a function")
    if isinstance(where, str):
        chosen = [s for s in every if fnmatchcase(s.name, where)]
    else:
        chosen = [s for s in every if where(s)]
    if not chosen:
        names = [s.name for s in every]
        near = (difflib.get_close_matches(where, names, n=3, cutoff=0.3) if isinstance(where, str) else []) or names[:3]
        raise CrosslightError(
            f"where: got {where!r}, which is none of the {len(names)} sites, expected some of {', '.join(near)} ..."
        )
    return chosen


def adapter(site: Site) -> ModuleType:
    return _by_name[site.host]


def take(site: Site) -> Seat:
    """The seat of a site; attaches one where there is none."""
    if SEAT not in site.module.__dict__:
        cls: Any = type(site.module)
        seat = Seat(parameters_of(cls))
        site.module.__dict__[SEAT] = seat
        try:
            seat.undo = adapter(site).attach(site)
        except BaseException:
            del site.module.__dict__[SEAT]
            raise
    return site.module.__dict__[SEAT]


def leave(site: Site) -> None:
    """Detach the seat if nobody uses it any more."""
    seat = site.module.__dict__.get(SEAT)
    if seat is not None and seat.free:
        seat.undo()
        del site.module.__dict__[SEAT]


def enter(entries: Iterable[Entry]) -> list[Entry]:
    """Put entries at their sites: all of them, or none if one fails."""
    done: list[Entry] = []
    try:
        for entry in entries:
            take(entry.site).entries.append(entry)
            done.append(entry)
    except BaseException:
        withdraw(done)
        raise
    return done


def withdraw(entries: Iterable[Entry]) -> None:
    for entry in entries:
        seat = entry.site.module.__dict__.get(SEAT)
        if seat is not None and entry in seat.entries:
            seat.entries.remove(entry)
            leave(entry.site)
