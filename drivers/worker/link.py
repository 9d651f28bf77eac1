"""The worker's end of its line to the kernel: a socket that the kernel dials.

A thread reads, so that a handshake is answered in the middle of a long step; the main thread
takes messages when it is ready for them and writes its own. What must not be lost carries a
`seq` and is kept until it is acknowledged: a kernel that comes later gets it in its handshake.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import Unpacker, pack

PROTO = 1


class Link:
    def __init__(
        self,
        listener: socket.socket,
        worker_id: str,
        secret: str,
        hello: Callable[[], dict[str, Any]],
    ) -> None:
        self._listener = listener
        self._worker_id = worker_id
        self._secret = secret
        self._hello = hello
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._seq = 0
        self._kept: dict[int, dict[str, Any]] = {}
        self.met = False  # has a kernel ever shaken hands?
        self.held_s = 0.0  # how long this worker has been held so far, as its driver counts
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._accept, name="link", daemon=True).start()

    def post(self, message: dict[str, Any], keep: bool = False) -> None:
        """Send a message; with `keep` it is sent again until a kernel has it."""
        with self._lock:
            if keep:
                self._seq += 1
                message = {**message, "seq": self._seq}
                self._kept[self._seq] = message
            self._send(message)

    def kept(self) -> int:
        with self._lock:
            return len(self._kept)

    def _send(self, message: dict[str, Any]) -> None:
        if self._connection is None:
            return
        try:
            self._connection.sendall(pack(message))
        except OSError:
            self._connection = None

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if int.from_bytes(credentials[4:8], sys.byteorder) != os.getuid():
                connection.close()
                continue
            self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        """Read one kernel's messages until it goes; the first must be its hello."""
        unpacker = Unpacker()
        met = False
        while True:
            try:
                data = connection.recv(1 << 16)
                messages = list(unpacker.feed(data)) if data else []
            except (OSError, ProtocolError):
                data = b""
            if not data:
                break
            for message in messages:
                if not isinstance(message, dict):
                    connection.close()
                    return
                if not met:
                    if message.get("k") != "hello" or message.get("secret") != self._secret:
                        connection.close()
                        return
                    met = self.met = True
                    self._greet(connection)
                elif message["k"] == "ack":
                    self._acknowledge(message["seq"])
                else:
                    # Read by the clock in the middle of a step: not only between steps.
                    self.held_s = message.get("held_s", self.held_s)
                    self.inbox.put(message)
        with self._lock:
            if self._connection is connection:
                self._connection = None
        connection.close()

    def _greet(self, connection: socket.socket) -> None:
        with self._lock:
            self._connection = connection
            hello = {"k": "hello", "proto": PROTO, "worker_id": self._worker_id,
                     "os_pid": os.getpid(), **self._hello()}  # fmt: skip
            # A guest whose end nobody has heard of yet is still this worker's.
            ended = [m["pid"] for m in self._kept.values() if m["k"] == "guest_done"]
            hello["guests"] = [*hello.get("guests", ()), *ended]
            self._send(hello)
            for message in list(self._kept.values()):
                self._send(message)

    def _acknowledge(self, seq: int) -> None:
        with self._lock:
            for old in [s for s in self._kept if s <= seq]:
                del self._kept[old]
