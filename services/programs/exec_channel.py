"""The worker's end of the line to a script that uses `llmos.services.steps`.

A unix socket in the process's folder; frames of kernel/wire.py. To the script:

    hello      step, folder     what it goes on from: the newest checkpoint (null: from the start)
    safepoint                   come to one, and say `at`
    write      folder           (answers `at`) write a checkpoint into this empty folder
    go                          (answers `at`, `written`) go on
    stop                        (answers `at`, `written`) end here

From the script:

    ready      can_save         it has begun its first loop
    report     step, total, metrics
    at         step             it stands at a safepoint and waits for an order
    written                     the checkpoint is in the folder; it waits for an order
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import Unpacker, pack
from llmos.services.programs.base import Report


class Channel:
    """Of several connections (the ranks of a distributed run) the one that says `ready` speaks."""

    def __init__(self, path: Path, step: int, folder: Path | None) -> None:
        self.reports: deque[Report] = deque()
        self.can_save = False
        self.at: int | None = None  # the step it waits at
        self.written = False
        self._hello = {"k": "hello", "step": step, "folder": str(folder) if folder else None}
        self._path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._lines: dict[socket.socket, Unpacker] = {}
        self._speaker: socket.socket | None = None

    @property
    def fds(self) -> tuple[int, ...]:
        return (self._listener.fileno(), *(line.fileno() for line in self._lines))

    def read(self) -> None:
        """Take in whatever has come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._greet(self._listener.accept()[0])
        for line in list(self._lines):
            self._read(line)

    def order(self, what: str, **values: Any) -> None:
        """Tell the script; one that has gone hears nothing more."""
        if what in ("go", "stop", "write"):
            self.at, self.written = None, False
        if self._speaker is not None:
            self._send(self._speaker, {"k": what, **values})

    def close(self) -> None:
        for line in list(self._lines):
            line.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _greet(self, line: socket.socket) -> None:
        credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if int.from_bytes(credentials[4:8], sys.byteorder) != os.getuid():
            line.close()
            return
        self._lines[line] = Unpacker()
        self._send(line, self._hello)

    def _read(self, line: socket.socket) -> None:
        try:
            data = line.recv(1 << 16, socket.MSG_DONTWAIT)
            messages = list(self._lines[line].feed(data)) if data else []
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            data, messages = b"", []
        if not data:
            self._lose(line)
            return
        for message in messages:
            try:
                self._take(line, message)
            except (KeyError, TypeError, ValueError, AttributeError):
                self._lose(line)  # it talks nonsense: nothing after this can be trusted
                return

    def _take(self, line: socket.socket, m: dict[str, Any]) -> None:
        match m["k"]:
            case "ready":
                self._speaker, self.can_save = line, bool(m["can_save"])
            case "report":
                total = None if m["total"] is None else int(m["total"])
                metrics = {str(k): float(v) for k, v in m["metrics"].items()}
                self.reports.append(Report(int(m["step"]), total, metrics))
            case "at":
                self.at = int(m["step"])
            case "written":
                self.written = True

    def _send(self, line: socket.socket, message: dict[str, Any]) -> None:
        try:
            line.sendall(pack(message))
        except OSError:
            self._lose(line)

    def _lose(self, line: socket.socket) -> None:
        self._lines.pop(line, None)
        line.close()
        if line is self._speaker:
            self._speaker, self.can_save = None, False
            self.at, self.written = None, False
