"""Where the checkout is that this package runs from, for the commands that contributors use."""

from __future__ import annotations

from pathlib import Path

from crosslight import registry
from crosslight.errors import CrosslightError


def root() -> Path:
    """The directory of pyproject.toml.

    Raises:
        CrosslightError: the package was installed, not checked out.
    """
    found = registry.INDEX.parents[2]
    if not (found / "pyproject.toml").exists():
        raise CrosslightError(
            f"checkout: got the package in {found.name}/{registry.INDEX.parent.name}, expected a clone of the "
            "repository installed with `pip install -e .`"
        )
    return found
