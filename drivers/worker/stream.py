"""The stream of a process: what it said, as frames in a file that only its worker writes.

Offsets are bytes. A reader that comes back gives its offset and misses nothing; a record that
was torn by a kill is cut off when the stream is opened again. What the disk does not take (it is
full) waits here in its order, and is written when there is room.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections import deque
from pathlib import Path
from typing import Any

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import MAX_FRAME_BYTES, pack, unpack

_HEADER = struct.Struct(">I")

# So much may wait for a disk that is full. Above it the oldest reports of progress are dropped
# (and their number is said); text and what else a person asked for is kept whatever it takes.
WAITING_BYTES = 16 * 1024**2
DROPPED_FIRST = "progress"


class Stream:
    """Append-only. Each record is one `write`, so a reader sees it whole or not yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd, self._end = path, -1, 0
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._waiting_bytes = self._dropped = 0
        self.trouble = ""  # why what was said last is not in the file yet
        self.flush()

    @property
    def behind(self) -> bool:
        """Is there something that the file does not have yet?"""
        return bool(self._waiting)

    def append(self, kind: str, values: dict[str, Any]) -> None:
        record = pack({"kind": kind, "at": time.time(), **values})
        self._waiting.append((kind, record))
        self._waiting_bytes += len(record)
        self.flush()
        if self._waiting_bytes > WAITING_BYTES:
            self._drop()

    def flush(self) -> bool:
        """Write what waits -> whether all of it is in the file now."""
        try:
            self._open()
            while self._waiting:
                self._write(self._waiting[0][1])
                self._waiting_bytes -= len(self._waiting.popleft()[1])
            if self._dropped:
                text = f"{self._dropped} reports of progress were lost: the disk was full"
                self._write(pack({"kind": "note", "at": time.time(), "text": text}))
                self._dropped = 0
        except OSError as exc:
            self.trouble = exc.strerror or str(exc)
            return False
        self.trouble = ""
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        if self._fd >= 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(fd).st_size
            self._end, _ = whole_records(self._path)
            if self._end < size:
                os.ftruncate(fd, self._end)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def _write(self, record: bytes) -> None:
        """All of a record, or nothing of it. Raises OSError."""
        written = 0
        try:
            while written < len(record):  # a disk that fills up takes a part first
                written += os.write(self._fd, record[written:])
        except OSError:
            if written:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end)
            raise
        self._end += len(record)

    def _drop(self) -> None:
        kept: deque[tuple[str, bytes]] = deque()
        while self._waiting:
            kind, record = self._waiting.popleft()
            if kind == DROPPED_FIRST and self._waiting_bytes > WAITING_BYTES // 2:
                self._waiting_bytes -= len(record)
                self._dropped += 1
            else:
                kept.append((kind, record))
        self._waiting = kept


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
