"""Read what processes said and printed: files in the home, by byte offset, as they grow.

A stream is a file of frames (kernel/wire.py) that the process's worker appends to; a log is plain
bytes. Nothing is buffered per reader but one piece: a slow reader is read for more slowly.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import stat
import struct
from pathlib import Path
from typing import Any

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import MAX_FRAME_BYTES, unpack

_HEADER = struct.Struct(">I")
PIECE_BYTES = 64 * 1024
TAIL_BYTES = 8 << 20  # the most that is looked through for the last lines of a log
MOST_OFFSET = 1 << 62  # beyond what a file can have the system calls it an error

# Files that readers keep open at most: connections and workers need descriptors, too.
KEPT_OPEN = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)

# fallocate(2): a hole takes no room and reads as zeros; it is made of whole blocks.
KEEP_SIZE, PUNCH_HOLE = 1, 2
BLOCK_BYTES = 4096


class Growth:
    """Who waits for a process's stream or log to grow, or for its end."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}

    def waited_for(self) -> set[int]:
        return set(self._waiting)

    def grown(self, pid: int) -> None:
        for future in self._waiting.pop(pid, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, pid: int, at_most_s: float | None = None) -> None:
        """Until `grown(pid)`, or for a time: a log grows without telling anybody."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(pid, []).append(future)
        try:
            if at_most_s is None:  # as most do: a timer would cost as much as the rest
                await future
                return
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


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file that a process has written into its own folder.

    Raises FileNotFoundError when there is none, and for all that a user could put there to have
    the kernel read or write something else in his place: a link, a pipe, another's file.
    """
    fd = -1
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(fd)
        own = found.st_uid == os.stat(path.parent).st_uid and found.st_nlink == 1
        if stat.S_ISREG(found.st_mode) and own:
            return fd
    except FileNotFoundError:
        raise
    except OSError as exc:
        if exc.errno not in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.EISDIR):
            raise
    if fd >= 0:
        os.close(fd)
    raise FileNotFoundError(errno.ENOENT, "no plain file of its own", str(path))


def read_bytes(path: Path, offset: int, most: int = PIECE_BYTES) -> bytes:
    """Up to `most` bytes at `offset`; b"" at the end, or when there is no file yet."""
    try:
        fd = open_plain(path)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, most, offset) if offset < MOST_OFFSET else b""
    finally:
        os.close(fd)


def trim(path: Path, most: int) -> int:
    """Take the beginning of a log from the disk when more than `most` bytes of it lie there
    -> how many went.

    What is left keeps its offsets: the beginning becomes a hole, which takes no room. On a file
    system without holes the log begins anew, empty.
    """
    try:
        fd = open_plain(path, os.O_RDWR)
    except FileNotFoundError:
        return 0
    try:
        found = os.fstat(fd)
        there = found.st_blocks * 512
        if there <= most:
            return 0
        cut = (found.st_size - most // 2) // BLOCK_BYTES * BLOCK_BYTES
        if cut <= 0:
            return 0
        if _punch(fd, cut):
            return there - os.fstat(fd).st_blocks * 512
        os.ftruncate(fd, 0)
        return there
    finally:
        os.close(fd)


def _punch(fd: int, end: int) -> bool:
    """Make the first `end` bytes of a file a hole; False where the file system has none."""
    import ctypes  # here: few kernels ever need it

    libc = ctypes.CDLL(None, use_errno=True)
    where = (ctypes.c_int64(0), ctypes.c_int64(end))
    return bool(libc.fallocate64(fd, KEEP_SIZE | PUNCH_HOLE, *where) == 0)


def first_data(path: Path, offset: int) -> int:
    """Where a log goes on at or after `offset`: past what was trimmed; 0 when it began anew."""
    try:
        fd = open_plain(path)
    except FileNotFoundError:
        return offset
    try:
        if offset > os.fstat(fd).st_size:
            return 0
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:  # nothing but a hole, or the end
        return offset
    finally:
        os.close(fd)


class StreamReader:
    """Reads one stream as it grows; keeps its file open where not too many are. Close it."""

    _kept = 0  # files that are open, of all readers

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1

    def read(self, offset: int) -> tuple[list[tuple[int, dict[str, Any]]], int]:
        """Whole records from `offset`: [(where the next one begins, record)...], the new offset.

        Raises ProtocolError when `offset` is not where a record begins.
        """
        data = self._bytes(offset, PIECE_BYTES)
        found: list[tuple[int, dict[str, Any]]] = []
        at = 0
        while len(data) - at >= 4:
            (size,) = _HEADER.unpack_from(data, at)
            if size > MAX_FRAME_BYTES:
                raise ProtocolError(f"no record begins at offset {offset + at}")
            if len(data) - at - 4 < size:
                if not found and size + 4 > PIECE_BYTES:
                    data = self._bytes(offset, size + 4)
                    if len(data) == size + 4:
                        continue
                break
            record = unpack(data[at + 4 : at + 4 + size])
            at += 4 + size
            found.append((offset + at, record))
        return found, offset + at

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            StreamReader._kept -= 1

    def _bytes(self, offset: int, most: int) -> bytes:
        if offset >= MOST_OFFSET:
            return b""
        if self._fd < 0:
            if StreamReader._kept >= KEPT_OPEN:
                return read_bytes(self._path, offset, most)
            try:
                self._fd = open_plain(self._path)
            except FileNotFoundError:
                return b""
            StreamReader._kept += 1
        found = os.pread(self._fd, most, offset)
        if not found and os.fstat(self._fd).st_nlink == 0:
            self.close()  # somebody has removed it; whoever writes has made another
        return found


def tail_offset(path: Path, lines: int) -> int:
    """Where the last `lines` lines of a log begin."""
    try:
        fd = open_plain(path)
    except FileNotFoundError:
        return 0
    size = os.fstat(fd).st_size
    os.close(fd)
    if lines == 0:
        return size
    # A line of a log is short; some megabytes of them are more than anybody asks for.
    start = max(0, size - min(TAIL_BYTES, max(1 << 20, lines * 200)))
    data = read_bytes(path, start, size - start)
    pieces = data.splitlines(keepends=True)[-lines:]
    return size - sum(map(len, pieces))
