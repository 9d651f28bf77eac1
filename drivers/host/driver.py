"""The host driver: services, each in a plain interpreter of its own on the machine itself.

It has no device: a service gets no lease and is never held. A service's OS process lives
exactly as long as its connection to the kernel.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
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
from llmos.drivers.cpu import procfs
from llmos.drivers.link import WorkerLink


class HostDriver:
    kind = "host"

    def __init__(self, specs: list[str]) -> None:
        del specs  # nothing to configure
        self._links: dict[str, WorkerLink] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def devices(self) -> Sequence[DeviceInfo]:
        return []

    async def open(self, tell: Tell, home: Path, home_id: str) -> None:
        self._tell, self._home = tell, home

    async def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def plan(self, ticket: int, entry: str, args: dict[str, Any]) -> None:
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
        process = self._processes.get(worker_id)
        if process is not None and process.returncode is None:
            process.send_signal(signal)

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
        with spec.log.open("ab") as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "llmos.services.host", str(theirs.fileno()),
                    str(spec.home), name, entry, pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
                    env={**os.environ, **spec.env}, start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                log.write(f"{exc}\n".encode())
                ours.close()
                self._tell(WorkerEnded(spec.worker_id, 71))
                return
            finally:
                theirs.close()
        self._processes[spec.worker_id] = process
        link = WorkerLink({}, lambda m: self._said(spec.worker_id, m), lambda: None)
        self._links[spec.worker_id] = link
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        code = await process.wait()
        del self._links[spec.worker_id], self._processes[spec.worker_id]
        link.close()
        self._tell(WorkerEnded(spec.worker_id, code if code >= 0 else 128 - code))

    def _said(self, worker_id: str, message: dict[str, Any]) -> None:
        if message["k"] == "hello":
            self._tell(WorkerCame(worker_id, message["os_pid"], message))
        else:
            self._tell(WorkerSaid(worker_id, message))
