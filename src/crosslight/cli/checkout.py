"""Where the checkout is that this package runs from, for the commands that contributors use."""

from __future__ import annotations

from pathlib import Path

import crosslight
from crosslight.errors import CrosslightError


def root() -> Path:
    """The directory of pyproject.toml.

    Raises:
        CrosslightError: the package was installed, not checked out.
    """
    package = Path(crosslight.__file__).parent
    found = package.parents[1]
    if not (found / "pyproject.toml").exists():
        raise CrosslightError(
            f"checkout: got the package in {package}, expected a clone of the "
            "repository installed with `pip install -e .`"
        )
    return found
