"""What an entrant attends to on its task's example, kept beside the store for the report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosslight.attention.base import Mechanism
from crosslight.tasks import Task

#: Rows and columns of a map that are kept.
LARGEST = 64


def entrants(model: nn.Module) -> list[Mechanism]:
    """The layers of the entrant: mechanisms that a trunk holds under the name ``entrant``, or else all."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Mechanism)]
    named = [m for name, m in found if name.rpartition(".")[2] == "entrant"]
    return named or [m for _, m in found]


@torch.no_grad()
def seen(task: Task, model: nn.Module, device: torch.device) -> list[Tensor]:
    """The first example's weights in each layer of the entrant, (heads, n, m), for the task's example."""
    maps: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, Mechanism)
        maps.append(module.weights(*args, **kwargs)[0].float().cpu())

    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in entrants(model)]
    try:
        task.loss(model, {name: t.to(device) for name, t in task.example().items()})
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def save(task: Task, model: nn.Module, path: Path, device: torch.device) -> None:
    """Write {"maps", "rows", "columns", "image"}; nothing where the entrant has no weights to show."""
    try:
        maps = [m[:, :LARGEST, :LARGEST].clone() for m in seen(task, model, device)]
    except NotImplementedError:
        return
    if not maps:
        return
    labels = task.labels(task.example())
    rows, columns = maps[0].shape[1:]
    kept: dict[str, Any] = {
        "maps": maps,
        "rows": list(labels.get("rows", range(rows)))[:rows],
        "columns": list(labels.get("columns", range(columns)))[:columns],
        "image": labels.get("image"),
    }
    kept["rows"], kept["columns"] = [str(t) for t in kept["rows"]], [str(t) for t in kept["columns"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(kept, part)
    part.replace(path)  # whole or not at all
