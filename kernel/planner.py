"""What processes will take: asked of their programs, or known from earlier runs.

A plan is made by a driver's planner (a forked child) and comes back as an event; what is remembered
of plans, peaks and pairs lies in files of the home that may be deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

from llmos.drivers.base import Driver
from llmos.kernel import access, profiles
from llmos.kernel.errors import from_wire
from llmos.kernel.log import log
from llmos.kernel.process import Process

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

Segments = list[dict[str, Any]]


class Planner:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        config = kernel.config
        self.profiles = profiles.Profiles(
            kernel.home.profiles, _versions(), config.margin_share, config.margin_bytes
        )
        self._tickets = itertools.count(1)
        self._open: dict[int, asyncio.Future[Segments]] = {}

    async def plan(self, schema: dict[str, Any], proc: Process) -> Segments:
        """What a process will take: as earlier runs of its profile did, or as its program predicts
        it in a driver's planner. Raises what the program raised."""
        k = self._k
        device = proc.device_wanted
        if device not in k.devices:  # not asked for, or of an earlier kernel
            device = next(iter(k.core.m.pool))
        info, driver = k.devices[device]
        key = profiles.key(schema, proc.args, info.kind)
        user = access.drop_to(proc.uid)
        if key and user is not None:
            key += f"@{proc.uid}"  # that somebody else has planned it tells this user nothing
        proc.profile_key = key or f"{proc.program}/{proc.pid}"
        known = self.profiles.lookup(key)
        if known is not None:
            return known
        segments = await self._ask(driver, schema["entry"], proc.args, user)
        return self.profiles.planned(key, segments)

    async def look(self, proc: Process, paths: list[str]) -> None:
        """Have a child under the user of a process open what it names. Raises BadInput."""
        device = next(iter(self._k.core.m.pool))
        _, driver = self._k.devices[device]
        await self._ask(driver, "", {"paths": paths}, access.drop_to(proc.uid))

    async def _ask(
        self, driver: Driver, entry: str, args: dict[str, Any], user: dict[str, Any] | None
    ) -> Segments:
        ticket = next(self._tickets)
        self._open[ticket] = asyncio.get_running_loop().create_future()
        if user is None:
            driver.plan(ticket, entry, args)
        else:
            driver.plan(ticket, entry, args, user)
        try:
            return await self._open[ticket]
        finally:
            del self._open[ticket]

    def planned(self, ticket: int, segments: Segments | None, error: Any) -> None:
        """A driver's planner has answered."""
        future = self._open.get(ticket)
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(from_wire(error))
        else:
            future.set_result(segments or [])

    def measured(self, proc: Process, peak_bytes: int) -> None:
        """A run has shown its peak. A key with a slash is of one process alone."""
        if "/" not in proc.profile_key:
            self.profiles.measured(proc.profile_key, peak_bytes)

    def load(self) -> None:
        """What earlier kernels learned: of memory, and of pairs beside each other."""
        self.profiles.load(log)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            rows = json.loads(self._k.home.packing.read_text())
            self._k.core.m.packing.restore(rows)
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            self._k.core.m.usage.restore(json.loads(self._k.home.usage.read_text()))
        for uid in self._k.core.m.usage.users():
            self._k.core.m.quota_changed[uid] = None

    def save(self) -> None:
        """They are caches: a disk that is full costs a plan, no more."""
        try:
            self.profiles.save()
            rows = self._k.core.m.packing.to_wire()
            if rows:
                aside = self._k.home.packing.with_suffix(".new")
                aside.write_text(json.dumps(rows))
                aside.rename(self._k.home.packing)
            used = self._k.core.m.usage.to_wire()
            if used:
                aside = self._k.home.usage.with_suffix(".new")
                aside.write_text(json.dumps(used))
                aside.rename(self._k.home.usage)
        except OSError as exc:
            log(f"what was learned of memory cannot be kept: {exc}")


def _versions() -> str:
    """What is known of memory holds for these."""
    return " ".join(f"{n} {metadata.version(n)}" for n in ("llmos", "torch", "transformers"))
