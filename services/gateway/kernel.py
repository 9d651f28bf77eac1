"""The gateway's lines to the kernel: requests become attached processes, over few connections.

A kernel that goes is waited for: streams go on where they were (the client library does that), new
requests wait a little and are told to come again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmos.kernel.errors import BadArgument, LlmosError, NoKernel, from_wire
from llmos.services.gateway.errors import ApiError, unavailable
from llmos.shell import AsyncClient

T = TypeVar("T")
Record = dict[str, Any]

# Open requests of one connection are limited (max_open_requests, 256); a process has two at most.
STREAMS_PER_LINE = 100
MOST_LINES = 32

# A new request waits so long for a kernel that is away.
AWAY_S = 10.0

# A process that says nothing for so long is looked at: is it its user's quota?
LOOK_S = 2.0

HANGUP = 1


@dataclass(frozen=True)
class How:
    """How a process is read.

    `whole`: all that it says, at its end: to be woken for each token costs the kernel, and us, more
    than the token is worth to who needs the text. `patient`: it may wait for ever, for its quota
    too.
    """

    whole: bool = False
    patient: bool = False


class Kernel:
    def __init__(self, home: Path, timeout_s: float, open_s: float = AWAY_S) -> None:
        """`timeout_s`: a process that says nothing for so long is given up. `open_s`: how long
        the first connection waits for a kernel."""
        self._home = home
        self._open_s = open_s
        self._lines: list[AsyncClient] = []
        self._load: dict[AsyncClient, int] = {}
        self._opening = asyncio.Lock()
        self._background: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[None] | None = None
        self.processes: set[Process] = set()
        self.timeout_s = timeout_s

    async def close(self) -> None:
        """What is attached ends with its line."""
        for task in list(self._background):
            task.cancel()
        for line in self._lines:
            await line.close()

    # ---- calls ----

    async def call(self, method: str, **arguments: Any) -> Any:
        """Call a service of llmos."""
        return await self.ask(lambda line: line.call(method, **arguments))

    async def ask(
        self, do: Callable[[AsyncClient], Awaitable[T]], line: AsyncClient | None = None
    ) -> T:
        """Something of the client's. Raises NoKernel when there is none, and none comes soon."""
        line = line or await self._line()
        connection = line.connections
        try:
            return await do(line)
        except NoKernel:
            await self._reconnect(line, connection)
            return await do(line)

    async def submit(self, program: str, args: Record, *, how: How, **options: Any) -> Process:
        """An attached process. One whose submitter is cancelled meanwhile is ended."""
        work = self.spawn(self._submit(program, args, how, options))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_let_go)
            raise

    async def _submit(self, program: str, args: Record, how: How, options: Record) -> Process:
        line = await self._line()
        if self._watching is None:
            self._watching = self.spawn(self._watch())
        self._load[line] += 1
        try:
            pid = await self.ask(
                lambda line: line.submit(program, args, attached=True, **options), line
            )
        except (TypeError, ValueError, OverflowError) as exc:
            self._load[line] -= 1
            raise BadArgument(f"the request cannot be handed on: {exc}") from None
        except BaseException:
            self._load[line] -= 1
            raise
        return Process(self, line, pid, how)

    def ended(self, process: Process, line: AsyncClient) -> None:
        self.processes.discard(process)
        self._load[line] -= 1

    async def _watch(self) -> None:
        """Look at those that say nothing."""
        while True:
            await asyncio.sleep(LOOK_S / 2)
            now = time.monotonic()
            for process in list(self.processes):
                quiet_since = max(process.heard_s, process.looked_s)
                if now - quiet_since >= LOOK_S and not process.how.patient:
                    self.spawn(process.look())

    def spawn(self, work: Awaitable[T]) -> asyncio.Task[T]:
        """In the background; its errors are of whoever awaits it."""
        task: asyncio.Task[T] = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ---- lines ----

    async def _line(self) -> AsyncClient:
        """The line with the fewest streams; another one when that has many."""
        line = min(self._lines, key=self._load.__getitem__, default=None)
        full = line is None or self._load[line] >= STREAMS_PER_LINE
        if full and len(self._lines) < MOST_LINES:
            async with self._opening:
                line = min(self._lines, key=self._load.__getitem__, default=None)
                if line is None or self._load[line] >= STREAMS_PER_LINE:
                    line = await self._open()
        assert line is not None
        return line

    async def _open(self) -> AsyncClient:
        deadline = time.monotonic() + self._open_s
        while True:
            try:
                line = await AsyncClient(self._home).connect()
                break
            except NoKernel:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
        self._lines.append(line)
        self._load[line] = 0
        return line

    async def _reconnect(self, line: AsyncClient, connection: int) -> None:
        try:
            async with asyncio.timeout(AWAY_S):
                await line.reconnect(connection)
        except TimeoutError:
            raise NoKernel(f"no kernel serves {self._home} now") from None


def _let_go(work: asyncio.Task[Process]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().end()


class _GivenUp(LlmosError):
    """Waiting on for a process is of no use: what its client is told."""

    def __init__(self, told: ApiError) -> None:
        super().__init__(told.message)
        self.told = told


class Process:
    """A process of the kernel, from its submission to its end; `end` it, or read it to the end."""

    def __init__(self, kernel: Kernel, line: AsyncClient, pid: int, how: How) -> None:
        self.pid = pid
        self.result: Record = {}
        self.how = how
        self.heard_s = self.looked_s = (
            time.monotonic()
        )  # when it last said something; was looked at
        self._kernel, self._line = kernel, line
        self._stream = line.attach(pid, at_end=how.whole)
        self._over = False
        kernel.processes.add(self)

    async def batches(self) -> AsyncIterator[list[Record]]:
        """Its records as they come, all that are there at a time. Raises what it failed with."""
        try:
            while True:
                try:
                    found = await self._stream.batch()
                except StopAsyncIteration:
                    break
                self.heard_s = time.monotonic()
                yield found
        except _GivenUp as exc:
            raise exc.told from None
        self._is_over()
        self.result = self._stream.result or {}
        self._check_ended()

    def end(self) -> None:
        """Nobody wants it any more. Harmless when it has ended."""
        if not self._over:
            self._is_over()
            self._kernel.spawn(self._kill())

    def _is_over(self) -> None:
        self._over = True
        self._kernel.ended(self, self._line)

    async def _kill(self) -> None:
        await self._stream.close()
        try:
            await self._kernel.ask(lambda line: line.kill(self.pid, HANGUP), self._line)
        except LlmosError:
            return  # it has ended, or the kernel has: then it is told by nobody's coming back

    def _check_ended(self) -> None:
        """Raise LlmosError when it did not end well."""
        status = self.result.get("exit_status")
        if not status:
            return
        error = (self.result.get("result") or {}).get("error")
        if isinstance(error, dict):
            raise from_wire(error)
        why = self.result.get("reason") or f"exit status {status}"
        if status > 128:
            raise unavailable(f"The process of this request (pid {self.pid}) was ended: {why}.")
        raise LlmosError(f"the process of this request (pid {self.pid}) failed: {why}")

    async def look(self) -> None:
        """It says nothing: why? When waiting is of no use, whoever reads its records hears so."""
        self.looked_s = time.monotonic()
        try:
            told = await self._kernel.ask(lambda line: line.explain(self.pid))
        except LlmosError:
            return  # its stream waits for the next kernel, or tells why there is no such process
        if self.how.whole and told["process"]["state"] == "running":
            self.heard_s = self.looked_s  # nothing is heard of it before its end
        reason, quiet_s = str(told.get("reason") or ""), time.monotonic() - self.heard_s
        opens_in_s = told.get("quota_opens_in_s")
        if opens_in_s is not None:
            advice = " ".join(told.get("advice", ()))
            self._stream.fail(_GivenUp(_no_quota(advice, opens_in_s)))
        elif quiet_s >= self._kernel.timeout_s:
            place = told.get("queue_place")
            where = "" if place is None else f"; {place} are before it in its queue"
            state = told["process"]["state"] + (f" ({reason})" if reason else "")
            message = f"Nothing came for {quiet_s:.0f} s: process {self.pid} is {state}{where}."
            after = {"Retry-After": "30"}
            self._stream.fail(_GivenUp(ApiError(504, message, code="timed_out", headers=after)))


def _no_quota(advice: str, opens_in_s: float) -> ApiError:
    return ApiError(
        429,
        f"The quota of this user is used up: {advice or 'later there is some again'}.",
        code="insufficient_quota",
        kind="insufficient_quota",
        headers={"Retry-After": str(max(1, math.ceil(opens_in_s)))},
    )
