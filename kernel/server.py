"""The socket of the kernel: frames in, calls dispatched, answers and streams out.

A client may have many requests open. One that does not read its answers is not read from until
it does, and its streams wait; nobody else notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any

from llmos.kernel import protocol
from llmos.kernel.errors import KernelBug, LlmosError, ProtocolError
from llmos.kernel.syscalls import HANDLERS
from llmos.kernel.wire import Unpacker, packer

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# Bytes of answers that wait for a client before it is not read from any more.
HIGH_WATER_BYTES = 1 << 20

# Requests of one client that may be open at a time; more wait in its socket.
MAX_OPEN_REQUESTS = 256


# Answers that are there at once; looking whether they can be awaited would cost as much again.
_PLAIN = frozenset({dict, list})

pack = packer()  # the server runs in one thread


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.uid = os.getuid()
        self.attached: set[int] = set()  # pids that end with this connection
        self._unpacker = Unpacker()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._drained = asyncio.Event()
        self._drained.set()
        self._backlog: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("socket")
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.uid = int.from_bytes(raw[4:8], sys.byteorder)
        if self.uid != os.getuid():
            transport.abort()
            return
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self.kernel.clients.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.kernel.clients.discard(self)
        self._drained.set()
        for task in self._tasks.values():
            task.cancel()
        for pid in self.attached:
            self.kernel.hang_up(pid)

    def pause_writing(self) -> None:
        self._drained.clear()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._drained.set()
        if len(self._tasks) < MAX_OPEN_REQUESTS:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._unpacker.feed(data):
                self._take(message)
        except ProtocolError as exc:
            # Nothing after a bad frame can be understood: say so and hang up.
            self._reply({"id": -1, "error": exc.to_wire()})
            self._transport.close()

    def close(self) -> None:
        self._transport.close()

    def _take(self, message: Any) -> None:
        if isinstance(message, dict) and message.get("cancel") is True:
            number = message.get("id")
            if isinstance(number, int) and number in self._tasks:
                self._tasks[number].cancel()
            return
        number = message.get("id", -1) if isinstance(message, dict) else -1
        try:
            number, request = protocol.decode(message)
            answer = HANDLERS[type(request)](self.kernel, request, self)
        except LlmosError as exc:
            self._reply({"id": number, "error": exc.to_wire()})
            return
        if answer is None or type(answer) in _PLAIN:
            self._reply({"id": number, "ok": answer})
        elif isinstance(answer, Awaitable):
            self._later(number, self._await(number, answer))
        elif isinstance(answer, AsyncIterator):
            self._later(number, self._stream(number, answer))
        else:
            self._reply({"id": number, "ok": answer})

    def _later(self, number: int, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[number] = task
        if len(self._tasks) >= MAX_OPEN_REQUESTS:
            self._transport.pause_reading()
        task.add_done_callback(lambda _: self._finished(number, task))

    def _finished(self, number: int, task: asyncio.Task[None]) -> None:
        if self._tasks.get(number) is task:
            del self._tasks[number]
        if not task.cancelled() and task.exception() is not None:
            bug = KernelBug(f"{type(task.exception()).__name__}: {task.exception()}")
            self._reply({"id": number, "error": bug.to_wire()})
            self.kernel.report(task.exception())
        if len(self._tasks) == MAX_OPEN_REQUESTS - 1 and self._drained.is_set():
            with contextlib.suppress(RuntimeError):
                self._transport.resume_reading()

    async def _await(self, number: int, answer: Awaitable[Any]) -> None:
        try:
            self._reply({"id": number, "ok": await answer})
        except LlmosError as exc:
            self._reply({"id": number, "error": exc.to_wire()})

    async def _stream(self, number: int, items: AsyncIterator[Any]) -> None:
        """Items one by one, as fast as the client reads; the last one is the answer."""
        answer: Any = None
        try:
            async for kind, value in items:
                if kind == "end":
                    answer = value
                    continue
                self._reply({"id": number, "item": value})
                await self._drained.wait()
            self._reply({"id": number, "ok": answer})
        except asyncio.CancelledError:
            self._reply({"id": number, "ok": None})
            raise
        except LlmosError as exc:
            self._reply({"id": number, "error": exc.to_wire()})

    def _reply(self, message: dict[str, Any]) -> None:
        if self._transport.is_closing():
            return
        try:
            self._transport.write(pack(message))
        except ProtocolError as exc:  # an answer above the frame limit
            self._transport.write(pack({"id": message["id"], "error": exc.to_wire()}))


async def listen(kernel: Kernel) -> asyncio.Server:
    """Open the door. A socket file that an earlier kernel left is in nobody's way."""
    path = kernel.home.socket
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    before = os.umask(0o177)
    try:
        loop = asyncio.get_running_loop()
        return await loop.create_unix_server(lambda: Client(kernel), str(path), backlog=128)
    finally:
        os.umask(before)
