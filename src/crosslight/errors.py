"""Errors that a user can act on: each message names the argument, what came and what was expected."""

from __future__ import annotations

import importlib
from types import ModuleType


class CrosslightError(ValueError):
    """Bad input. The command line prints it on one line and leaves with exit code 2."""


class UnknownId(CrosslightError):
    """No card with that id."""


class UnsupportedPattern(CrosslightError):
    """The mechanism has no form for the attention pattern that was asked for."""


class MissingExtra(CrosslightError, ImportError):
    """An optional dependency is not installed."""


def expect(holds: bool, argument: str, got: object, expected: object) -> None:
    """Raise a `CrosslightError` that names ``argument``, unless ``holds``."""
    if not holds:
        raise CrosslightError(f"{argument}: got {got}, expected {expected}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtra(f"{name} is not installed: pip install 'crosslight[{extra}]'") from error
