"""Calls to services: check them, queue them, pass them on one at a time, bring answers back.

Each service serves one call at a time, and its queue is kept here: a caller that gives up before
its turn costs the service nothing, and one whose service dies before its turn waits for the next
one. From the moment a call is sent the service has as long as that call declares; after that it has
hung, and is started anew. The clock stands while a service waits for another one that it called.

A call is its user's all the way: what a service calls while it serves him is called as him, so that
nobody has a service read, as root, what he may not read himself.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmos.kernel import access
from llmos.kernel.call_arguments import check, find_call
from llmos.kernel.errors import BadArgument, LlmosError, ServiceFailed, TimedOut, from_wire

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# How long a call waits for a service that is being (re)started.
UP_S = 15.0

# A call of a program or a service that says nothing else: its own limit, and this in the queue.
QUEUE_S = 60.0

LONGEST_S = 30 * 86400.0

# What services ask the kernel, as they call each other.
USERS_OF = "kernel.users_of"


@dataclass(slots=True, eq=False)
class _Asked:
    """One call, from whoever made it."""

    name: str
    args: dict[str, Any]
    serving_s: float  # how long the service may take
    future: asyncio.Future[Any]
    uid: int  # who calls
    user: dict[str, Any] | None  # whom a service becomes that works as its callers
    begun: bool = False


@dataclass(slots=True)
class _Queue:
    """The calls of one service: the one that it serves, and those behind it."""

    waiting: collections.deque[_Asked] = field(default_factory=collections.deque)
    serving: _Asked | None = None
    number: int = 0
    worker_id: str = ""
    # For whom its process works: whose call it was sent, until it has answered that or has ended.
    # By itself (in its constructor) it is whose kernel this is.
    uid: int = field(default_factory=os.getuid)
    # The clock of what is served: while it runs, since when; and what is left of its time.
    timer: asyncio.TimerHandle | None = None
    since: float = 0.0
    left_s: float = 0.0
    # The call that the service itself has made, and to whom.
    waits_for: str = ""
    nested: asyncio.Task[None] | None = None


class Calls:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        self._numbers = itertools.count(1)
        self._queues: dict[str, _Queue] = collections.defaultdict(_Queue)

    async def call(
        self, method: str, args: dict[str, Any], limit_s: float | None, uid: int, caller: str = ""
    ) -> Any:
        """`service.name`, called by user `uid` -> what it returns. Raises NoSuchThing, BadArgument,
        ServiceFailed, TimedOut, or what the service raised. `caller` is the service that calls, if
        one does.
        """
        user = access.drop_to(uid)
        service, _, name = method.partition(".")
        described = find_call(service, await self._k.services.described(service), name)
        check(method, described, args)
        serving_s = float(described["limit_s"])
        limit_s = _limit(method, serving_s + QUEUE_S if limit_s is None else limit_s)
        if caller:
            self._check_no_circle(caller, service, method)
        loop = asyncio.get_running_loop()
        asked = _Asked(name, args, serving_s, loop.create_future(), uid, user)
        queue = self._queues[service]
        queue.waiting.append(asked)
        watch = loop.call_later(UP_S, self._is_it_up, service, asked)
        self.look(service)
        try:
            async with asyncio.timeout(limit_s):
                return await asked.future
        except TimeoutError:
            raise self._too_late(service, asked, limit_s) from None
        finally:
            watch.cancel()
            if asked in queue.waiting:
                queue.waiting.remove(asked)

    def works_for(self, service: str) -> int:
        """The uid of whoever a service serves at this moment."""
        return self._queues[service].uid

    async def call_of_service(
        self, service: str, method: str, args: dict[str, Any], limit_s: float | None, uid: int
    ) -> Any:
        """A call that a service makes while it serves `uid`, or while it starts: of another one,
        or of the kernel itself."""
        if method == USERS_OF:
            return users_of(self._k, str(args.get("path", "")))
        queue = self._queues[service]
        self._stop_clock(queue)
        try:
            return await self.call(method, args, limit_s, uid, caller=service)
        finally:
            queue.waits_for = ""
            self._run_clock(service)

    def nests(self, service: str, task: asyncio.Task[None]) -> None:
        """`task` brings the answer to a call that a service has made; it ends with the service."""
        self._queues[service].nested = task

    def answered(self, service: str, worker_id: str, m: dict[str, Any]) -> None:
        """KeyError, TypeError, ValueError for what is no answer; then nothing has changed."""
        error = from_wire(dict(m["error"])) if "error" in m else None
        queue = self._queues[service]
        asked = queue.serving
        if asked is None or (queue.worker_id, queue.number) != (worker_id, m["id"]):
            return  # nobody has asked for this
        self._stop_clock(queue)
        queue.serving, queue.uid = None, os.getuid()
        if not asked.future.done():  # else its caller has given up
            if error is not None:
                asked.future.set_exception(error)
            else:
                asked.future.set_result(m.get("ok"))
        self.look(service)

    def ended(self, service: str, worker_id: str, how: str) -> None:
        """A service's process has ended: whose call it served hears so at once."""
        queue = self._queues[service]
        if queue.nested is not None:
            queue.nested.cancel()
            queue.nested = None
        if queue.worker_id == worker_id:
            queue.uid = os.getuid()
        asked = queue.serving
        if asked is not None and queue.worker_id == worker_id:
            self._stop_clock(queue)
            queue.serving = None
            _fail(asked, ServiceFailed(f"service {service} {how} while it served {asked.name}",
                                       f"`llmos service logs {service}`"))  # fmt: skip
        self.look(service)

    def look(self, service: str) -> None:
        """Something has changed: send the next call, or say that nobody will serve it soon."""
        queue = self._queues[service]
        why = self._k.services.down(service, UP_S)
        while why is not None and queue.waiting:
            _fail(queue.waiting.popleft(), why)
        worker_id = self._k.services.worker_of(service)
        while worker_id and queue.serving is None and queue.waiting:
            asked = queue.waiting.popleft()
            if not asked.future.done():
                self._send(service, queue, worker_id, asked)

    def _send(self, service: str, queue: _Queue, worker_id: str, asked: _Asked) -> None:
        asked.begun = True
        queue.serving, queue.worker_id, queue.number = asked, worker_id, next(self._numbers)
        queue.left_s, queue.uid = asked.serving_s, asked.uid
        self._run_clock(service)
        message = {"k": "call", "id": queue.number, "method": asked.name, "args": asked.args}
        self._k.host.send(worker_id, {**message, "user": asked.user})

    # ---- the clock of a call that is served ----

    def _run_clock(self, service: str) -> None:
        queue = self._queues[service]
        if queue.serving is None or queue.timer is not None:
            return
        loop = asyncio.get_running_loop()
        queue.since = loop.time()
        queue.timer = loop.call_later(queue.left_s, self._hung, service, queue.serving)

    def _stop_clock(self, queue: _Queue) -> None:
        if queue.timer is not None:
            queue.timer.cancel()
            queue.timer = None
            queue.left_s -= asyncio.get_running_loop().time() - queue.since

    def _hung(self, service: str, asked: _Asked) -> None:
        queue = self._queues[service]
        queue.timer, queue.serving = None, None
        how = f"hung in {asked.name} for {asked.serving_s:g} s"
        hint = f"it is started again; `llmos service logs {service}` has where it stood"
        _fail(asked, ServiceFailed(f"service {service} {how}", hint))
        self._k.services.fail(service, how, aborts=True)

    # ---- errors ----

    def _check_no_circle(self, caller: str, service: str, method: str) -> None:
        """Whoever waits for somebody who waits for him would wait for ever."""
        chain = [caller, service]
        while chain[-1] != caller and self._queues[chain[-1]].waits_for:
            chain.append(self._queues[chain[-1]].waits_for)
        if chain[-1] == caller:
            raise ServiceFailed(
                f"{caller} cannot call {method}: a circle, {' -> '.join(chain)}",
                "a service that is called cannot call back into one that waits for it",
            )
        self._queues[caller].waits_for = service

    def _is_it_up(self, service: str, asked: _Asked) -> None:
        if asked.begun or asked.future.done():
            return
        why = self._k.services.down(service, 0.0)
        if why is not None:
            _fail(asked, why)
        elif not self._k.services.worker_of(service):
            _fail(asked, ServiceFailed(f"service {service} did not come up in {UP_S:g} s",
                                       f"`llmos service logs {service}`"))  # fmt: skip

    def _too_late(self, service: str, asked: _Asked, limit_s: float) -> LlmosError:
        serving = self._queues[service].serving
        if asked.begun or serving is None:
            return TimedOut(f"service {service} did not answer {asked.name} in {limit_s:g} s",
                            f"it may take {asked.serving_s:g} s; `llmos service restart {service}`"
                            " ends it now")  # fmt: skip
        return TimedOut(f"{service}.{asked.name} did not get its turn in {limit_s:g} s: "
                        f"the service was busy with {serving.name}")  # fmt: skip


def users_of(kernel: Kernel, path: str) -> list[dict[str, Any]]:
    """The live processes that were given a file or folder, or something in it, as an argument: an
    engine and its guests, a training that begins from a model. The oldest first."""
    inside = path.rstrip("/") + "/"
    return [
        {"pid": p.pid, "program": p.program, "user": p.user, "state": str(p.state),
         "role": str(p.role)}
        for p in kernel.core.m.procs.values()
        if p.live and any(isinstance(v, str) and (v + "/").startswith(inside)
                          for v in p.args.values())
    ]  # fmt: skip


def _limit(method: str, limit_s: float) -> float:
    if math.isnan(limit_s) or limit_s <= 0:
        raise BadArgument(f"{method}: the limit of a call is a time, not {limit_s!r} s")
    return min(limit_s, LONGEST_S)


def _fail(asked: _Asked, error: LlmosError) -> None:
    if not asked.future.done():
        asked.future.set_exception(error)
