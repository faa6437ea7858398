"""The store of trials: one JSON line a trial, appended as the trial ends.

A line is keyed by a hash of everything that decides its outcome, so a run that was killed resumes where it stopped,
and trials that two runs share are trained once. A last line that a kill cut in half is dropped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from crosslight.errors import CrosslightError


class Store:
    """``folder/trials.jsonl`` and, beside it, ``folder/weights/<key>.pt``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "trials.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._records = self._read()
        except OSError as error:
            raise CrosslightError(f"out: got {folder}, expected a folder to write to ({error.strerror})") from error

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # a kill cut the last line
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        records = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise CrosslightError(
                    f"out: got {self.path} with line {number} unreadable, expected one JSON object a line"
                ) from error
        return records

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def __len__(self) -> int:
        return len(self._records)

    def weights(self, key: str) -> Path:
        return self.folder / "weights" / f"{key}.pt"

    def append(self, record: dict[str, Any]) -> None:
        """Write one trial; it is on the disk when this returns."""
        line = json.dumps(record, allow_nan=False, sort_keys=True) + "\n"
        if os.environ.get("RANK", "0") == "0":  # of the processes that share a trial one writes
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        self._records[record["key"]] = record
