"""The host driver: services, and programs that need no device, each in a plain interpreter of its
own on the machine itself.

It has no device: nobody here gets a lease or is ever held. Such an OS process lives no longer than
the kernel that started it, and what it has started ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
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
from llmos.drivers.link import WorkerLink, dial
from llmos.kernel.wire import pack

# Who is asked to end, or has lost its connection, and is there after this, is killed.
END_S = 5.0


class HostDriver:
    kind = "host"

    def __init__(self, specs: list[str]) -> None:
        del specs  # nothing to configure
        self._links: dict[str, WorkerLink] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._since: dict[str, float] = {}  # worker -> when it was started, monotonic
        self._programs: set[str] = set()  # workers that are no services
        self._tasks: set[asyncio.Task[None]] = set()

    def devices(self) -> Sequence[DeviceInfo]:
        return []

    async def open(self, tell: Tell, home: Path, home_id: str) -> None:
        self._tell, self._home, self._home_id = tell, home, home_id

    async def close(self) -> None:
        for worker_id in list(self._processes):
            self.signal(worker_id, 15)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def plan(
        self, ticket: int, entry: str, args: dict[str, Any], user: Mapping[str, Any] | None = None
    ) -> None:
        self._tell(PlanMade(ticket, []))

    def start(self, spec: WorkerSpec) -> None:
        run = self._run(spec) if spec.service else self._run_program(spec)
        task = asyncio.get_running_loop().create_task(run)
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
        """Nobody here needs a device."""

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
        services = len(self._processes) - len(self._programs)
        return {"services": services, "os_pids": self.os_pids()}

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
        link = self._watch(spec.worker_id, process, {})
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        await self._bury(spec.worker_id, process)

    async def _run_program(self, spec: WorkerSpec) -> None:
        """As `_run`, for the worker of a program: it listens, as all workers do. The order goes
        through a pipe, for nobody else to read."""
        secret = secrets.token_hex(16)
        order = {
            "worker_id": spec.worker_id, "folder": str(spec.folder), "log": str(spec.log),
            "home": str(spec.home), "cwd": spec.cwd, "env": dict(spec.env), "secret": secret,
            "user": None if spec.user is None else dict(spec.user), "owner": os.getuid(),
        }  # fmt: skip
        try:
            with listen(spec) as listener:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "llmos.drivers.worker.alone",
                    str(listener.fileno()), pass_fds=(listener.fileno(),),
                    stdin=subprocess.PIPE, cwd="/", start_new_session=True,
                )  # fmt: skip
        except OSError as exc:
            with open_log(spec.log) as log:
                log.write(f"{exc}\n".encode())
            self._tell(WorkerEnded(spec.worker_id, 71))
            return
        self._programs.add(spec.worker_id)
        hello = {"proto": 1, "secret": secret, "home_id": self._home_id}
        link = self._watch(spec.worker_id, process, hello)
        assert process.stdin is not None
        process.stdin.write(pack(order))
        process.stdin.close()
        if await dial(str(spec.folder / "sock"), lambda: link) is None:
            self.signal(spec.worker_id, SIGKILL)
        await self._bury(spec.worker_id, process)

    def _watch(
        self, worker_id: str, process: asyncio.subprocess.Process, hello: dict[str, Any]
    ) -> WorkerLink:
        self._processes[worker_id] = process
        self._since[worker_id] = time.monotonic()
        link = WorkerLink(hello, lambda m: self._said(worker_id, m), lambda: self._lost(worker_id))
        self._links[worker_id] = link
        return link

    async def _bury(self, worker_id: str, process: asyncio.subprocess.Process) -> None:
        """Wait for its end, and tell of it."""
        code = await process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, SIGKILL)  # those that it leaves behind
        self._links.pop(worker_id).close()
        del self._processes[worker_id], self._since[worker_id]
        self._programs.discard(worker_id)
        self._tell(WorkerEnded(worker_id, code if code >= 0 else 128 - code))

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
            return
        self._tell(WorkerSaid(worker_id, message))
        if "seq" in message and message["k"] != "call":  # a call is kept until its answer
            self.send(worker_id, {"k": "ack", "seq": message["seq"]})


def listen(spec: WorkerSpec) -> socket.socket:
    """The socket of a worker, bound before it is there. Raises OSError."""
    spec.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if spec.user is not None:
        spec.folder.chmod(0o711)
    address = spec.folder / "sock"
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(address))
        address.chmod(0o600)
        listener.listen(4)
    except OSError:
        listener.close()
        raise
    return listener


def open_log(path: Path) -> BinaryIO:
    """On a full disk a service runs without a log."""
    try:
        return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
    except OSError:
        return open(os.devnull, "ab")
