"""What a worker prints, and small files that it leaves: on a full disk neither may end it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any


class _Log(io.FileIO):
    """A file of which a full disk takes nothing, without a word."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def forgive() -> None:
    """Let `print` and tracebacks never fail: their lines are lost while the disk is full."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = io.BufferedWriter(_Log(number, "w", closefd=False))
        text = io.TextIOWrapper(raw, "utf-8", errors="backslashreplace", line_buffering=True)
        setattr(sys, name, text)


def write_whole(path: Path, value: Any) -> None:
    """A JSON file, whole or not there. Raises OSError."""
    aside = path.with_name(f".{path.name}")
    try:
        aside.write_text(json.dumps(value))
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
