"""The contract of tasks: data, a way to build a model around an entrant, a loss and a metric.

A task hands the same data in the same order to every entrant of a trial's seed, and builds the same trunk around
each, so that a table compares entrants and nothing else.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from crosslight.cards import Kind, Pattern
from crosslight.errors import CrosslightError, expect

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Entrant:
    """What is compared: a registered id with its options. ``id`` "none" is the trunk without the contribution."""

    id: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``moba(block_size=32)``."""
        return self.id + (f"({', '.join(f'{k}={v}' for k, v in self.options.items())})" if self.options else "")


@dataclass(frozen=True)
class Size:
    """Width, heads and depth of the trunk, the same for all entrants of a table."""

    dim: int = 64
    heads: int = 4
    depth: int = 2


class Task:
    """One task. Subclasses are registered with `task` and take their options as keyword arguments.

    Attributes:
        name: CLI name.
        kind: the kind of system that enters.
        pattern: attention pattern that the entrant is asked for (kind token).
        metric: key of `evaluate` that ranks; ``higher_is_better`` says which way.
        size, steps, batch_size, lr: what a trial uses where the user says nothing.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "token"
    pattern: ClassVar[Pattern | None] = None
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    size: ClassVar[Size] = Size()
    steps: ClassVar[int] = 200
    batch_size: ClassVar[int] = 32
    lr: ClassVar[float] = 1e-3
    #: Entrants of the task's own, beside the registered ones: a companion of the paper, a lower bound.
    companions: ClassVar[tuple[str, ...]] = ("none",)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Training batches without end, in an order that depends on the seed alone."""
        raise NotImplementedError

    def model(self, entrant: Entrant, size: Size) -> nn.Module:
        """The trunk with the entrant in it. The caller has seeded torch."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on held-out data, ``metric`` among them. Called in eval mode without gradients; a task that needs
        gradients turns them on. A control or explain entrant is on ``model.entrant``."""
        raise NotImplementedError

    def example(self) -> Batch:
        """One held-out batch of one example, whose attention the report shows."""
        raise NotImplementedError

    def labels(self, example: Batch) -> dict[str, Any]:
        """Names of the example's tokens for the report: "rows" (those that ask) and "columns" (those that are read),
        lists of str, and "image", a tensor (height, width), where the tokens are its pixels."""
        return {}


_tasks: dict[str, type[Task]] = {}


def task(cls: type[Task]) -> type[Task]:
    """Class decorator: register a task by its name."""
    _tasks[cls.name] = cls
    return cls


def names() -> list[str]:
    """All tasks, by importing every module of this package."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__, __package__ + "."):
        importlib.import_module(module.name)
    return sorted(_tasks)


def find(name: str) -> type[Task]:
    """The class of a task by name; imports its module alone where the file has the task's name.

    Raises:
        CrosslightError: no such task.
    """
    module = name.replace("-", "_")
    if name not in _tasks and module.isidentifier() and importlib.util.find_spec(f"{__package__}.{module}"):
        importlib.import_module(f"{__package__}.{module}")
    expect(name in _tasks or name in names(), "task", repr(name), f"one of {', '.join(sorted(_tasks))}")
    return _tasks[name]


def get(name: str, **options: Any) -> Task:
    """A task by name.

    Raises:
        CrosslightError: no such task, or an option that it does not have.
    """
    make = find(name)
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters) or "none, it has no options"
        raise CrosslightError(f"options of task {name!r}: {error}, expected some of {known}") from error
    return make(**options)
