"""The driver's end of the line to a worker: dial its socket, shake hands, pass messages on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from llmos.kernel.errors import ProtocolError
from llmos.kernel.wire import Unpacker, pack

# The socket is bound before anybody hears of the worker, so a first dial rarely fails; a
# worker that a kernel lost may be in the middle of anything.
REDIAL_S = (0.005, 0.02, 0.1, 0.5, 1.0)


class WorkerLink(asyncio.Protocol):
    """One connection to one worker. `said` gets every message; the first is its hello."""

    def __init__(
        self,
        hello: dict[str, Any],
        said: Callable[[dict[str, Any]], None],
        lost: Callable[[], None],
    ) -> None:
        self._hello, self._said, self._lost = hello, said, lost
        self._unpacker = Unpacker()
        self.garbled = False  # what came was not the protocol
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []  # said before the line was up

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(b"".join([pack({"k": "hello", **self._hello}), *self._early]))
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._unpacker.feed(data):
                if isinstance(message, dict) and isinstance(message.get("k"), str):
                    self._said(message)
        except ProtocolError:
            # It talks nonsense: nothing after this can be trusted.
            self.garbled = True
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost()

    def send(self, message: dict[str, Any]) -> None:
        if self._transport is not None:
            self._transport.write(pack(message))
        else:
            self._early.append(pack(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def dial(path: str, make: Callable[[], WorkerLink]) -> WorkerLink | None:
    """Connect to a worker's socket, a few times -> None when nobody answers."""
    loop = asyncio.get_running_loop()
    for pause in (*REDIAL_S, None):
        try:
            _, protocol = await loop.create_unix_connection(make, path)
            return protocol
        except OSError:
            if pause is None:
                return None
            await asyncio.sleep(pause)
    return None
