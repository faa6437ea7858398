"""The user's own text: what is read of a file, and which files are none."""

import codecs

import pytest
import torch

from crosslight import tasks
from crosslight.errors import CrosslightError
from crosslight.tasks.text import read

LINES = "Zwölf Boxkämpfer jagen Viktor, 十二.\n" * 60


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_marked_encoding_is_read_as_utf_8(tmp_path, encoding):
    mark = getattr(codecs, "BOM_" + encoding.replace("-", "", 1).replace("-", "_").upper())
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text(LINES, encoding="utf-8")
    marked.write_bytes(mark + LINES.encode(encoding))
    assert torch.equal(read(str(marked)), read(str(plain)))
    ours, theirs = (tasks.get("text", file=str(file), length=16) for file in (marked, plain))
    assert [len(t) for t in ours.texts()] == [len(t) for t in theirs.texts()]


@pytest.mark.parametrize("text", [LINES.encode(), LINES.encode("latin-1", "ignore"), b"\xff\xfb" * 900])
def test_other_text_is_read_byte_for_byte(tmp_path, text):
    file = tmp_path / "own.txt"
    file.write_bytes(text)
    assert bytes(read(str(file)).tolist()) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES.encode("utf-16-le"), "own.bin, with a NUL byte at 1, expected a text file"),
        (b"GIF89a" + bytes(2000), "own.bin, with a NUL byte at 6, expected a text file"),
        (codecs.BOM_UTF16_LE + b"odd" * 501, "own.bin, with a byte order mark of UTF-16 but no such text, expected"),
        (codecs.BOM_UTF16_LE + bytes([0, 0xD8]) * 800, "own.bin, with a byte order mark of UTF-16 but no such text"),
        (codecs.BOM_UTF16_LE + bytes([0x41, 0, 0, 0]) * 800, "own.bin, with a NUL byte at 1, expected a text file"),
        (b"", "own.bin of 0 bytes, expected at least"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    file = tmp_path / "own.bin"
    file.write_bytes(content)
    with pytest.raises(CrosslightError, match="text: got ") as refused:
        tasks.get("text", file=str(file))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
