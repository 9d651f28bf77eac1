"""Read what processes said and printed: files in the home, by byte offset, as they grow.

A stream is a file of frames (kernel/wire.py) that the process's worker appends to; a log is plain
bytes. Nothing is buffered per reader but one piece: a slow reader is read for more slowly.
"""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path
from typing import Any

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import MAX_FRAME_BYTES, unpack

_HEADER = struct.Struct(">I")
PIECE_BYTES = 64 * 1024


class Growth:
    """Who waits for a process's stream or log to grow, or for its end."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}

    def grown(self, pid: int) -> None:
        for future in self._waiting.pop(pid, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, pid: int, at_most_s: float | None = None) -> None:
        """Until `grown(pid)`, or for a time: a log grows without telling anybody."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(pid, []).append(future)
        try:
            async with asyncio.timeout(at_most_s):
                await future
        except TimeoutError:
            return
        finally:
            # Who looks again and again at what never grows must not leave a trace each time.
            waiting = self._waiting.get(pid, [])
            if future in waiting:
                waiting.remove(future)
                if not waiting:
                    del self._waiting[pid]


def read_bytes(path: Path, offset: int, most: int = PIECE_BYTES) -> bytes:
    """Up to `most` bytes at `offset`; b"" at the end, or when there is no file yet."""
    try:
        with path.open("rb") as f:
            f.seek(offset)
            return f.read(most)
    except FileNotFoundError:
        return b""


def read_records(path: Path, offset: int) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """Whole records from `offset`: [(where the next one begins, record)...], the new offset.

    Raises ProtocolError when `offset` is not where a record begins.
    """
    data = read_bytes(path, offset)
    found: list[tuple[int, dict[str, Any]]] = []
    at = 0
    while len(data) - at >= 4:
        (size,) = _HEADER.unpack_from(data, at)
        if size > MAX_FRAME_BYTES:
            raise ProtocolError(f"no record begins at offset {offset + at}")
        if len(data) - at - 4 < size:
            if not found and size + 4 > PIECE_BYTES:
                data = read_bytes(path, offset, size + 4)
                if len(data) == size + 4:
                    continue
            break
        record = unpack(data[at + 4 : at + 4 + size])
        at += 4 + size
        found.append((offset + at, record))
    return found, offset + at


def tail_offset(path: Path, lines: int) -> int:
    """Where the last `lines` lines of a log begin."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return 0
    if lines == 0:
        return size
    # A line of a log is short; a megabyte of them is more than anybody asks for.
    start = max(0, size - max(1 << 20, lines * 200))
    data = read_bytes(path, start, size - start)
    pieces = data.splitlines(keepends=True)[-lines:]
    return size - sum(map(len, pieces))
