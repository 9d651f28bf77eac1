"""The host driver: services, each in a plain interpreter of its own on the machine itself.

It has no device: a service gets no lease and is never held. A service's OS process lives
exactly as long as its connection to the kernel, and what it has started ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGABRT, SIGKILL
from typing import Any, BinaryIO

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
from llmos.drivers.cpu import procfs, tree
from llmos.drivers.cpu.walls import SLACK_BYTES, Wall
from llmos.drivers.link import WorkerLink

# Who is asked to end, or has lost its connection, and is there after this, is killed.
END_S = 5.0


class HostDriver:
    kind = "host"

    def __init__(self, specs: list[str]) -> None:
        del specs  # nothing to configure
        self._links: dict[str, WorkerLink] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._since: dict[str, float] = {}  # worker -> when it was started, monotonic
        self._tasks: set[asyncio.Task[None]] = set()

    def devices(self) -> Sequence[DeviceInfo]:
        return []

    async def open(self, tell: Tell, home: Path, home_id: str) -> None:
        self._tell, self._home = tell, home

    async def close(self) -> None:
        for worker_id in list(self._processes):
            self.signal(worker_id, 15)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def plan(
        self, ticket: int, entry: str, args: dict[str, Any], user: Mapping[str, Any] | None = None
    ) -> None:
        self._tell(PlanMade(ticket, []))

    def start(self, spec: WorkerSpec) -> None:
        task = asyncio.get_running_loop().create_task(self._run(spec))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def adopt(self, spec: WorkerSpec, os_pid: int, started: float) -> None:
        self._tell(WorkerEnded(spec.worker_id, None))

    def started(self, os_pid: int) -> float:
        return procfs.started(os_pid)

    def send(self, worker_id: str, message: dict[str, Any]) -> None:
        if worker_id in self._links:
            self._links[worker_id].send(message)

    def grant(self, worker_id: str, floor: int) -> None:
        """A service needs no device."""

    def hold(self, worker_id: str) -> None:
        self._tell(WorkerHeld(worker_id))

    def signal(self, worker_id: str, signal: int) -> None:
        """To the service; KILL and ABRT to all that it has started, too: a child that serves a call
        shows where it stands. All but KILL are followed by that."""
        process = self._processes.get(worker_id)
        if process is None or process.returncode is not None:
            return
        if signal in (SIGABRT, SIGKILL):
            tree.send(process.pid, signal)
        else:
            process.send_signal(signal)
        if signal != SIGKILL:
            self._kill_later(worker_id, process)

    def _kill_later(self, worker_id: str, process: asyncio.subprocess.Process) -> None:
        def kill() -> None:
            if self._processes.get(worker_id) is process:
                self.signal(worker_id, SIGKILL)

        asyncio.get_running_loop().call_later(END_S, kill)

    def used_bytes(self, worker_id: str) -> int:
        """What a service and all that it has started hold of memory."""
        process = self._processes.get(worker_id)
        if process is None:
            return 0
        return sum(procfs.resident_bytes(p) for p in procfs.children(process.pid))

    def age_s(self, worker_id: str) -> float:
        """How long its OS process has been there."""
        return time.monotonic() - self._since.get(worker_id, time.monotonic())

    def limit(self, worker_id: str, nbytes: int) -> None:
        process = self._processes.get(worker_id)
        if process is not None and process.returncode is None:
            data = {process.pid: procfs.data_bytes(process.pid)}
            Wall(SLACK_BYTES, nbytes, loading=False, data=data).raise_up()

    async def measure(self, device: str, system_pids: Sequence[int]) -> MemorySample:
        mine = {w: procfs.private_bytes(p.pid) for w, p in self._processes.items()}
        return MemorySample(0, 0, 0, 0, mine)

    def statistics(self) -> dict[str, Any]:
        return {"services": len(self._processes), "os_pids": self.os_pids()}

    def os_pids(self) -> list[int]:
        return [p.pid for p in self._processes.values() if p.returncode is None]

    async def _run(self, spec: WorkerSpec) -> None:
        """Start the interpreter, connect, and tell when it has ended."""
        name, _, entry = spec.service.partition("=")
        ours, theirs = socket.socketpair()
        with open_log(spec.log) as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "llmos.services.host", str(theirs.fileno()),
                    str(spec.home), name, entry, str(spec.memory_bytes),
                    pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    cwd="/", env={**os.environ, **spec.env}, start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                log.write(f"{exc}\n".encode())
                ours.close()
                self._tell(WorkerEnded(spec.worker_id, 71))
                return
            finally:
                theirs.close()
        self._processes[spec.worker_id] = process
        self._since[spec.worker_id] = time.monotonic()
        link = WorkerLink(
            {}, lambda m: self._said(spec.worker_id, m), lambda: self._lost(spec.worker_id)
        )
        self._links[spec.worker_id] = link
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        code = await process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, SIGKILL)  # those that it leaves behind
        del self._links[spec.worker_id], self._processes[spec.worker_id]
        del self._since[spec.worker_id]
        link.close()
        self._tell(WorkerEnded(spec.worker_id, code if code >= 0 else 128 - code))

    def _lost(self, worker_id: str) -> None:
        """Its end of the line is closed, or of no more use. It is about to end, or has to."""
        link, process = self._links.get(worker_id), self._processes.get(worker_id)
        if link is None or process is None:
            return
        if link.garbled:
            how = "wrote what is not the protocol on its connection"
            done = {"k": "done", "status": 1, "reason": how, "result": {}}
            self._tell(WorkerSaid(worker_id, done))
            self.signal(worker_id, SIGKILL)
        else:
            self._kill_later(worker_id, process)

    def _said(self, worker_id: str, message: dict[str, Any]) -> None:
        process = self._processes.get(worker_id)
        if process is None:
            return
        if message["k"] == "hello":
            self._tell(WorkerCame(worker_id, process.pid, message))
        else:
            self._tell(WorkerSaid(worker_id, message))


def open_log(path: Path) -> BinaryIO:
    """On a full disk a service runs without a log."""
    try:
        return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
    except OSError:
        return open(os.devnull, "ab")
