"""The real kernel inside the test's own event loop, with the simulated driver.

The loop runs while a test runs and stands still between tests, so one kernel serves a whole
module. After every event the core's invariants are checked; whatever reaches the loop's
exception handler fails the test; at the end no task, thread, child or descriptor may be left.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from llmos.drivers.cpu import procfs
from llmos.kernel import config, server
from llmos.kernel import events as ev
from llmos.kernel import protocol as p
from llmos.kernel.home import Home
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import Process, Role, State
from support.client import LIMIT_S, Talk

MIB = 1024**2


def short_home() -> Path:
    """A folder whose path leaves room for a socket's name."""
    return Path(tempfile.mkdtemp(prefix="l", dir="/tmp"))


async def wait_until(true: Callable[[], bool], within_s: float = LIMIT_S) -> None:
    """Look often, give up late: quick on a good day, not flaky on a slow one."""
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110  what is waited for sets no event
            await asyncio.sleep(0.002)


class Checked(Kernel):
    """A kernel that checks the invariants of its core after every event."""

    def post(self, event: ev.Event) -> None:
        super().post(event)
        self.core.check()


class Live:
    """A kernel, its home and a client. `boot` and `down` may be called again and again."""

    def __init__(self, *devices: str, measure_s: float = 0.2) -> None:
        self.devices = devices or ("sim0:memory=1GiB",)
        self.measure_s = measure_s
        self.path = short_home()
        make_toy_model(self.path / "models" / "toy")
        self.before = _belongings()
        self.runner = asyncio.Runner()
        self.problems: list[dict[str, Any]] = []
        self.runner.get_loop().set_exception_handler(lambda _, what: self.problems.append(what))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def boot(self) -> None:
        home = Home(self.path)
        home.prepare()
        cfg = config.Config(self.path, self.devices, measure_s=self.measure_s)
        self.kernel = Checked(cfg, home, config.drivers_of(cfg))
        await self.kernel.open()
        self.server = await server.listen(self.kernel)
        self.kernel.spawn(self.kernel.bring_up())
        self.talk = await Talk.to(home.socket)

    async def down(self) -> dict[str, int]:
        """An orderly shutdown."""
        answer: dict[str, int] = await self.ask(p.Shutdown())
        await self._close()
        return answer

    async def crash(self) -> None:
        """As a kill -9 would leave it, as far as one process can: nobody is told anything."""
        self.kernel.owners.hang_up = lambda pid: None  # type: ignore[method-assign]
        await self._close()

    async def _close(self) -> None:
        await self.talk.close()
        self.server.close()
        for client in list(self.kernel.clients):
            client.close()
        await self.kernel.close()

    def dispose(self) -> None:
        """Everything away; fails when something is left."""
        left = [t for t in asyncio.all_tasks(self.runner.get_loop()) if not t.done()]
        self.runner.close()
        shutil.rmtree(self.path)
        assert not left, f"tasks are left: {left}"
        after = _belongings()
        for what, mine in self.before.items():
            extra = after[what] - mine
            assert not extra, f"{what} are left: {extra}"

    # ---- what tests do ----

    async def ask(self, request: p.Request) -> Any:
        return await self.talk.ask(request)

    async def other(self) -> Talk:
        """One more client."""
        return await Talk.to(self.kernel.home.socket)

    async def spin(self, **options: Any) -> int:
        """Submit a `spin`; options that are no field of Submit are its arguments."""
        return await self.submit("spin", **options)

    async def guest(self, **options: Any) -> int:
        return await self.submit("infer", **{"model": "toy", "prompt": "x", **options})

    async def submit(self, program: str, **options: Any) -> int:
        request = submission(program, **options)
        return int((await self.ask(request))["pid"])

    def proc(self, pid: int) -> Process:
        return self.kernel.core.m.procs[pid]

    async def until(self, pid: int, true: Callable[[Process], bool]) -> Process:
        proc = self.proc(pid)
        await wait_until(lambda: true(proc))
        return proc

    async def until_state(self, pid: int, *states: State) -> Process:
        return await self.until(pid, lambda proc: proc.state in states)

    async def wait(self, pid: int) -> dict[str, Any]:
        answer: dict[str, Any] = await self.ask(p.Wait(pid, LIMIT_S))
        return answer

    async def clean(self) -> None:
        """Between two tests: no process of a user lives."""
        for proc in list(self.kernel.core.m.procs.values()):
            if proc.live and proc.role is not Role.SERVICE:
                await self.ask(p.Kill(proc.pid, 9))
        await wait_until(lambda: not any(w.device for w in self.kernel.core.m.workers.values()))
        self.kernel.core.check()
        problems, self.problems = self.problems, []
        assert not problems, problems


def submission(program: str, **options: Any) -> p.Submit:
    known = set(inspect.signature(p.Submit).parameters)
    fields = {k: v for k, v in options.items() if k in known}
    return p.Submit(program, {k: v for k, v in options.items() if k not in known}, **fields)


def in_kernel(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in the loop of its `live` kernel."""

    @functools.wraps(test)
    def run(live: Live, **more: Any) -> None:
        live.run(_limited(test(live, **more)))

    return run


async def _limited(work: Awaitable[None]) -> None:
    async with asyncio.timeout(3 * LIMIT_S):
        await work


def make_toy_model(folder: Path) -> None:
    """What a model folder looks like from outside; the simulated driver looks no further."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _belongings() -> dict[str, set[Any]]:
    return {
        "threads": {t.name for t in threading.enumerate()},
        "children": set(procfs.children(os.getpid())),
        "descriptors": set(_descriptors()),
    }


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue  # the one that lists the folder
    return found
