"""What all checks share: how they are declared, how the systems they hold are built, how they are run.

A check is a function ``check(make, card)``, or ``check(make, card, pattern)`` that is run for each attention pattern
of the card. ``make`` is a `Maker`, which builds fresh systems: small, seeded, in eval mode and in float64. A failed
``assert`` fails the check, and `Skip` leaves it with a reason.

A system that a check does not fit says so on its class: ``exempt = {"gradients_are_exact": "straight-through: ..."}``.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from crosslight import registry
from crosslight.cards import Card
from crosslight.errors import expect

#: Options under which a system is built, where it takes them; ``card.small`` goes over these.
SIZES: dict[str, dict[str, Any]] = {"token": {"dim": 16, "heads": 2}, "map": {"channels": 16}}


class ConformanceError(AssertionError):
    """A system does not hold the contract of its kind; one line for each failed check."""


class Skip(Exception):
    """A check does not apply; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    check: str
    result: Literal["passed", "skipped"]
    why: str = ""


class Report(list[Outcome]):
    """The outcomes of a run, in order."""

    def __str__(self) -> str:
        return "\n".join(f"{o.result:8} {o.check}{': ' * bool(o.why)}{o.why}" for o in self)


@dataclass(frozen=True)
class _Check:
    function: Callable[..., None]
    when: Callable[[Card], bool]


_checks: dict[str, dict[str, _Check]] = {}


def declare(kind: str, when: Callable[[Card], bool] = lambda card: True) -> Callable[[Any], Any]:
    """Decorator: the function is a check of ``kind``, for the cards that fit ``when``."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        _checks.setdefault(kind, {})[function.__name__] = _Check(function, when)
        return function

    return mark


def _of(kind: str) -> dict[str, _Check]:
    if kind not in _checks:
        try:
            importlib.import_module(f"crosslight.testing.{kind}")
        except ModuleNotFoundError as error:
            if error.name != f"crosslight.testing.{kind}":
                raise
            _checks[kind] = {}
    return _checks[kind]


def checks(card: Card) -> list[tuple[str, Callable[[Make, Card], None]]]:
    """(name, function) of every check that applies to a card; call it with a `Maker` of the system and the card."""

    def run(check: _Check) -> Callable[[Make, Card], None]:
        def each(make: Make, card: Card) -> None:
            if "pattern" not in inspect.signature(check.function).parameters:
                return _seeded(check.function, make, card)
            failed, skipped = [], []
            for pattern in card.patterns:
                try:
                    _seeded(check.function, make, card, pattern)
                except Skip as skip:
                    skipped.append(str(skip))
                except Exception as error:
                    failed.append(f"[{pattern}] {_line(error)}")
            assert not failed, "; ".join(failed)
            if card.patterns and len(skipped) == len(card.patterns):
                raise Skip(skipped[0])

        return each

    return [(name, run(check)) for name, check in _of(card.kind).items() if check.when(card)]


def _seeded(function: Callable[..., None], *args: Any) -> None:
    with _seed(0):
        function(*args)


def _line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:400]
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}{': ' * bool(text)}{text}"


def _class_of(subject: Any) -> Any:
    if isinstance(subject, str):
        return registry.factory(subject)[0]
    if isinstance(subject, nn.Module):
        return type(getattr(subject, "core", subject))
    return subject


def card_of(subject: Any) -> Card:
    card = getattr(registry.factory(subject)[0] if isinstance(subject, str) else subject, "card", None)
    expect(isinstance(card, Card), "subject", repr(subject), "a registered id, or a class or instance with a `card`")
    return card  # type: ignore[return-value]


class Maker:
    """Builds fresh systems for the checks, of a registered id, a class with a card, or an instance (copied).

    ``make(**options)`` gives a small one; `example` gives one with input that fits it, for the kinds whose classes
    have ``sample(**options) -> (system, inputs)``. Parameters are moved a little off their initial values, so that
    what starts at zero is held to the contract too; ``dtype=None`` leaves the system as it was built.
    """

    def __init__(self, subject: Any, options: Mapping[str, Any] | None = None) -> None:
        self.card, self.subject, self.options = card_of(subject), subject, dict(options or {})
        self.instance = isinstance(subject, nn.Module)
        self.cls = _class_of(subject)

    def __call__(self, *, seed: int = 0, dtype: torch.dtype | None = torch.float64, **own: Any) -> Any:
        with _seed(seed):
            return _settled(self._build(own), dtype)

    def example(
        self, *, seed: int = 0, dtype: torch.dtype | None = torch.float64, **own: Any
    ) -> tuple[Any, dict[str, Any]]:
        """(system, keyword arguments of a call)."""
        sample = getattr(self.cls, "sample", None)
        if sample is None:
            raise Skip(f"{self.cls.__name__} has no sample(**options) -> (system, inputs)")
        with _seed(seed):
            system, inputs = sample(**{**self.card.small, **self.options, **own})
            system = _settled(self._build(own) if self.instance else system, dtype)
            inputs = tree_map(lambda t: _cast(t, dtype), inputs)
            return system, inputs

    def takes(self, option: str) -> bool:
        """Whether the constructor has this option."""
        build = getattr(self.cls, "build", self.cls)
        parameters = inspect.signature(build).parameters
        if build is self.cls and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return True
        return option in parameters or option in inspect.signature(self.cls).parameters

    def _build(self, own: dict[str, Any]) -> Any:
        if self.instance:
            if own:
                raise Skip("a ready-made instance cannot be built anew")
            return copy.deepcopy(self.subject)
        sizes = {name: size for name, size in SIZES.get(self.card.kind, {}).items() if self.takes(name)}
        options = {**sizes, **self.card.small, **self.options, **own}
        if isinstance(self.subject, str):
            return registry.create(self.subject, **options)
        return getattr(self.cls, "build", self.cls)(**options)


#: What a check gets to build with.
Make = Maker


@contextmanager
def _seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _made_on(device: torch.device | str) -> Iterator[None]:
    """Tensors and modules are made there."""
    torch.set_default_device(None if torch.device(device).type == "cpu" else device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def _settled(system: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(system, nn.Module) or dtype is None:
        return system
    system = system.eval().to(dtype)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return system


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, nn.Module):
        return _settled(value, dtype)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value


def check(
    subject: Any,
    *,
    only: str | Collection[str] | None = None,
    skip: str | Collection[str] | None = None,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Hold a system to the contract of its kind.

    Args:
        subject: a registered id, a class with a ``card``, or a ready-made instance (which is copied).
        only: the checks to run, all that apply unless given.
        skip: checks to leave out.
        options: constructor options, over those of ``card.small``.
        device: where the system and its input are made.

    Returns:
        The outcome of every check that was run.

    Raises:
        ConformanceError: one readable line for each check that failed.
        CrosslightError: ``subject`` has no card, or a name in ``only`` or ``skip`` is no check of its kind.
    """
    make = Maker(subject, options)
    card = make.card
    wanted = {only} if isinstance(only, str) else set(_of(card.kind) if only is None else only)
    unwanted = {skip} if isinstance(skip, str) else set(skip or ())
    unknown = sorted((wanted | unwanted) - set(_of(card.kind)))
    expect(not unknown, "only, skip", ", ".join(unknown), f"checks of kind {card.kind}: {', '.join(_of(card.kind))}")
    exempt: Mapping[str, str] = getattr(make.cls, "exempt", {})
    report, failed = Report(), []
    for name, function in checks(card):
        if name not in wanted - unwanted:
            continue
        if name in exempt:
            report.append(Outcome(name, "skipped", exempt[name]))
            continue
        try:
            with _made_on(device):
                function(make, card)
        except Skip as reason:
            report.append(Outcome(name, "skipped", str(reason)))
        except Exception as error:
            failed.append(f"{card.id}: {name}: {_line(error)}")
        else:
            report.append(Outcome(name, "passed"))
    if failed:
        raise ConformanceError("\n".join(failed))
    return report
