"""A byte language model on the user's own file; its last tenth is held out."""

from __future__ import annotations

import codecs
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from crosslight.errors import CrosslightError, expect
from crosslight.tasks.base import task
from crosslight.tasks.language import ByteModel, to_bytes

#: Byte order marks of encodings in which plain letters have NUL bytes; that of UTF-16 begins the one of UTF-32.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@cache
def read(path: str) -> Tensor:
    """The bytes of a file's text, in UTF-8 where a mark at its start tells UTF-16 or UTF-32."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise CrosslightError(f"text: got {path}, expected a file that can be read ({error.strerror})") from error
    encoding = next((name for mark, name in MARKS.items() if text.startswith(mark)), None)
    if encoding is not None:
        try:
            text = text.decode(encoding).encode()
        except UnicodeError as error:
            wrong = f"got {path}, with a byte order mark of {encoding} but no such text, expected a text file"
            raise CrosslightError(f"text: {wrong}") from error
    at = text.find(0)
    expect(at < 0, "text", f"{path}, with a NUL byte at {at}", "a text file, in UTF-8 or with a byte order mark")
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
