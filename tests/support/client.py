"""A client in forty lines: the protocol as it is on the wire. Knows nothing of the shell."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

from llmos.kernel import protocol as p
from llmos.kernel.errors import from_wire
from llmos.kernel.wire import Unpacker, pack

# Long enough for a busy machine; a test that needs it has failed.
LIMIT_S = 20.0


class Hangup(Exception):
    """The kernel closed the connection."""


class Talk:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._unpacker = Unpacker()
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[dict[str, Any] | None]] = {}
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def to(cls, socket: Path) -> Self:
        return cls(*await asyncio.open_unix_connection(str(socket)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.writer.transport.abort()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)

    async def ask(self, request: p.Request, limit_s: float = LIMIT_S) -> Any:
        """The value of the answer; raises the error that came instead."""
        async with asyncio.timeout(limit_s):
            return await self.answer(self.begin(request))

    def begin(self, request: p.Request) -> int:
        number = next(self._numbers)
        self.send(p.encode(request, number))
        return number

    def send(self, message: Any) -> None:
        """Any message, for those that are no request."""
        if isinstance(message, dict) and isinstance(message.get("id"), int):
            self._answers.setdefault(message["id"], asyncio.Queue())
        self.writer.write(pack(message))

    async def answer(self, number: int) -> Any:
        while True:
            message = await self.next_message(number)
            if "error" in message:
                raise from_wire(message["error"])
            if "ok" in message:
                return message["ok"]

    async def next_message(self, number: int) -> dict[str, Any]:
        async with asyncio.timeout(LIMIT_S):
            message = await self._answers.setdefault(number, asyncio.Queue()).get()
        if message is None:
            raise Hangup
        return message

    async def stream(self, request: p.Request) -> AsyncIterator[Any]:
        """The items of a streaming call; the last one is ("end", answer)."""
        number = self.begin(request)
        while True:
            message = await self.next_message(number)
            if "error" in message:
                raise from_wire(message["error"])
            if "ok" in message:
                yield ("end", message["ok"])
                return
            yield ("item", message["item"])

    async def collect(self, request: p.Request) -> tuple[list[Any], Any]:
        """All items of a streaming call, and its answer."""
        items: list[Any] = []
        async for kind, value in self.stream(request):
            if kind == "end":
                return items, value
            items.append(value)
        raise AssertionError("a stream ended without an answer")

    async def _read(self) -> None:
        try:
            while data := await self.reader.read(1 << 16):
                for message in self._unpacker.feed(data):
                    self._answers.setdefault(message["id"], asyncio.Queue()).put_nowait(message)
        except ConnectionError:
            pass
        for waiting in self._answers.values():
            waiting.put_nowait(None)
