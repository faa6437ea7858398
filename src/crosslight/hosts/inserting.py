"""Maps inside any convolutional host: an attention of kind map after the modules that are selected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from crosslight import registry
from crosslight.errors import expect

#: Name under which a map is registered on the host's module.
MAP = "crosslight_map"

Where = str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool] | None


def insert(
    model: nn.Module, attention: str | Callable[..., nn.Module], *, where: Where = None, **options: Any
) -> nn.Module:
    """Let a map attend to the output of modules of ``model``, which is changed in place.

    The map becomes a child of the module whose output it gates, so the names of the host's own parameters stay, and
    a host's state_dict still loads with ``strict=False``.

    Args:
        model: timm, torchvision, transformers or your own.
        attention: an id of kind map, or a callable ``channels -> module``.
        where: a pattern on module paths (``"layer4.*.bn3"``), a module type, or a predicate on (name, module). Unless
            given, the end of each residual branch of a ResNet, before the addition.
        options: of the map; its ``channels`` are found from the module.

    Returns:
        The model.

    Raises:
        CrosslightError: nothing is selected, or a selected module does not tell its channels.
    """
    if isinstance(attention, str):
        card = registry.factory(attention)[0].card  # type: ignore[attr-defined]
        expect(card.kind == "map", "attention", f"{attention!r} of kind {card.kind}", "an id of kind map")
    chosen = list(_chosen(model, where))
    expect(bool(chosen), "where", where, "something that selects modules of the model" + _hint(model, where))
    for name, module in chosen:
        expect(not hasattr(module, MAP), "where", f"{name}, which has a map", "modules that have none yet")
        channels = _channels(module)
        expect(channels is not None, "where", f"{name} ({type(module).__name__})", "modules with num_features or such")
        if isinstance(attention, str):
            made = registry.create(attention, channels=channels, **options)
        else:
            made = attention(channels, **options)
        like = next((p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point()), None)
        if like is not None:
            made = made.to(device=like.device, dtype=like.dtype)
        module.add_module(MAP, made.train(model.training))
        module.register_forward_hook(_attend)
    return model


def _attend(module: nn.Module, args: Any, output: Any) -> Any:
    # The map is found through the module, so that a deep copy of the model attends with its own.
    return getattr(module, MAP)(output)


def _chosen(model: nn.Module, where: Where) -> Iterator[tuple[str, nn.Module]]:
    if where is None:
        yield from _branch_ends(model)
        return
    for name, module in list(model.named_modules()):
        if isinstance(where, str):
            fits = fnmatchcase(name, where)
        elif isinstance(where, type | tuple):
            fits = isinstance(module, where)
        else:
            fits = where(name, module)
        if fits and name:
            yield name, module


def _branch_ends(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The last module of each residual branch: the last norm of a timm or torchvision block, the last layer of a
    transformers one."""
    for name, block in model.named_modules():
        parts, end = dict(block.named_children()), None
        if hasattr(block, "downsample"):
            end = next((part for part in ("bn3", "bn2") if part in parts), None)
        elif "shortcut" in parts and isinstance(parts.get("layer"), nn.Sequential):
            end = f"layer.{len(parts['layer']) - 1}"
        if end is not None:
            yield f"{name}.{end}", block.get_submodule(end)


def _channels(module: nn.Module) -> int | None:
    """Channels that come out: of the module, or of the last part of it that tells."""
    for part in (module, *reversed(list(module.modules()))):
        for attribute in ("num_features", "out_channels", "num_channels"):
            if isinstance(getattr(part, attribute, None), int):
                return getattr(part, attribute)
    return None


def _hint(model: nn.Module, where: Where) -> str:
    names = [
        name for name, module in model.named_modules() if name and _channels(module) and not list(module.children())
    ]
    told = f", such as {', '.join(names[-3:])}" if names else ""
    return told if where is not None else f" (no ResNet blocks were found){told}"
