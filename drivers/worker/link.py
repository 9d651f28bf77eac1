"""The worker's end of its line to the kernel: a socket that the kernel dials.

A thread reads, so that a handshake is answered in the middle of a long step; the main thread
takes messages when it is ready for them and writes its own. What must not be lost carries a
`seq` and is kept until it is acknowledged: a kernel that comes later gets it in its handshake.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import Unpacker, pack

PROTO = 1

# Without a kernel for so long, nobody is to be expected soon.
ALONE_S = 20.0
LOOK_S = 1.0


class Link:
    def __init__(
        self,
        listener: socket.socket,
        worker_id: str,
        secret: str,
        hello: Callable[[], dict[str, Any]],
        hears: Callable[[dict[str, Any]], bool] = lambda _: False,
        alone: Callable[[], None] = lambda: None,
        alone_s: float = ALONE_S,
        owner: int | None = None,
    ) -> None:
        """`hears` gets each message at once, in this thread; True: it is for nobody else.

        `alone` is called, in this thread, when no kernel was there for `alone_s`.
        `owner`: the uid of the kernel, where that is not this worker's own.
        """
        self._owner = os.getuid() if owner is None else owner
        self._on_alone, self._alone_s = alone, alone_s
        self._lost_at: float | None = None
        self.is_alone = False
        self._listener = listener
        self._worker_id = worker_id
        self._secret = secret
        self._hello = hello
        self._hears = hears
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._seq = 0
        self._kept: dict[int, dict[str, Any]] = {}
        self.met = False  # has a kernel ever shaken hands?
        self.held_s = 0.0  # how long this worker has been held so far, as its driver counts
        self.promised_bytes = 0  # by the kernel; 0 when nothing was said
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        # Readable when something has been put into the inbox, for who waits for more than that.
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        threading.Thread(target=self._accept, name="link", daemon=True).start()

    def post(self, message: dict[str, Any], keep: bool = False) -> None:
        """Send a message; with `keep` it is sent again until a kernel has it."""
        with self._lock:
            if keep:
                self._seq += 1
                message = {**message, "seq": self._seq}
                self._kept[self._seq] = message
            self._send(message)

    def deliver(self, message: dict[str, Any]) -> None:
        """Put a message into the inbox as if the kernel had sent it. In any thread."""
        self.inbox.put(message)
        os.eventfd_write(self.bell, 1)

    def wait(self, on: tuple[int, ...], at_most_s: float | None) -> None:
        """Until a message has come, one of the descriptors can be read, or the time is over."""
        poll = select.poll()
        for fd in (self.bell, *on):
            poll.register(fd, select.POLLIN)
        found = poll.poll(None if at_most_s is None else max(0.0, at_most_s) * 1000)
        if any(fd == self.bell for fd, _ in found):
            os.eventfd_read(self.bell)

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
                self._listener.settimeout(LOOK_S)
                connection, _ = self._listener.accept()
            except TimeoutError:
                self._count_alone()
                continue
            except OSError:
                return
            connection.setblocking(True)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if int.from_bytes(credentials[4:8], sys.byteorder) != self._owner:
                connection.close()
                continue
            self._serve(connection)

    def _count_alone(self) -> None:
        """Nobody has dialled. Before the first kernel this is its birth, not loneliness."""
        if self._lost_at is None or self.is_alone:
            return
        if time.monotonic() - self._lost_at >= self._alone_s:
            self.is_alone = True
            self._on_alone()

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
                    self._lost_at, self.is_alone = None, False
                    self._greet(connection)
                elif message["k"] == "ack":
                    self._acknowledge(message["seq"])
                elif message["k"] == "limit":
                    self.promised_bytes = message["promised_bytes"]
                    if "own_bytes" in message:
                        self.inbox.put(message)
                else:
                    if message["k"] == "answer":
                        self._is_answered(message["id"])
                    # Read by the clock in the middle of a step: not only between steps.
                    self.held_s = message.get("held_s", self.held_s)
                    if not self._hears(message):
                        self.deliver(message)
        with self._lock:
            if self._connection is connection:
                self._connection = None
        if met:
            self._lost_at = time.monotonic()
        connection.close()

    def _greet(self, connection: socket.socket) -> None:
        with self._lock:
            self._connection = connection
            hello = {"k": "hello", "proto": PROTO, "worker_id": self._worker_id,
                     "os_pid": os.getpid(), **self._hello()}  # fmt: skip
            # A guest whose end nobody has heard of yet is still this worker's.
            ended = {
                m["pid"]: m.get("row", b"") for m in self._kept.values() if m["k"] == "guest_done"
            }
            hello["guests"] = [*hello.get("guests", ()), *ended]
            hello["rows"] = {**hello.get("rows", {}), **{p: r for p, r in ended.items() if r}}
            self._send(hello)
            for message in list(self._kept.values()):
                self._send(message)

    def _acknowledge(self, seq: int) -> None:
        with self._lock:
            self._kept.pop(seq, None)

    def _is_answered(self, call: int) -> None:
        """A call is kept until its answer: a kernel that dies in between leaves it to the next."""
        with self._lock:
            for seq, kept in list(self._kept.items()):
                if kept["k"] == "call" and kept["id"] == call:
                    del self._kept[seq]
