"""A file that memory is moved out to: pieces with checksums, written and read by a few threads.

It lives as long as the worker that wrote it: the list of checksums is in memory, so a file that
another process left is of no use to anyone. What must outlive a worker is a checkpoint.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmos.kernel.errors import WorkerLost

# One thread makes checksums (1.6 GB/s) while the other writes.
THREADS = 2

# Written pages are sent to the disk while others are still being written, so that the last sync
# does not wait for all of them.
FLUSH_BYTES = 128 * 2**20

# The system takes at most 1024 buffers in a call.
_MOST_BUFFERS = 512


class Store:
    """One file. `write` and `read` return at once; `finish` waits and raises what went wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[int, int] = {}  # offset of a piece -> CRC-32
        self._open: list[Future[None]] = []
        self._unflushed = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, flags, 0o600)
        self._threads = ThreadPoolExecutor(THREADS, "store")

    def write(self, offset: int, views: Sequence[memoryview]) -> Future[None]:
        """Write a piece at `offset`; its memory must stay as it is until that is done."""
        self._unflushed += sum(len(v) for v in views)
        flush = self._unflushed >= FLUSH_BYTES
        if flush:
            self._unflushed = 0
        return self._start(self._write, offset, list(views), flush)

    def read(self, offset: int, views: Sequence[memoryview]) -> Future[None]:
        """Read the piece that was written at `offset`, and check it."""
        return self._start(self._read, offset, list(views))

    def finish(self, sync: bool) -> None:
        """Wait for all that was started; with `sync` it is on the disk then."""
        started, self._open = self._open, []
        for future in started:
            future.result()
        if sync:
            os.fsync(self._fd)

    def remove(self) -> None:
        """Give the disk space back."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def _start(self, work: Callable[..., None], *args: Any) -> Future[None]:
        future = self._threads.submit(work, *args)
        self._open.append(future)
        return future

    def _write(self, offset: int, views: list[memoryview], flush: bool) -> None:
        self._sums[offset] = _checksum(views)
        for at, some in _calls(offset, views):
            _all(os.pwritev, self._fd, some, at)
        if flush:
            os.fdatasync(self._fd)

    def _read(self, offset: int, views: list[memoryview]) -> None:
        for at, some in _calls(offset, views):
            _all(os.preadv, self._fd, some, at)
        if _checksum(views) != self._sums[offset]:
            raise WorkerLost(
                f"{self._path.name}: what was moved out to disk came back damaged",
                "the process can be started again from its last checkpoint",
            )


def _checksum(views: list[memoryview]) -> int:
    value = 0
    for view in views:
        value = zlib.crc32(view, value)
    return value


def _calls(offset: int, views: list[memoryview]) -> list[tuple[int, list[memoryview]]]:
    """(offset, buffers) of each system call."""
    found = []
    for first in range(0, len(views), _MOST_BUFFERS):
        some = views[first : first + _MOST_BUFFERS]
        found.append((offset, some))
        offset += sum(len(v) for v in some)
    return found


def _all(
    call: Callable[[int, list[memoryview], int], int],
    fd: int,
    views: list[memoryview],
    offset: int,
) -> None:
    """Repeat pwritev or preadv until all bytes are through. Raises OSError."""
    while views:
        done = call(fd, views, offset)
        if not done:
            raise OSError("the file ends too early")
        offset += done
        while views and done >= len(views[0]):
            done -= len(views[0])
            views = views[1:]
        if done:
            views = [views[0][done:], *views[1:]]
