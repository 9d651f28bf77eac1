"""The server's side of a Daemon (`services/daemon.py`): who holds it, and what it is asked.

async with Post(folder, answers) as post:
    tell_started(fd)
    ...
    await post.abandoned.wait()
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmos.kernel.errors import LlmosError

# Without a service that holds it a server ends after this: as long as clients wait for a kernel.
ALONE_S = 60.0

Answers = dict[str, Callable[[], dict[str, Any]]]


class Post:
    """Listens on HOME/NAME/sock for the service."""

    def __init__(self, folder: Path, answers: Answers, alone_s: float = ALONE_S) -> None:
        self._path = folder / "sock"
        self._answers = answers
        self._alone_s = alone_s
        self._held_by = 0
        self.abandoned = asyncio.Event()

    async def __aenter__(self) -> Self:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._held, os.fspath(self._path))
        finally:
            os.umask(before)
        self._wait_for_service()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _wait_for_service(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._alone_s, self.abandoned.set)

    async def _held(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One service, as long as it lives."""
        self._held_by += 1
        self._timer.cancel()
        try:
            while line := await reader.readline():
                answer = self._answers[json.loads(line)["ask"]]()
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError, KeyError, asyncio.CancelledError):
            pass  # whoever that was: it has hung up, or is hung up on
        finally:
            writer.close()
            self._held_by -= 1
            if not self._held_by:
                self._wait_for_service()


def tell_started(fd: int, error: LlmosError | None = None) -> None:
    """The first and last words to the service that has started this process."""
    said = {"ok": True} if error is None else {"error": error.to_wire()}
    with contextlib.suppress(OSError):
        os.write(fd, json.dumps(said).encode())
    os.close(fd)
