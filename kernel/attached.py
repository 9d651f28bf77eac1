"""Attached guests, in a file of the home: they are in no journal while an engine has them.

A client that is attached is promised nothing beyond its connection, so its request is not worth a
sync of the disk. But the process must survive whatever only kills processes: when its engine and
the kernel die in the same moment, nobody else knows it. So a row is appended when a guest is handed
to an engine, and a word when it has ended; the system keeps what was written, and a kernel that
boots reads it. The file is written anew when most of it is about guests that have ended.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import Unpacker, pack

# The file is not written anew for less than so many that have ended.
KEPT_ENDED = 500


class AttachedGuests:
    """Which attached guests engines have. A disk that takes nothing costs these rows, nothing else:
    the engines still tell the next kernel of their guests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[int, bytes] = {}
        self._ended = 0
        self._fd = -1

    def open(self) -> dict[int, bytes]:
        """-> the rows of guests that an earlier kernel had handed out and not seen end, by pid."""
        with contextlib.suppress(OSError, ProtocolError, TypeError, ValueError):
            # What was torn by the end of a machine is the last frame; all before it is whole.
            for pid, row in Unpacker().feed(self._path.read_bytes()):
                if not (isinstance(pid, int) and isinstance(row, bytes)):
                    continue
                if row:
                    self._rows[pid] = row
                else:
                    self._rows.pop(pid, None)
        found = dict(self._rows)
        self._write_anew()
        return found

    def pids(self) -> set[int]:
        return set(self._rows)

    def add(self, pid: int, row: bytes) -> None:
        """An engine gets this guest."""
        self._rows[pid] = row
        self._append(pid, row)

    def drop(self, pid: int) -> None:
        """It has ended, or is in the journal now."""
        if self._rows.pop(pid, None) is None:
            return
        self._append(pid, b"")
        self._ended += 1
        if self._ended > max(KEPT_ENDED, len(self._rows)):
            self._write_anew()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, pid: int, row: bytes) -> None:
        with contextlib.suppress(OSError, ProtocolError):
            frame = pack([pid, row])
            if self._fd >= 0 and os.write(self._fd, frame) < len(frame):
                self._write_anew()  # a torn frame would swallow those behind it

    def _write_anew(self) -> None:
        self.close()
        self._ended = 0
        aside = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            aside.write_bytes(b"".join(pack([pid, row]) for pid, row in self._rows.items()))
            os.chmod(aside, 0o600)
            os.replace(aside, self._path)
        with contextlib.suppress(OSError):
            self._fd = os.open(
                self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
