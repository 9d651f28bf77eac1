"""The socket of the kernel: frames in, calls dispatched, answers and streams out.

A client may have many requests open. One that does not read its answers is not read from until
it does, and its streams wait; nobody else notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.kernel import access, protocol
from llmos.kernel.dmesg import Cause
from llmos.kernel.errors import Busy, KernelBug, LlmosError, ProtocolError
from llmos.kernel.names import user_name
from llmos.kernel.syscalls import HANDLERS
from llmos.kernel.wire import NOTHING, Unpacker, packer

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# So many requests of a client are taken at a time; then it is the others' turn. More would save a
# pass of the loop (microseconds) and let the others wait longer.
BURST = 4

# Frames to one client wait for each other until so much is to be sent.
TOGETHER_BYTES = 16 * 1024

# Connections in all. Others than root and the owner leave some of them free.
MAX_CONNECTIONS, KEPT_FOR_ADMINS = 800, 16

# Answers that are there at once; looking whether they can be awaited would cost as much again.
_PLAIN = frozenset({dict, list})

# Calls that change something: what follows from one bears its number in `dmesg`.
CHANGING = frozenset(
    {protocol.Submit, protocol.Kill, protocol.Renice, protocol.Pause, protocol.Resume,
     protocol.Checkpoint, protocol.Services, protocol.Shutdown}
)  # fmt: skip
# What is told of their arguments: never a prompt, a path or an environment.
_SHOWN = ("program", "name", "action", "signal", "nice", "cls", "release")

pack = packer()  # the server runs in one thread


class Intake:
    """What all clients have sent of messages whose rest has not come: bounded as a whole."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._parts: dict[Client, int] = {}  # who has been unfinished for longest is first
        self._total = 0

    def keep(self, client: Client, nbytes: int) -> None:
        """A client has so many bytes of an unfinished message; who has had some for longest is
        cut off when there is no room for all."""
        self._total += nbytes - self._parts.get(client, 0)
        self._parts[client] = nbytes
        while self._total > self._most:
            oldest = next(iter(self._parts))
            self.drop(oldest)
            oldest.refuse(
                Busy(
                    f"more than {self._most:,} bytes of unfinished messages",
                    "send a message in one piece; the limit is max_unfinished in config.toml",
                )
            )

    def drop(self, client: Client) -> None:
        self._total -= self._parts.pop(client, 0)


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, kernel: Kernel, intake: Intake) -> None:
        self.kernel = kernel
        self.uid = os.getuid()
        self.attached: set[int] = set()  # pids that end with this connection
        self._os_pid = 0
        self._said_bye = False  # it went on purpose
        self._intake = intake
        self._unpacker = Unpacker()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._drained = asyncio.Event()
        self._drained.set()
        self._again: asyncio.Handle | None = None
        self._outgoing: list[bytes] = []  # frames that go out together, at the end of this turn
        self._outgoing_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("socket")
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self._os_pid = int.from_bytes(raw[0:4], sys.byteorder)
        self.uid = int.from_bytes(raw[4:8], sys.byteorder)
        if not access.may_connect(self.kernel, self.uid):
            transport.abort()
            return
        transport.set_write_buffer_limits(high=self.kernel.config.client_buffer)
        try:
            self._check_room()
        except Busy as exc:
            self.refuse(exc)
            return
        self.kernel.clients.add(self)

    def _check_room(self) -> None:
        """Raise Busy when this one is more than its user, or the kernel, can have."""
        most = self.kernel.config.max_clients
        if sum(c.uid == self.uid for c in self.kernel.clients) >= most:
            raise Busy(
                f"user {user_name(self.uid)} has {most} connections to the kernel",
                "close some; the limit is max_clients in config.toml",
            )
        kept = 0 if access.is_admin(self.uid) else KEPT_FOR_ADMINS
        if len(self.kernel.clients) >= MAX_CONNECTIONS - kept:
            raise Busy(f"the kernel has {len(self.kernel.clients)} connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self.kernel.clients.discard(self)
        self._intake.drop(self)
        self._drained.set()
        if self._again is not None:
            self._again.cancel()
        for task in self._tasks.values():
            task.cancel()
        lives = not self._said_bye and is_alive(self._os_pid)
        # Whoever came back for one over another line, before this one was seen to end, has it.
        elsewhere = set().union(*(client.attached for client in self.kernel.clients))
        for pid in self.attached - elsewhere:
            (self.kernel.owners.dropped if lives else self.kernel.owners.hang_up)(pid)

    def pause_writing(self) -> None:
        self._drained.clear()

    def resume_writing(self) -> None:
        self._drained.set()
        self._go_on()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._unpacker.push(data)
        if self._again is None:
            self._work()

    def _work(self) -> None:
        """Take what has come, as long as this client may: one that does not read its answers, has
        too much open, or has had its turn, waits with the rest of what it sent."""
        self._again = None
        try:
            for _ in range(BURST):
                if not self._drained.is_set() or len(self._tasks) >= self._most_open:
                    self._transport.pause_reading()
                    return
                message = self._unpacker.pop()
                if message is NOTHING:
                    self._wait_for_more()
                    return
                self._take(message)
        except ProtocolError as exc:
            # Nothing after a bad frame can be understood: say so and hang up.
            self.refuse(exc)
            return
        self._transport.pause_reading()
        self._go_on()

    def _wait_for_more(self) -> None:
        if len(self._unpacker):
            self._intake.keep(self, len(self._unpacker))
        else:
            self._intake.drop(self)
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _go_on(self) -> None:
        if self._again is None and not self._transport.is_closing():
            self._again = asyncio.get_running_loop().call_soon(self._work)

    @property
    def _most_open(self) -> int:
        return self.kernel.config.max_open_requests

    def refuse(self, exc: LlmosError) -> None:
        """Say why, and hang up."""
        self._reply({"id": -1, "error": exc.to_wire()})
        self.close()

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _take(self, message: Any) -> None:
        if isinstance(message, dict) and message.get("bye") is True:
            self._said_bye = True
            return
        number = message.get("id") if isinstance(message, dict) else None
        number = number if isinstance(number, int) else -1
        if isinstance(message, dict) and message.get("cancel") is True:
            if number in self._tasks:
                self._tasks[number].cancel()
            return
        try:
            number, request = protocol.decode(message)
            if number in self._tasks:
                raise ProtocolError(f"the request {number} is open: take another id")
            access.check(self.kernel, request, self)
            if type(request) in CHANGING:
                with self.kernel.dmesg.because(self._cause_of(request)):
                    self._answer(number, HANDLERS[type(request)](self.kernel, request, self))
                return
            answer = HANDLERS[type(request)](self.kernel, request, self)
        except LlmosError as exc:
            self._reply({"id": number, "error": exc.to_wire()})
            return
        except Exception as exc:  # noqa: BLE001  a bug costs its caller an answer, and no line
            self._bug(number, exc)
            return
        self._answer(number, answer)

    def _cause_of(self, request: Any) -> Cause:
        """Who asked for what: one line in `dmesg`, should anything follow from it."""
        what = type(request).__name__.lower()
        said = {
            f.name: getattr(request, f.name)
            for f in dataclasses.fields(request)
            if f.name in _SHOWN and getattr(request, f.name) != f.default
        }
        asked = " ".join(str(v) for v in said.values())
        pid = int(getattr(request, "pid", 0) or 0)
        return self.kernel.dmesg.cause(what, f"{asked} (user {self.uid})".strip(), pid)

    def _answer(self, number: int, answer: Any) -> None:
        if answer is None or type(answer) in _PLAIN:
            self._reply({"id": number, "ok": answer})
        elif isinstance(answer, Awaitable):
            self._later(number, self._await(number, answer))
        elif isinstance(answer, AsyncGenerator):
            self._later(number, self._stream(number, answer))
        else:
            self._reply({"id": number, "ok": answer})

    def _later(self, number: int, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._finished(number, task))

    def _finished(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]
        if not task.cancelled() and task.exception() is not None:
            self._bug(number, task.exception())
        if len(self._tasks) == self._most_open - 1:
            self._go_on()

    def _bug(self, number: int, exc: BaseException | None) -> None:
        bug = KernelBug(f"{type(exc).__name__}: {exc}"[:500])
        self._reply({"id": number, "error": bug.to_wire()})
        self.kernel.report(exc)

    async def _await(self, number: int, answer: Awaitable[Any]) -> None:
        try:
            self._reply({"id": number, "ok": await answer})
        except LlmosError as exc:
            self._reply({"id": number, "error": exc.to_wire()})

    async def _stream(self, number: int, items: AsyncGenerator[Any, None]) -> None:
        """Items one by one, as fast as the client reads; the last one is the answer."""
        answer: Any = None
        try:
            await self._may_write()
            async with contextlib.aclosing(items):
                async for kind, value in items:
                    if kind == "end":
                        answer = value
                        continue
                    self._reply({"id": number, "item": value})
                    await self._may_write()
            self._reply({"id": number, "ok": answer})
        except asyncio.CancelledError:
            self._reply({"id": number, "ok": None})
            raise
        except LlmosError as exc:
            self._reply({"id": number, "error": exc.to_wire()})

    async def _may_write(self) -> None:
        """Until the client has read. Of many streams that wait, the first to be woken may fill it
        again: the others wait on, and have read nothing yet."""
        while not self._drained.is_set():
            await self._drained.wait()

    def _reply(self, message: dict[str, Any]) -> None:
        try:
            frame = pack(message)
        except ProtocolError as exc:  # an answer above the frame limit
            frame = pack({"id": message["id"], "error": exc.to_wire()})
        waits = "item" in message and self._outgoing_bytes + len(frame) < TOGETHER_BYTES
        if waits and not self._outgoing:
            asyncio.get_running_loop().call_soon(self._send)
        self._outgoing.append(frame)
        self._outgoing_bytes += len(frame)
        if not waits:  # whoever waits for an answer waits for nothing else
            self._send()

    def _send(self) -> None:
        """Of many streams that grew in a step each has a frame: one write is for all of them."""
        if self._outgoing and not self._transport.is_closing():
            self._transport.write(b"".join(self._outgoing))
        self._outgoing.clear()
        self._outgoing_bytes = 0


def is_alive(os_pid: int) -> bool:
    """Is there such a process, and not only what its parent has not buried yet?"""
    try:
        stat = Path(f"/proc/{os_pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


async def listen(kernel: Kernel) -> asyncio.Server:
    """Open the door. A socket file that an earlier kernel left is in nobody's way."""
    path = kernel.home.socket
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    intake = Intake(kernel.config.max_unfinished)
    before = os.umask(0o177)
    try:
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(
            lambda: Client(kernel, intake), str(path), backlog=128
        )
    finally:
        os.umask(before)
    if kernel.group is not None:
        os.chown(path, -1, kernel.group.gr_gid)
        path.chmod(0o660)
    return server
