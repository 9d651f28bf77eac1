"""Requests as processes: one `infer` for each prompt, ended when its client goes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmos.services.gateway.answers import Gathered
from llmos.services.gateway.asked import Args, Asked
from llmos.services.gateway.kernel import How, Kernel, Process, Record

# Of the prompts of one request, so many are processes at a time.
PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Whose:
    """For whom a request is served, and since when (epoch). `user` is empty for whoever runs
    the kernel; `owner` is whose the things are that a request makes."""

    user: str = ""
    owner: str = ""
    began_at: float = field(default_factory=time.time)
    patient: bool = False  # nobody waits at the other end: whatever it waits for will come


class Meter(Protocol):
    """Who counts what passes."""

    def pace(self, endpoint: str, began_at: float) -> Callable[[float], None]:
        """-> what is to be called for each piece of text, with when it was made."""
        ...

    def spent(self, result: Record) -> None:
        """The result of a process that has ended."""
        ...


class Runner:
    """Makes processes of requests."""

    def __init__(self, kernel: Kernel, meter: Meter, dtype: str = "") -> None:
        """`dtype`: in which number format models compute; empty: what `infer` does by itself."""
        self.kernel, self.meter = kernel, meter
        self._served: Args = {"dtype": dtype} if dtype else {}

    @contextlib.asynccontextmanager
    async def process(
        self,
        program: str,
        args: Args,
        options: dict[str, Any],
        whose: Whose,
        whole: bool = True,
    ) -> AsyncIterator[Process]:
        """A process that ends with the block. `whole`: it is read when it has ended."""
        how = How(whole, whose.patient)
        made = await self.kernel.submit(
            program, {**self._served, **args}, how=how, user=whose.user, **options
        )
        try:
            yield made
        finally:
            made.end()

    async def gather(self, asked: Asked, prompt: Args, whose: Whose, endpoint: str) -> Gathered:
        """One prompt, to its end. Raises what its process failed with."""
        found = Gathered(asked.n)
        async for batch in self._records(asked, prompt, found, whose, endpoint, whole=True):
            for record in batch:
                found.add(record)
        return found

    def batches(
        self, asked: Asked, prompt: Args, found: Gathered, whose: Whose, endpoint: str
    ) -> AsyncGenerator[list[Record], None]:
        """The records of one prompt as they come; at the end `found` has the result."""
        return self._records(asked, prompt, found, whose, endpoint, whole=False)

    async def _records(
        self,
        asked: Asked,
        prompt: Args,
        found: Gathered,
        whose: Whose,
        endpoint: str,
        *,
        whole: bool,
    ) -> AsyncGenerator[list[Record], None]:
        came = self.meter.pace(endpoint, whose.began_at)
        args = {**asked.args, **prompt}
        async with self.process("infer", args, asked.options, whose, whole) as process:
            async for batch in process.batches():
                for record in batch:
                    if record["kind"] == "text":
                        came(record["at"])
                yield batch
            found.end(process.result.get("result") or {})
            self.meter.spent(found.result)

    async def gather_all(self, asked: Asked, whose: Whose, endpoint: str) -> list[Gathered]:
        """Every prompt of a request, some at a time. The first that fails ends the others."""
        room = asyncio.Semaphore(PROMPTS_AT_ONCE)

        async def one(prompt: Args) -> Gathered:
            async with room:
                return await self.gather(asked, prompt, whose, endpoint)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(p)) for p in asked.prompts]
        except ExceptionGroup as exc:
            raise _first(exc) from None
        return [task.result() for task in tasks]

    async def merged(
        self, asked: Asked, whose: Whose, endpoint: str
    ) -> AsyncGenerator[tuple[int, Gathered, list[Record] | None], None]:
        """The records of every prompt as they come: (prompt, what there is so far, new records);
        None: it has ended."""
        found = [Gathered(asked.n) for _ in asked.prompts]
        if len(found) == 1:
            async for batch in self.batches(asked, asked.prompts[0], found[0], whose, endpoint):
                yield 0, found[0], batch
            yield 0, found[0], None
            return
        room = asyncio.Semaphore(PROMPTS_AT_ONCE)
        ready: asyncio.Queue[tuple[int, list[Record] | BaseException | None]] = asyncio.Queue(256)

        async def one(number: int) -> None:
            try:
                async with room:
                    prompt = asked.prompts[number]
                    async for new in self.batches(asked, prompt, found[number], whose, endpoint):
                        await ready.put((number, new))
                await ready.put((number, None))
            except Exception as exc:  # noqa: BLE001  it is raised to whoever reads
                await ready.put((number, exc))

        tasks = [asyncio.ensure_future(one(number)) for number in range(len(found))]
        try:
            left = len(found)
            while left:
                number, said = await ready.get()
                if isinstance(said, BaseException):
                    raise said
                left -= said is None
                yield number, found[number], said
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _first(group: ExceptionGroup[Exception]) -> Exception:
    exc: Exception = group
    while isinstance(exc, ExceptionGroup):
        exc = exc.exceptions[0]
    return exc
