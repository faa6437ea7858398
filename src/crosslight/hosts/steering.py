"""Changing the attention of a model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from crosslight.errors import expect
from crosslight.hosts.base import Entry, Rule, Where
from crosslight.hosts.find import enter, select, take, withdraw

#: A list has no input of its own, and that of a sequence is not its members'.
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@contextmanager
def steer(model: nn.Module, rule: Rule, where: Where = None) -> Iterator[nn.Module]:
    """Let ``rule`` change the attention matrices of every call inside the block.

    Rules nest: the one that was entered first is asked first. A rule whose ``strength`` is 0 is not asked, and the
    host then computes as if nothing were there. On leaving, also by an exception, the model is as it was.

    Args:
        model: any model whose attention Crosslight knows, see `crosslight.hosts.sites`.
        rule: ``rule(weights, call) -> weights``; weights (batch, heads, n, m) after the softmax, see `Call`.
        where: a glob on module paths, a predicate on `Site`, or None for all.

    Raises:
        CrosslightError: no attention that Crosslight knows, or none that ``where`` names.
    """
    expect(callable(rule), "rule", type(rule).__name__, "a function (weights, call) -> weights")
    chosen = select(model, where)
    entries = enter(Entry(rule, site) for site in chosen)
    around = [(site, site.parents[-1]) for site in chosen if site.parents and not isinstance(site.parents[-1], _LISTS)]
    hooks = [p.register_forward_pre_hook(take(site).remember, with_kwargs=True) for site, p in around]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for site in chosen:
            take(site).residual = None
        withdraw(entries)
