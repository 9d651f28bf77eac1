"""The Python API for asyncio: as `Client`, with `await` and `async for`.

    async with AsyncClient() as llmos:
        async for text in llmos.run("my-model", "Once upon a time", max_tokens=50):
            print(text, end="")

Any number of tasks may use one client at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

from llmos.kernel import protocol as p
from llmos.kernel.errors import LlmosError, NoKernel, TimedOut
from llmos.shell import resolve
from llmos.shell.autoboot import boot_again
from llmos.shell.client import (
    ANSWER_S,
    RECONNECT_S,
    REDIAL_S,
    Record,
    check_ended,
    from_offset,
    lost,
    no_kernel,
)
from llmos.shell.home import Home, check_socket_path
from llmos.shell.session import Answer, Failure, Item, Result, Session

_RECEIVE_BYTES = 256 * 1024


class AsyncClient:
    """A connection to the kernel of a home; `connect` or `async with` opens it."""

    def __init__(
        self, home: str | os.PathLike[str] | None = None, *, reconnect_s: float = RECONNECT_S
    ) -> None:
        self.home = Home.find(home)
        self.reconnect_s = reconnect_s
        self.connections = 0
        self._owned: set[int] = set()
        self._reconnecting = asyncio.Lock()
        self._session = Session()
        self._answers: dict[int, asyncio.Queue[Answer]] = {}
        self._manifest: Record | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._error: LlmosError | None = None

    async def connect(self) -> Self:
        """Open the connection. Raises NoKernel."""
        check_socket_path(self.home)
        try:
            reader, self._writer = await self._dial()
        except NoKernel:
            if not await asyncio.to_thread(boot_again, self.home):
                raise
            reader, self._writer = await self._dial()
        self._session, self._answers, self._error = Session(), {}, None
        self.connections += 1
        self._reading = asyncio.create_task(self._read(reader))
        return self

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_unix_connection(os.fspath(self.home.socket))
        except OSError as exc:
            raise no_kernel(self.home, exc) from None

    async def reconnect(self, lost: int) -> None:
        """Connect again, unless connection number `lost` is not the last any more.

        Raises NoKernel when no kernel comes in `reconnect_s`.
        """
        async with self._reconnecting:
            if lost != self.connections:
                return
            if not self.connections:
                raise NoKernel("the client is not connected", "use `async with AsyncClient()`")
            await self.close()
            deadline = time.monotonic() + self.reconnect_s
            while True:
                try:
                    await self.connect()
                    return
                except NoKernel:
                    if time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(REDIAL_S)

    async def close(self) -> None:
        """Close the connection; twice is harmless."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        if self._writer is not None:
            if self._error is None and not self._writer.is_closing():
                self._writer.write(self._session.bye())
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    # ---- the calls of kernel/protocol.py ----

    async def ping(self) -> None:
        await self.ask(p.Ping(), ANSWER_S)

    async def status(self) -> Record:
        """{kernel: {os_pid uptime_s version ...}, devices: [...], ...}"""
        return dict(await self.ask(p.Status(), ANSWER_S))

    async def ps(self, all: bool = False) -> list[Record]:
        """The live processes; with `all` every one that is kept."""
        return list(await self.ask(p.Ps(all=all), ANSWER_S))

    async def process(self, pid: int) -> Record:
        """One process, ended or not. Raises NoSuchProcess."""
        return dict((await self.ask(p.Ps(pid=pid), ANSWER_S))[0])

    async def mem(self) -> list[Record]:
        """The books of memory, one object a device."""
        return list(await self.ask(p.Mem(), ANSWER_S))

    async def explain(self, pid: int) -> Record:
        """{process, reason, queue_place, story, advice}"""
        return dict(await self.ask(p.Explain(pid), ANSWER_S))

    async def programs(self, checked: bool = False) -> Record:
        """The manifest: {programs: {name: schema}, services, sources, optimizers, errors, broken}

        It may be that of the last boot; `checked`: that of what is installed now, asked again.
        """
        if self._manifest is None or checked:
            self._manifest = dict(await self.ask(p.Programs(checked), ANSWER_S))
        return self._manifest

    async def submit(
        self,
        program: str,
        args: Record | None = None,
        *,
        name: str = "",
        nice: int = 0,
        cls: str = "",
        device: str = "",
        attached: bool = False,
        restart: str = "no",
        deadline_s: float = 0.0,
        hang_s: float | None = None,
        user: str = "",
    ) -> int:
        """Run a program -> its pid. `attached`: it is killed when this connection goes.

        `user`: whose process it is; only root says so, to a kernel that serves a group.
        """
        request = await self._submission(
            program, args, name=name, nice=nice, cls=cls, device=device,
            attached=attached, restart=restart, deadline_s=deadline_s, hang_s=hang_s, user=user,
        )  # fmt: skip
        pid = int((await self.ask(request))["pid"])
        if attached:
            self._owned.add(pid)
        return pid

    async def plan(
        self,
        program: str,
        args: Record | None = None,
        *,
        device: str = "",
        cls: str = "",
        any_size: bool = False,
    ) -> Record:
        """What a program would take -> {footprint, device, ...}; nothing runs.

        What can never fit is refused, unless `any_size` asks for its size all the same.
        """
        request = await self._submission(
            program, args, device=device, cls=cls, dry_run=True, any_size=any_size
        )
        return dict(await self.ask(request))

    async def kill(self, pid: int, signal: int = 15) -> Record:
        """Returns when it took effect -> {pid, state, exit_status}"""
        return dict(await self.ask(p.Kill(pid, signal)))

    async def renice(
        self,
        pid: int,
        nice: int | None = None,
        *,
        cls: str | None = None,
        deadline_s: float | None = None,
    ) -> Record:
        """nice: -20 ... 19, lower is more important. `deadline_s` is from now, 0: none any more."""
        return dict(await self.ask(p.Renice(pid, nice, cls, deadline_s)))

    async def pause(self, pid: int, *, release: bool = False) -> Record:
        """-> {pid, state, freed_bytes, seconds}. With `release` its memory is given back."""
        return dict(await self.ask(p.Pause(pid, release)))

    async def resume(self, pid: int) -> Record:
        return dict(await self.ask(p.Resume(pid)))

    async def checkpoint(self, pid: int) -> Record:
        """Returns when the checkpoint is on disk -> {pid, folder, step}"""
        return dict(await self.ask(p.Checkpoint(pid)))

    async def wait(self, pid: int, timeout_s: float | None = None) -> Record:
        """-> {pid, exit_status, reason, result} when the process has ended. Raises TimedOut."""
        return dict(await self.ask(p.Wait(pid, timeout_s)))

    def attach(
        self, pid: int, offset: int = 0, follow: bool = True, *, at_end: bool = False
    ) -> AsyncStream:
        """The records of a process, from `offset` on; `at_end`: all, when it has ended."""
        own = pid in self._owned
        return AsyncStream(self, p.Attach(pid, offset, follow, own, at_end), "record")

    def dmesg(
        self,
        since: int = 0,
        *,
        pid: int = 0,
        cause: int = 0,
        level: str = "info",
        tail: int = -1,
        follow: bool = False,
    ) -> AsyncStream:
        """The kernel's own log: {seq at level what pid why by cause}, oldest first."""
        return AsyncStream(self, p.Dmesg(since, pid, cause, level, tail, follow), "line")

    def logs(self, pid: int, offset: int = 0, tail: int = -1, follow: bool = False) -> AsyncStream:
        """What a process printed, as pieces of bytes."""
        return AsyncStream(self, p.Logs(pid, offset, tail, follow), "data")

    async def send(self, pid: int, message: Record, key: str = "") -> Record:
        """Give input to a process that waits for it; twice with the same key is once."""
        return dict(await self.ask(p.Send(pid, message, key)))

    async def call(self, method: str, /, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Call a service: call("models.ls")."""
        return await self.ask(p.Call(method, arguments, timeout_s))

    async def services(self) -> list[Record]:
        return list(await self.ask(p.Services(), ANSWER_S))

    async def start_service(self, name: str) -> Record:
        """Returns when it serves -> {name, pid}. Raises ServiceFailed."""
        return dict(await self.ask(p.Services("start", name)))

    async def stop_service(self, name: str) -> Record:
        """Until `start_service`, or the next boot."""
        return dict(await self.ask(p.Services("stop", name)))

    async def restart_service(self, name: str) -> Record:
        """Returns when it serves again -> {name, pid}"""
        return dict(await self.ask(p.Services("restart", name)))

    async def enable_service(self, name: str) -> Record:
        """Start it, now and at each boot."""
        return dict(await self.ask(p.Services("enable", name)))

    async def disable_service(self, name: str) -> Record:
        """Stop it, and do not start it at boot."""
        return dict(await self.ask(p.Services("disable", name)))

    async def reload_services(self) -> Record:
        """Look for what was installed, changed or removed -> {added, removed, changed, broken}"""
        return dict(await self.ask(p.Services("reload")))

    async def events(self, since: int = 0) -> list[Record]:
        """The kernel's record of its decisions after number `since`."""
        return list(await self.ask(p.Events(since), ANSWER_S))

    async def shutdown(self) -> Record:
        """Checkpoint and stop every worker, then end -> {stopped, checkpoints}"""
        return dict(await self.ask(p.Shutdown()))

    # ---- on top of them ----

    async def run(self, model: str, prompt: str, **args: Any) -> AsyncIterator[str]:
        """The continuation of `prompt`, piece by piece; leaving the iterator ends the process."""
        pid = await self.submit("infer", {"model": model, "prompt": prompt, **args}, attached=True)
        stream = self.attach(pid)
        try:
            async for record in stream:
                if record["kind"] == "text":
                    yield record["text"]
        finally:
            await stream.close()
            if stream.result is None:
                await self.kill(pid)
        check_ended(pid, stream.result)

    async def ask(self, request: p.Request, timeout_s: float | None = None) -> Any:
        """Send any request and wait for its answer. Raises the error that the kernel gave."""
        request_id = await self.begin(request)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.next_answer(request_id)
        except TimeoutError:
            raise TimedOut(
                f"the kernel of {self.home.path} did not answer in time",
                f"does it hang? its log is {self.home.log}",
            ) from None
        finally:
            await self.cancel(request_id)
        if isinstance(answer, Failure):
            raise answer.error
        return answer.value

    # ---- for streams ----

    def forget(self, request: p.Request) -> None:
        """A process has been read to its end: nobody comes back for it."""
        if isinstance(request, p.Attach):
            self._owned.discard(request.pid)

    async def begin(self, request: p.Request) -> int:
        """Send a request -> its id."""
        if self._writer is None:
            raise NoKernel("the client is not connected", "use `async with AsyncClient()`")
        if self._error is not None:
            raise self._error
        request_id, data = self._session.send(request)
        self._answers[request_id] = asyncio.Queue()
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as exc:
            raise lost(self.home, exc) from None
        return request_id

    async def next_answer(self, request_id: int) -> Answer:
        """The next answer to a request."""
        answer = await self._answers[request_id].get()
        if not isinstance(answer, Item):
            del self._answers[request_id]
        return answer

    def ready(self, request_id: int) -> list[Answer]:
        """The answers that have come already."""
        queue, found = self._answers.get(request_id), list[Answer]()
        while queue is not None and not queue.empty():
            found.append(queue.get_nowait())
            if not isinstance(found[-1], Item):
                del self._answers[request_id]
                break
        return found

    def fail(self, request_id: int, error: LlmosError) -> None:
        """Answer a request here: whoever waits for it hears `error`."""
        if request_id in self._answers:
            self._answers[request_id].put_nowait(Failure(error))

    async def cancel(self, request_id: int) -> None:
        """End a call early; harmless when it has ended."""
        if self._answers.pop(request_id, None) is None or self._writer is None:
            return
        if self._error is None:
            self._writer.write(self._session.cancel(request_id))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(_RECEIVE_BYTES):
                for request_id, answer in self._session.receive(data):
                    if request_id in self._answers:
                        self._answers[request_id].put_nowait(answer)
            self._error = lost(self.home)
        except OSError as exc:
            self._error = lost(self.home, exc)
        except LlmosError as exc:
            self._error = exc
        for queue in self._answers.values():
            queue.put_nowait(Failure(self._error))

    async def _submission(self, program: str, args: Record | None, **options: Any) -> p.Submit:
        checked = program not in (await self.programs())["programs"]
        schema = resolve.schema_of(await self.programs(checked), program)
        cwd = os.getcwd()
        return p.Submit(
            program=program,
            args=resolve.program_args(schema, args or {}, cwd),
            cwd=cwd,
            env=resolve.environment(schema),
            **options,
        )


class AsyncStream(AsyncIterator[Any]):
    """The items of a streaming call, as `client.Stream`; the call begins with the first item."""

    def __init__(self, client: AsyncClient, request: p.Attach | p.Logs | p.Dmesg, key: str) -> None:
        self.offset = request.since if isinstance(request, p.Dmesg) else request.offset
        self.result: Record | None = None
        self._client = client
        self._request = request
        self._key = key
        self._id: int | None = None
        self._connection = 0
        self._held: Answer | None = None  # came with items that are handed out first
        self._ended = False

    async def _next_answer(self) -> Answer:
        """Over any number of kernels. Raises NoKernel when none comes back."""
        while True:
            try:
                if self._id is None or self._connection != self._client.connections:
                    self._connection = self._client.connections
                    request = from_offset(self._request, self.offset)
                    self._id = await self._client.begin(request)
                answer, self._held = self._held, None
                answer = answer or await self._client.next_answer(self._id)
            except NoKernel:
                answer = None
            gone = answer is None or (
                isinstance(answer, Failure) and isinstance(answer.error, NoKernel)
            )
            if not gone and answer is not None:
                return answer
            await self._client.reconnect(self._connection)

    async def __anext__(self) -> Any:
        if self._ended:
            raise StopAsyncIteration
        match await self._next_answer():
            case Item(value):
                self.offset = value["offset"]
                return value[self._key]
            case Result(value):
                self._ended = True
                self._client.forget(self._request)
                self.result = dict(value or {})
                self.offset = self.result.get("offset", self.offset)
                raise StopAsyncIteration
            case Failure(error):
                self._ended = True
                self._client.forget(self._request)
                raise error

    async def batch(self) -> list[Any]:
        """The next item, and all that have come with it. Raises StopAsyncIteration at the end."""
        found = [await anext(self)]
        for answer in self._client.ready(self._id or 0):
            if isinstance(answer, Item):
                self.offset = answer.value["offset"]
                found.append(answer.value[self._key])
            else:
                self._held = answer
        return found

    def fail(self, error: LlmosError) -> None:
        """Whoever waits for the next item hears `error`."""
        self._client.fail(self._id or 0, error)

    async def close(self) -> None:
        """Stop listening; the process goes on."""
        self._ended = True
        if self._id is not None:
            await self._client.cancel(self._id)
