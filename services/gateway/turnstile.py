"""How many requests run at once; the others wait, the more important before the less."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator

from llmos.services.gateway.errors import LATER_S, unavailable


class Turnstile:
    def __init__(self, most_active: int, most_waiting: int) -> None:
        self._most_active, self._most_waiting = most_active, most_waiting
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self.active = 0
        self.waiting = 0

    @contextlib.asynccontextmanager
    async def turn(self, nice: int = 0) -> AsyncIterator[None]:
        """Raises ApiError (503) when too many wait already."""
        await self._enter(nice)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, nice: int) -> None:
        if self.active < self._most_active:
            self.active += 1
            return
        if self.waiting >= self._most_waiting:
            raise unavailable(
                f"The gateway is full: {self.active} requests run and {self.waiting} wait; this "
                f"one would have been number {self.waiting + 1} in the queue.",
                LATER_S,
                "queue_full",
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (nice, next(self._order), turn))
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # it was given a turn that it cannot take any more
            raise
        finally:
            self.waiting -= 1

    def _leave(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)  # the place goes from one to the other
                return
        self.active -= 1

    def place(self, nice: int = 0) -> int:
        """How many would be before a request that came now."""
        return sum(1 for other, _, turn in self._waiting if other <= nice and not turn.done())
