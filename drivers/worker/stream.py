"""The stream of a process: what it said, as frames in a file that only its worker writes.

Offsets are bytes. A reader that comes back gives its offset and misses nothing; a record that
was torn by a kill is cut off when the stream is opened again.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import MAX_FRAME_BYTES, pack, unpack

_HEADER = struct.Struct(">I")


class Stream:
    """Append-only. Each record is one `write`, so a reader sees it whole or not yet."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        size = os.fstat(self._fd).st_size
        end, _ = whole_records(path)
        if end < size:
            os.ftruncate(self._fd, end)

    def append(self, kind: str, values: dict[str, Any]) -> None:
        os.write(self._fd, pack({"kind": kind, "at": time.time(), **values}))

    def close(self) -> None:
        os.close(self._fd)


def whole_records(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Where the last whole record of a stream ends, and the records. Missing file: (0, [])."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0, []
    at, records = 0, []
    while len(data) - at >= 4:
        (size,) = _HEADER.unpack_from(data, at)
        if size > MAX_FRAME_BYTES or len(data) - at - 4 < size:
            break
        try:
            records.append(unpack(data[at + 4 : at + 4 + size]))
        except ProtocolError:
            break
        at += 4 + size
    return at, records
