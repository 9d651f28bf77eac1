"""The CPU driver: workers are forked from a zygote, held by SIGSTOP, measured by /proc.

A hold stops the worker's whole process group; it is off the device when every thread shows as
stopped (0.4-1.2 ms). Nothing is asked of the worker, so a step of any length can be held, and
so can a foreign program.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal as signals
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.base import (
    DeviceInfo,
    MemorySample,
    PlanMade,
    Tell,
    WorkerCame,
    WorkerEnded,
    WorkerHeld,
    WorkerSaid,
    WorkerSpec,
)
from llmos.drivers.cpu import probe, procfs
from llmos.drivers.link import WorkerLink, dial
from llmos.drivers.zygote import Zygote
from llmos.kernel.errors import WorkerLost

# A stop shows within about a millisecond; looking costs 50 us, a timer of the loop 1 ms.
HOLD_SPIN_S = 0.002
HOLD_POLL_S = 0.001

# How long the zygote may take to report a status before "nobody knows" is said.
STATUS_WAIT_S = 2.0


@dataclass(slots=True)
class _Worker:
    spec: WorkerSpec
    secret: str
    os_pid: int = 0
    link: WorkerLink | None = None
    waiting: list[dict[str, Any]] = field(default_factory=list)
    pidfd: int = -1
    met: bool = False
    adopted: bool = False
    ended: bool = False
    stopped: bool = False
    holding: bool = False
    held_at: float = 0.0
    held_s: float = 0.0


class CpuDriver:
    kind = "cpu"

    def __init__(self, specs: list[str]) -> None:
        self._found = {d.info.name: d for d in probe.find(specs)}
        self._workers: dict[str, _Worker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._plans: set[int] = set()

    def devices(self) -> Sequence[DeviceInfo]:
        return [d.info for d in self._found.values()]

    async def open(self, tell: Tell, home: Path, home_id: str) -> None:
        self._tell, self._home, self._home_id = tell, home, home_id
        self._loop = asyncio.get_running_loop()
        self._zygote = Zygote(home, self._from_zygote)
        self._zygote.open()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers.values():
            self._unwatch(worker)
            if worker.link is not None:
                worker.link.close()
        await self._zygote.close()

    # ---- orders ----

    def plan(self, ticket: int, entry: str, args: dict[str, Any]) -> None:
        self._plans.add(ticket)
        self._zygote.send({"k": "plan", "ticket": ticket, "entry": entry, "args": args})

    def start(self, spec: WorkerSpec) -> None:
        worker = _Worker(spec, secrets.token_hex(16))
        self._workers[spec.worker_id] = worker
        spec.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        secret_file = spec.folder / "secret"
        secret_file.touch(mode=0o600)
        secret_file.write_text(worker.secret)
        self._zygote.send(
            {"k": "fork", "worker_id": spec.worker_id, "folder": str(spec.folder),
             "log": str(spec.log), "home": str(spec.home), "cwd": spec.cwd,
             "env": dict(spec.env), "cores": list(self._found[spec.device].cores),
             "secret": worker.secret}
        )  # fmt: skip

    def adopt(self, spec: WorkerSpec, os_pid: int, started: float) -> None:
        worker = _Worker(spec, "", os_pid=os_pid, adopted=True)
        self._workers[spec.worker_id] = worker
        if procfs.started(os_pid) != started:
            self._ended(worker, self._written_status(worker))
            return
        with contextlib.suppress(OSError):
            worker.secret = (spec.folder / "secret").read_text()
        # It may have been held when the kernel died: it cannot answer while it is stopped.
        self._kill_group(worker, signals.SIGCONT)
        self._came_to_be(worker)

    def started(self, os_pid: int) -> float:
        return procfs.started(os_pid)

    def send(self, worker_id: str, message: dict[str, Any]) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.ended:
            return
        if worker.link is not None:
            worker.link.send(message)
        else:
            worker.waiting.append(message)

    def grant(self, worker_id: str, floor: int) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.ended:
            return
        if worker.stopped:
            # A hold that had not shown yet has cost next to nothing.
            worker.held_s += 0.0 if worker.holding else self._loop.time() - worker.held_at
            worker.stopped = False
            self._kill_group(worker, signals.SIGCONT)
        worker.holding = False
        self.send(worker_id, {"k": "lease", "floor": floor, "held_s": worker.held_s})

    def hold(self, worker_id: str) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.ended:
            return
        if worker.stopped and not worker.holding:
            self._loop.call_soon(self._tell, WorkerHeld(worker_id))  # it is off already
            return
        worker.holding = worker.stopped = True
        self._kill_group(worker, signals.SIGSTOP)
        self._see_it_stop(worker, self._loop.time() + HOLD_SPIN_S)

    def signal(self, worker_id: str, signal: int) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.ended or not worker.os_pid:
            return
        worker.holding = worker.stopped = False
        self._kill_group(worker, signal)
        # A stopped process takes no signal but KILL.
        self._kill_group(worker, signals.SIGCONT)

    async def measure(self, device: str, system_pids: Sequence[int]) -> MemorySample:
        cores = {w: s.spec.device for w, s in self._workers.items()}
        pids = {w: s.os_pid for w, s in self._workers.items() if s.os_pid and not s.ended}
        return await self._loop.run_in_executor(
            None, self._measure, device, pids, cores, list(system_pids)
        )

    def statistics(self) -> dict[str, Any]:
        return {"state": self._zygote.state, "os_pid": self._zygote.os_pid or None}

    # ---- what happens ----

    def _from_zygote(self, message: dict[str, Any]) -> None:
        match message["k"]:
            case "forked":
                worker = self._workers.get(message["worker_id"])
                if worker is None:  # an earlier kernel asked for it
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(message["os_pid"], signals.SIGKILL)
                    return
                worker.os_pid = message["os_pid"]
                self._came_to_be(worker)
            case "failed" | "exited":
                worker = self._workers.get(message["worker_id"])
                if worker is not None:
                    self._ended(worker, message.get("status", 71))
            case "planned":
                self._plans.discard(message["ticket"])
                self._tell(
                    PlanMade(message["ticket"], message.get("segments"), message.get("error"))
                )
            case "down":
                self._zygote_down(message["why"])

    def _zygote_down(self, why: str) -> None:
        error = WorkerLost(f"no worker can be started: the zygote is down; {why}").to_wire()
        for ticket in sorted(self._plans):
            self._tell(PlanMade(ticket, None, error))
        self._plans.clear()
        for worker in list(self._workers.values()):
            if not worker.os_pid:
                self._ended(worker, 71)

    def _came_to_be(self, worker: _Worker) -> None:
        try:
            worker.pidfd = os.pidfd_open(worker.os_pid)
        except ProcessLookupError:
            self._spawn(self._find_status(worker))
            return
        self._loop.add_reader(worker.pidfd, self._died, worker)
        self._spawn(self._meet(worker))

    async def _meet(self, worker: _Worker) -> None:
        hello = {"proto": 1, "secret": worker.secret, "home_id": self._home_id}

        def make() -> WorkerLink:
            worker.link = WorkerLink(
                hello, lambda m: self._said(worker, m), lambda: self._lost(worker)
            )
            return worker.link

        if await dial(str(worker.spec.folder / "sock"), make) is None:
            worker.link = None
            if not worker.ended:
                # A worker that nobody can talk to is of no use to anyone.
                self._kill_group(worker, signals.SIGKILL)
            return
        waiting, worker.waiting = worker.waiting, []
        for message in waiting:
            self.send(worker.spec.worker_id, message)

    def _said(self, worker: _Worker, message: dict[str, Any]) -> None:
        worker_id = worker.spec.worker_id
        if message["k"] == "hello":
            worker.met = True
            self._tell(WorkerCame(worker_id, worker.os_pid, message, worker.adopted))
            return
        self._tell(WorkerSaid(worker_id, message))
        # A call is kept until its answer (the next ack takes it along): a kernel that dies in
        # between leaves it to the next one.
        if "seq" in message and message["k"] != "call":
            self.send(worker_id, {"k": "ack", "seq": message["seq"]})

    def _lost(self, worker: _Worker) -> None:
        """The connection broke. If the worker lives and knew us, dial again."""
        worker.link = None
        if worker.ended or procfs.started(worker.os_pid) < 0:
            return
        if worker.met:
            worker.met, worker.adopted = False, True
            self._spawn(self._meet(worker))
        else:
            # It refused the handshake: it is not the worker that was meant.
            self._ended(worker, None)

    def _died(self, worker: _Worker) -> None:
        self._unwatch(worker)
        self._spawn(self._find_status(worker))

    async def _find_status(self, worker: _Worker) -> None:
        """The zygote reaps and tells; if it is gone, the worker is our child or nobody's."""
        deadline = self._loop.time() + STATUS_WAIT_S
        while not worker.ended:
            status = self._written_status(worker)
            if status is None:
                status = self._reap(worker.os_pid)
            if status is not None or self._loop.time() > deadline:
                self._ended(worker, status)
                return
            await asyncio.sleep(0.01)

    def _see_it_stop(self, worker: _Worker, spin_until: float) -> None:
        if not worker.holding or worker.ended:
            return
        if procfs.is_stopped(worker.os_pid):
            worker.holding, worker.held_at = False, self._loop.time()
            self._tell(WorkerHeld(worker.spec.worker_id))
        elif self._loop.time() < spin_until:
            self._loop.call_soon(self._see_it_stop, worker, spin_until)
        else:
            self._loop.call_later(HOLD_POLL_S, self._see_it_stop, worker, spin_until)

    def _ended(self, worker: _Worker, status: int | None) -> None:
        if worker.ended:
            return
        worker.ended = True
        self._unwatch(worker)
        if worker.link is not None:
            worker.link.close()
        self._workers.pop(worker.spec.worker_id, None)
        self._tell(WorkerEnded(worker.spec.worker_id, status))

    # ---- small things ----

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _unwatch(self, worker: _Worker) -> None:
        if worker.pidfd >= 0:
            self._loop.remove_reader(worker.pidfd)
            os.close(worker.pidfd)
            worker.pidfd = -1

    def _kill_group(self, worker: _Worker, number: int) -> None:
        """The worker leads a session of its own; until it has made it, it is alone."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(worker.os_pid, number)
            except ProcessLookupError:
                os.kill(worker.os_pid, number)

    def _reap(self, os_pid: int) -> int | None:
        try:
            found, raw = os.waitpid(os_pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if not found:
            return None
        code = os.waitstatus_to_exitcode(raw)
        return code if code >= 0 else 128 - code

    def _written_status(self, worker: _Worker) -> int | None:
        try:
            return int(json.loads((worker.spec.folder / "exit").read_text())["status"])
        except (OSError, ValueError, KeyError):
            return None

    def _measure(
        self, device: str, pids: dict[str, int], on: dict[str, str], system: list[int]
    ) -> MemorySample:
        """In a thread: reading a large process's pages takes milliseconds."""
        everywhere = {
            worker: sum(procfs.private_bytes(p) for p in procfs.children(os_pid))
            for worker, os_pid in pids.items()
        }
        ours = sum(procfs.private_bytes(p) for p in system)
        # What the zygote shares with its children is counted once, with the zygote.
        ours += procfs.anonymous_bytes(self._zygote.os_pid) if self._zygote.os_pid else 0
        total, available, _ = probe.memory_bytes()
        mine = {w: n for w, n in everywhere.items() if on[w] == device}
        info = self._found[device].info
        first = device == next(iter(self._found))
        # What lies outside the configured capacity takes foreign memory first.
        outside = max(0, total - sum(d.info.capacity_bytes for d in self._found.values()))
        foreign = total - available - ours - sum(everywhere.values()) - outside
        return MemorySample(
            total_bytes=info.capacity_bytes,
            available_bytes=available,
            # Several CPU devices share one memory: what is foreign is shown on the first.
            foreign_bytes=max(0, foreign) if first else 0,
            system_bytes=ours if first else 0,
            workers=mine,
        )
