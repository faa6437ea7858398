"""Putting another mechanism in the place of a model's attention, with the model's weights carried over.

Where a mechanism is a core, the host keeps its projections and positions, and the core takes its heads. A mechanism
that is a whole layer replaces the host's module, which our own mechanisms, ``nn.MultiheadAttention`` and timm's
``Attention`` allow.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from crosslight import registry
from crosslight.attention.base import AttentionLayer, Core, Mechanism
from crosslight.errors import CrosslightError, expect
from crosslight.hosts import find, own, timm, torch_mha
from crosslight.hosts.base import CORE, Site, Undo, Where, structure


class Swap:
    """A swap that can be taken back: ``with swap(...):`` or ``.restore()``.

    Attributes:
        id: the mechanism that was put in.
        sites: where, as they were before.
    """

    def __init__(self, id: str, sites: list[Site]) -> None:
        self.id, self.sites = id, sites
        self._undos: list[Undo] = []

    def restore(self) -> None:
        """The model's own attention again. A second call does nothing."""
        while self._undos:
            self._undos.pop()()

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Swap({self.id!r}, {len(self.sites)} sites)"


def swap(model: nn.Module, id: str, where: Where = None, **options: Any) -> Swap:
    """Put mechanism ``id`` in the place of a model's attention; heads and their width are the host's.

    Parameters that the mechanism brings are registered on the model: they train, move and are saved with it. The
    host's attention dropout does not apply to a core. What a row's layer does around its core, such as a gate or a
    norm, does not come along; a warning says so.

    A model that decodes from a cache of keys and values gives what it gives without one. A core whose own decoding
    carries more than these reads the whole sequence again at each step; one that needs the earlier queries as well
    refuses, and is used with ``use_cache=False``.

    Args:
        model: any model whose attention Crosslight knows.
        id: a registered mechanism of kind token.
        where: a glob on module paths, a predicate on `Site`, or None for all.
        options: the mechanism's own.

    Returns:
        A handle: a context manager, with ``restore()``.

    Raises:
        CrosslightError: no such attention, or a mechanism that the host has no place for.
    """
    make, defaults = registry.factory(id)
    kind = registry.card(id).kind
    expect(kind == "token", "id", f"{id!r} of kind {kind}", "a mechanism of kind token")
    chosen = find.select(model, where)
    handle = Swap(id, chosen)
    whole = not is_core(make, defaults)
    if not whole:
        defaults = {name: value for name, value in defaults.items() if name != "bias"}
    try:
        for site in chosen:
            put = _layer if whole else _core
            handle._undos.append(put(model, site, id, make, {**defaults, **options}))
    except BaseException:
        handle.restore()
        raise
    return handle


def is_core(make: Callable[..., Any], defaults: dict[str, Any]) -> bool:
    """Whether what is registered works on the heads of any host. A default that is the layer's, such as one key/value
    head, is a matter of projections: no core has it."""
    if not (isinstance(make, type) and issubclass(make, Core)) or make.needs_layer:
        return False
    return set(defaults) <= {"bias", *_own_options(make)}


def _like(new: nn.Module, host: nn.Module) -> nn.Module:
    """On the host's device, in its floating point dtype and mode."""
    weight = next((p for p in host.parameters() if p.is_floating_point()), None)
    if weight is not None:
        new.to(weight.device, weight.dtype)
    return new.train(host.training)


def _core(model: nn.Module, site: Site, id: str, make: Callable[..., Core], options: dict[str, Any]) -> Undo:
    module = site.module
    _check_options(id, make, options)
    try:
        core = make(site.heads, site.head_dim, **options)
    except TypeError as error:
        raise CrosslightError(f"options of {id!r}: {error}") from error
    _like(core, module)
    if site.host == own.HOST:
        if isinstance(module, Core):
            return _replace(model, site, core)
        if not isinstance(module, AttentionLayer):
            return _layer(model, site, id, registry.create, {"id": id, **options})
        _warn_of_the_layer(id, make)
        return _own_core(module, core)
    why = find.adapter(site).why_not_swap(site)
    expect(not why, "swap", f"{site.name}, {why}" if why else "", "a host that hands over its queries, keys and values")
    _warn_of_the_layer(id, make)
    seat = find.take(site)
    before = getattr(module, CORE, None)
    seat.swaps += 1
    module.add_module(CORE, core)

    def undo() -> None:
        if before is None:
            delattr(module, CORE)
        else:
            module.add_module(CORE, before)
        seat.swaps -= 1
        find.leave(site)

    return undo


def _own_options(make: Callable[..., Any]) -> list[str]:
    """Options of a core alone: those of the layer around it are the host's to decide."""
    return [n for n in inspect.signature(make).parameters if n not in ("heads", "head_dim")]


def _warn_of_the_layer(id: str, make: Any) -> None:
    if getattr(make, "layer", None) is not None:
        what = " ".join((make.layer.__doc__ or "").partition("\n\n")[0].split())
        warnings.warn(f"swap: the core of {id} comes without the layer that its paper has: {what}", stacklevel=4)


def _check_options(id: str, make: Callable[..., Core], options: dict[str, Any]) -> None:
    known = _own_options(make)
    unknown = [n for n in options if n not in known]
    expect(not unknown, f"options of {id!r}", ", ".join(unknown), f"some of {', '.join(known) or 'none'}")


def _own_core(layer: AttentionLayer, core: Core) -> Undo:
    from crosslight.engines.positions import Bias

    expect(
        core.takes_bias or not isinstance(layer.position, Bias),
        "swap",
        "a layer whose position is a bias on scores",
        f"one with a rotation or none: {core.card.id} has no scores",
    )
    before, layer.core = layer.core, core

    def undo() -> None:
        layer.core = before

    return undo


def _replace(model: nn.Module, site: Site, new: nn.Module) -> Undo:
    expect(site.name != "", "model", f"a bare {type(model).__name__}", "a model around it, so that it can be replaced")
    parent, _, child = site.name.rpartition(".")
    around = model.get_submodule(parent)
    setattr(around, child, new)

    def undo() -> None:
        setattr(around, child, site.module)

    return undo


def _layer(model: nn.Module, site: Site, id: str, make: Callable[..., Any], options: dict[str, Any]) -> Undo:
    """Replace the host's module by a mechanism that is a whole layer."""
    module: Any = site.module
    wrap: Callable[[Mechanism, Any], nn.Module]
    if isinstance(module, Mechanism):
        dim, context_dim, wrap = module.dim, module.context_dim, lambda mechanism, _: mechanism
    elif isinstance(module, nn.MultiheadAttention):
        dim, context_dim, wrap = module.embed_dim, module.kdim, TorchShell
        expect(module.kdim == module.vdim, "swap", f"kdim {module.kdim} and vdim {module.vdim}", "equal widths")
    elif site.host == timm.HOST and isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "proj"):
        dim = module.qkv.in_features
        context_dim, wrap = dim, TimmShell
        expect(module.proj.out_features == dim, "swap", f"an output of width {module.proj.out_features}", dim)
    else:
        raise CrosslightError(
            f"swap: {id} is a whole layer with projections of its own, but at {site.name or type(module).__name__} the "
            f"{site.host} host keeps its projections and positions; expected a mechanism that is a core, such as "
            "softmax, or a host of ours, nn.MultiheadAttention or timm"
        )
    given = {"dim": dim, "heads": site.heads, **({"context_dim": context_dim} if context_dim != dim else {})}
    mechanism = registry.create(id, **{**given, **{k: v for k, v in options.items() if k != "id"}})
    _like(mechanism, module)
    _carry(module, mechanism)
    undo = _replace(model, site, wrap(mechanism, module))
    nest = torch_mha.without_nesting(site.parents)

    def restore() -> None:
        undo()
        nest()

    return restore


@torch.no_grad()
def _carry(host: Any, mechanism: nn.Module) -> None:
    """Weights of the host's projections, to the mechanism's parameters of the same meaning and shape."""
    state = dict(host.state_dict().items())
    for packed in ("in_proj_", "qkv."):
        for end in ("weight", "bias"):
            if (whole := state.pop(packed + end, None)) is not None:
                state.update({f"{part}.{end}": t for part, t in zip("qkv", whole.chunk(3), strict=True)})
    for end in ("weight", "bias"):
        for ours, theirs in (("out", "out_proj"), ("out", "proj")):
            if f"{theirs}.{end}" in state:
                state[f"{ours}.{end}"] = state[f"{theirs}.{end}"]
        for part in "qkv":
            if f"{part}_proj_{end}" in state:
                state[f"{part}.{end}"] = state[f"{part}_proj_{end}"]
    target = mechanism.state_dict()
    fits = {n: t for n, t in state.items() if n in target and target[n].shape == t.shape}
    mechanism.load_state_dict(fits, strict=False)


class TorchShell(nn.Module):
    """A mechanism with the call of ``nn.MultiheadAttention``."""

    def __init__(self, mechanism: Mechanism, host: nn.MultiheadAttention) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.embed_dim, self.num_heads, self.batch_first = host.embed_dim, host.num_heads, host.batch_first
        # PyTorch's transformer layers read these to decide on their fused path, which is not for us.
        self._qkv_same_embed_dim, self.in_proj_bias = False, None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        expect(value is key, "value", "a tensor of its own", "the key: the mechanism makes both from one context")
        expect(query.dim() == 3, "query", tuple(query.shape), "a batch")
        own = key is query
        x, z = (query, key) if self.batch_first else (query.transpose(0, 1), key.transpose(0, 1))
        keep, bias = torch_mha.masks(self.num_heads, key_padding_mask, attn_mask, z.shape[1], x.shape[0])
        if bias is not None:  # -inf where nothing may be read
            keep = bias == 0 if keep is None else keep & (bias == 0)
        causal, mask = (False, None) if keep is None else structure(keep, x.shape[1], z.shape[1])
        how: dict[str, Any] = {"context": None if own else z, "mask": mask, "causal": causal and own}
        y = self.mechanism(x, **how)
        y = y if self.batch_first else y.transpose(0, 1)
        if not need_weights:
            return y, None
        weights = self.mechanism.weights(x, **how)
        return y, weights.mean(1) if average_attn_weights else weights


class TimmShell(nn.Module):
    """A mechanism with the call of timm's ``Attention``."""

    def __init__(self, mechanism: Mechanism, host: nn.Module) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.proj_drop: Any = getattr(host, "proj_drop", nn.Identity())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        mask = None
        if attn_mask is not None:
            keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
            mask = keep[(None,) * (4 - keep.dim())]  # as in scaled_dot_product_attention
        return self.proj_drop(self.mechanism(x, mask=mask, causal=is_causal))
