"""The supervised services: which there are, which run, and what people want of them.

A service that somebody stopped stays stopped until it is started, or until the next boot; one that
is disabled is not started at boot either, and that is remembered in the home. So is that one which
is not started at boot by itself was enabled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from signal import SIGABRT, SIGKILL
from typing import TYPE_CHECKING, Any

from llmos.kernel import events as ev
from llmos.kernel.call_arguments import near
from llmos.kernel.errors import HomeUnusable, LlmosError, NoSuchThing, NotAllowed, ServiceFailed
from llmos.kernel.log import log
from llmos.kernel.process import Process, State

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

MIB = 1024**2

UP_S = 30.0  # how long `start` and `restart` wait for it to serve
STOP_S = 30.0  # the driver kills one that does not end by itself long before
START_S = 60.0  # a service that is not up after this has hung


class Services:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        self.pids: dict[str, int] = {}  # of each service's newest process
        self.started = asyncio.Event()
        self._code: dict[str, str] = {}  # what each was started with
        self._about: dict[str, tuple[str, str]] = {}  # (worker, what it says of itself)
        self._disabled = self._read("disabled")
        self._enabled = self._read("enabled")

    # ---- what there is ----

    async def described(self, name: str) -> dict[str, Any]:
        """What the manifest has of a service. Raises NoSuchThing, ServiceFailed (a broken one)."""
        await self.started.wait()
        if name not in self._known():
            await self._k.installed.checked.wait()  # it may have come since the last boot
        known = self._known()
        if name in known:
            found: dict[str, Any] = known[name]
            return found
        broken = self._broken()
        if name in broken:
            raise ServiceFailed(f"service {name} is broken: {broken[name]['error']}",
                                "mend it, then `llmos service reload`")  # fmt: skip
        raise NoSuchThing(f"there is no service {name!r}", near(name, known, "services here:"))

    def process_of(self, name: str) -> Process | None:
        """The process of a service, live or ended; None when it was never started."""
        pid = self.pids.get(name)
        return None if pid is None else self._k.core.m.procs.get(pid)

    def worker_of(self, name: str) -> str:
        """The worker that serves it now; "" while there is none."""
        proc = self.process_of(name)
        if proc is None or proc.state is not State.RUNNING:
            return ""
        worker = self._k.core.m.workers[proc.worker_id]
        return "" if worker.ending else worker.worker_id

    def down(self, name: str, soon_s: float) -> LlmosError | None:
        """Why it serves nobody now, nor within `soon_s`; None when it does, or soon will."""
        proc = self.process_of(name)
        if proc is None or not proc.live:
            word = "stopped" if self.is_enabled(name) else "disabled"
            return ServiceFailed(f"service {name} is {word}", f"`llmos service start {name}`")
        wait_s = (proc.next_start_at or 0.0) - self._k.now()
        if proc.state is State.BACKOFF and wait_s > soon_s:
            why = f"service {name} {self._failure(proc)}; it starts again in {wait_s:.0f} s"
            hint = f"`llmos service logs {name}`; `llmos service restart {name}` tries now"
            return ServiceFailed(why, hint)
        return None

    def is_enabled(self, name: str) -> bool:
        """Is it started at boot?"""
        by_itself = self._known().get(name, {}).get("at_boot", True)
        return name not in self._disabled and (by_itself or name in self._enabled)

    def says(self, name: str, worker_id: str, text: str) -> None:
        """What a service tells of itself, for `service ls`: where it listens, what it does."""
        self._about[name] = (worker_id, text)

    def memory_bytes(self, name: str) -> int:
        """What it may use: the configuration says, or the service itself."""
        declared = self._known().get(name, {}).get("memory_bytes", 0)
        return int(self._k.config.services.get(name, {}).get("memory_bytes", declared))

    def shown(self) -> list[dict[str, Any]]:
        """`service ls`: those that are installed, and those that cannot be imported."""
        rows = [self._row(name, described) for name, described in self._known().items()]
        rows += [self._broken_row(b) for b in self._broken().values()]
        return sorted(rows, key=lambda r: str(r["name"]))

    # ---- what is done ----

    def start_all(self) -> None:
        """At boot."""
        for name in sorted(self._known()):
            if self.is_enabled(name):
                self._start(name)
        self.started.set()

    async def follow(self) -> None:
        """The manifest was made anew: start, stop and restart what has changed since each was
        started. What somebody has stopped stays so."""
        now = self._known()
        for name in sorted(self._code.keys() | now.keys()):
            proc = self.process_of(name)
            live = proc is not None and proc.live
            if name not in now:
                await self._stop(name)
                self.pids.pop(name, None)
                del self._code[name]
            elif name not in self._code:
                if self.is_enabled(name):
                    self._start(name)
            elif live and now[name]["code"] != self._code[name]:
                await self._stop(name)
                self._start(name)

    async def start(self, name: str) -> dict[str, Any]:
        await self.described(name)
        proc = self.process_of(name)
        if proc is None or not proc.live:
            self._start(name)
        elif proc.state is State.BACKOFF:
            self._k.post(ev.RestartAsked(proc.pid))
        return await self._comes_up(name)

    async def stop(self, name: str) -> dict[str, Any]:
        self._may_stop(name, await self.described(name))
        await self._stop(name)
        return {"name": name}

    async def restart(self, name: str) -> dict[str, Any]:
        await self.described(name)
        proc = self.process_of(name)
        if proc is None or not proc.live:
            return await self.start(name)
        before = proc.worker_id
        self._k.post(ev.RestartAsked(proc.pid))
        await self._k.changed(
            proc.pid, lambda p: not p.live or (p.worker_id != before or not p.worker_id), STOP_S
        )
        if not proc.live:  # it was just giving up by itself
            self._start(name)
        return await self._comes_up(name)

    async def enable(self, name: str) -> dict[str, Any]:
        """Start it, now and at each boot."""
        await self.described(name)
        self._disabled.discard(name)
        self._enabled.add(name)
        self._write()
        return await self.start(name)

    async def disable(self, name: str) -> dict[str, Any]:
        """Stop it, and do not start it at boot."""
        self._may_stop(name, await self.described(name))
        self._disabled.add(name)
        self._enabled.discard(name)
        self._write()
        await self._stop(name)
        return {"name": name}

    def fail(self, name: str, how: str, aborts: bool = False) -> None:
        """End a service that misbehaves, and start it again later. It leaves a traceback in its
        log when it `aborts`."""
        proc = self.process_of(name)
        worker = self._k.core.m.worker_of(proc) if proc is not None else None
        if proc is None or worker is None or worker.ending:
            return
        log(f"service {name} {how}")
        self._k.post(ev.ProcessDone(worker.worker_id, proc.pid, 1, how, {}))
        self._k.host.signal(worker.worker_id, SIGABRT if aborts else SIGKILL)

    async def watch(self) -> None:
        """Look at each service now and then: its memory, whether it comes up."""
        while True:
            await asyncio.sleep(self._k.config.measure_s)
            for name in self.pids:
                self._look_at(name)

    # ---- inside ----

    def _look_at(self, name: str) -> None:
        proc = self.process_of(name)
        worker = self._k.core.m.worker_of(proc) if proc is not None else None
        if proc is None or worker is None:
            return
        limit, used = self.memory_bytes(name), self._k.host.used_bytes(worker.worker_id)
        if limit and used > limit:
            used_mib, limit_mib = used // MIB, limit // MIB
            self.fail(name, f"outgrew its limit of {limit_mib} MiB of memory (it had {used_mib})")
        elif proc.state is State.STARTING and self._k.host.age_s(worker.worker_id) > START_S:
            self.fail(name, f"did not come up in {START_S:g} s", aborts=True)

    def _start(self, name: str) -> None:
        described = self._known()[name]
        self._code[name] = described["code"]
        self._k.start_service(name, described["entry"])

    async def _stop(self, name: str) -> None:
        proc = self.process_of(name)
        if proc is not None and proc.live:
            self._k.post(ev.StopAsked(proc.pid))
            await self._k.changed(proc.pid, lambda p: not p.live, STOP_S)
            self._k.calls.look(name)

    async def _comes_up(self, name: str) -> dict[str, Any]:
        """Wait until it serves. ServiceFailed when it fails first."""
        proc = self.process_of(name)
        assert proc is not None
        settled = (State.RUNNING, State.BACKOFF, State.EXITED)
        await self._k.changed(proc.pid, lambda p: p.state in settled, UP_S)
        if proc.state is not State.RUNNING:
            raise ServiceFailed(f"service {name} {self._failure(proc)}",
                                f"`llmos service logs {name}`")  # fmt: skip
        return {"name": name, "pid": proc.pid}

    def _failure(self, proc: Process) -> str:
        """How it ended last, in words: what `backoff` says before the time."""
        last = proc.story[-1][2].removeprefix("its worker ")
        return last.rpartition("; again in")[0] or last

    def _may_stop(self, name: str, described: dict[str, Any]) -> None:
        if described.get("essential"):
            raise NotAllowed(f"service {name} cannot be stopped: others need it",
                             f"`llmos service restart {name}` makes it anew")  # fmt: skip

    def _known(self) -> dict[str, Any]:
        found: dict[str, Any] = self._k.manifest.get("services", {})
        return found

    def _broken(self) -> dict[str, Any]:
        """Services that nobody could import, by name; one that has its like installed is not."""
        every = [b for b in self._k.manifest.get("broken", ()) if b["kind"] == "services"]
        return {b["name"]: b for b in every if b["name"] not in self._known()}

    def _row(self, name: str, described: dict[str, Any]) -> dict[str, Any]:
        proc = self.process_of(name)
        worker = self._k.core.m.worker_of(proc) if proc is not None else None
        live, host = proc is not None and proc.live, self._k.host
        backoff = proc is not None and proc.state is State.BACKOFF
        stopped = "stopped" if self.is_enabled(name) else "disabled"
        told_by, about = self._about.get(name, ("", ""))
        return {
            "name": name,
            "pid": proc.pid if proc else None,
            "state": str(proc.state) if proc and live else stopped,
            "enabled": self.is_enabled(name),
            "why": self._failure(proc) if proc and backoff else "",
            "about": about if worker and worker.worker_id == told_by else "",
            "next_start_at": proc.next_start_at if proc and backoff else None,
            "os_pid": worker.os_pid if worker else None,
            "restarts": proc.restarts if proc else 0,
            "since": self._k.now() - host.age_s(worker.worker_id) if worker else None,
            "memory_bytes": host.used_bytes(worker.worker_id) if worker else 0,
            "memory_limit_bytes": self.memory_bytes(name),
            "distribution": described.get("distribution", ""),
            "summary": described.get("summary", ""),
            "calls": described.get("calls", {}),
        }

    def _broken_row(self, broken: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._row(broken["name"], {"distribution": broken["distribution"]}),
            "state": "broken", "why": broken["error"],
        }  # fmt: skip

    # ---- what the home remembers ----

    def _read(self, which: str) -> set[str]:
        """The services that are disabled, or enabled, by a person."""
        try:
            told = json.loads(self._k.home.services.read_text())
            return {str(name) for name in told.get(which, ())}
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, AttributeError, TypeError) as exc:
            log(f"{self._k.home.services} cannot be read, no service is {which}: {exc!r}")
            return set()

    def _write(self) -> None:
        path = self._k.home.services
        aside = path.with_name(f".{path.name}")
        try:
            with aside.open("w") as file:
                told = {"disabled": sorted(self._disabled), "enabled": sorted(self._enabled)}
                file.write(json.dumps(told) + "\n")
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise HomeUnusable(f"{path} cannot be written: {exc.strerror}") from None
