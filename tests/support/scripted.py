"""A kernel's socket that a test answers by hand: real frames, one thread, one handler a call."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmos.kernel.wire import Unpacker, pack

# What a handler gets: the arguments of the call, and how to send a message with its id.
Send = Callable[[dict[str, Any]], None]
Handler = Callable[[dict[str, Any], Send], None]


class Scripted:
    """Serves `home`/kernel.sock until closed. A call without a handler gets no answer."""

    def __init__(self, home: Path, **handlers: Handler) -> None:
        self.handlers = handlers
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(home / "kernel.sock"))
        self._listener.listen()
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        unpacker = Unpacker()
        while True:
            try:
                data = connection.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            for message in unpacker.feed(data):
                self._answer(connection, message)

    def _answer(self, connection: socket.socket, message: dict[str, Any]) -> None:
        call, number = message.get("call", "cancel"), message["id"]
        self.heard.append((call, message.get("args", {})))

        def send(answer: dict[str, Any]) -> None:
            connection.sendall(pack({"id": number, **answer}))

        if call in self.handlers:
            self.handlers[call](message.get("args", {}), send)

    def close(self) -> None:
        """Hang up on everybody."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join()
