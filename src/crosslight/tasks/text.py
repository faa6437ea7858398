"""A byte language model on the user's own file; its last tenth is held out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from crosslight.errors import CrosslightError, expect
from crosslight.tasks.base import task
from crosslight.tasks.language import ByteModel, to_bytes


@cache
def read(path: str) -> Tensor:
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise CrosslightError(f"text: got {path}, expected a file that can be read ({error.strerror})") from error
    return to_bytes(text) if text else torch.empty(0, dtype=torch.uint8)


@task
class Text(ByteModel):
    """A byte language model on ``file``: trained on the first nine tenths, judged on the rest."""

    name = "text"

    def __init__(self, file: str, length: int = 64) -> None:
        super().__init__(length)
        self.file = str(file)
        size = len(read(self.file))
        self.about = f"bytes of {Path(file).name}: {size}, the last tenth held out"
        expect(size >= 20 * (length + 1), "text", f"{file} of {size} bytes", f"at least {20 * (length + 1)} bytes")

    def texts(self):
        text = read(self.file)
        cut = len(text) * 9 // 10
        return text[:cut], text[cut:]
