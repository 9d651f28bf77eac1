"""Calls to services: find the service, pass the call on, bring the answer back in time."""

from __future__ import annotations

import asyncio
import difflib
import itertools
from typing import TYPE_CHECKING, Any

from llmos.kernel.errors import NoSuchThing, ServiceFailed, TimedOut, from_wire
from llmos.kernel.process import State

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# How long a call waits for a service that is being (re)started.
UP_S = 15.0


class Calls:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[str, asyncio.Future[Any]]] = {}

    async def call(self, method: str, args: dict[str, Any], limit_s: float) -> Any:
        """`service.method` -> what it returns. ServiceFailed, TimedOut, or what it raised."""
        k = self._k
        service, _, name = method.partition(".")
        if service not in k.service_pids:
            near = difflib.get_close_matches(service, k.service_pids, 1)
            known = ", ".join(sorted(k.service_pids)) or "none"
            hint = f"did you mean {near[0]}?" if near else f"services here: {known}"
            raise NoSuchThing(f"there is no service {service!r}", hint)
        pid = k.service_pids[service]
        try:
            up = await k.changed(pid, lambda p: p.state is State.RUNNING, min(UP_S, limit_s))
        except TimedOut:
            state = k.core.m.find(pid).state
            raise ServiceFailed(f"service {service} is not up ({state})") from None
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[number] = (up.worker_id, future)
        message = {"k": "call", "id": number, "method": name, "args": args}
        k.host.send(up.worker_id, message)
        try:
            async with asyncio.timeout(limit_s):
                return await future
        except TimeoutError:
            raise TimedOut(f"service {service} did not answer {name} in {limit_s:g} s",
                           f"`llmos service restart {service}`") from None  # fmt: skip
        finally:
            self._open.pop(number, None)

    def answered(self, number: int, message: dict[str, Any]) -> None:
        _, future = self._open.get(number, ("", None))
        if future is None or future.done():
            return  # too late: the caller has given up
        if "error" in message:
            future.set_exception(from_wire(message["error"]))
        else:
            future.set_result(message.get("ok"))

    def failed(self, worker_id: str) -> None:
        """A service died: whoever waits for it hears so at once."""
        for owner, future in list(self._open.values()):
            if owner == worker_id and not future.done():
                future.set_exception(ServiceFailed("the service died while it was called"))
