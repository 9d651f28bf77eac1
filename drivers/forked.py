"""What drivers have in common whose workers are OS processes forked from a zygote.

Starting, adopting, talking to and burying a worker are the same whatever it computes on. How it is
held and how its memory is measured is the device's own: subclasses add `devices`, `grant`, `hold`
and `measure`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.base import (
    PlanMade,
    Tell,
    WorkerCame,
    WorkerEnded,
    WorkerHeld,
    WorkerSaid,
    WorkerSpec,
)
from llmos.drivers.cpu import procfs, tree
from llmos.drivers.link import WorkerLink, dial
from llmos.drivers.worker.reap import reap
from llmos.drivers.zygote import Zygote
from llmos.kernel.errors import WorkerLost
from llmos.kernel.wire import pack

# How long an adopted worker may take to answer before the next one is asked; and before one
# that never answers is given up (it may be in a long call that lets no other thread run).
GREET_S, SILENT_S = 10.0, 300.0

# How long the zygote may take to report a status before "nobody knows" is said.
STATUS_WAIT_S = 2.0


@dataclass(slots=True)
class ForkedWorker:
    """A worker as its driver sees it."""

    spec: WorkerSpec
    secret: str
    os_pid: int = 0
    link: WorkerLink | None = None
    waiting: list[dict[str, Any]] = field(default_factory=list)
    pidfd: int = -1
    met: bool = False
    loaded: bool = False
    adopted: bool = False
    unheard: bool = False  # of an earlier kernel: nobody knows whether it is held
    ended: bool = False
    greeted: asyncio.Event = field(default_factory=asyncio.Event)  # it has said who it is, or ended
    # A hold was ordered; and it has not shown yet.
    stopped: bool = False
    holding: bool = False
    held_at: float = 0.0
    held_s: float = 0.0  # in all


class ForkedDriver:
    """The life of workers. `zygote_name` tells the zygotes of one home apart."""

    kind: str
    zygote_name = "zygote"

    def __init__(self) -> None:
        self._workers: dict[str, ForkedWorker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._plans: set[int] = set()
        self._adopting = asyncio.Lock()

    def _place(self, spec: WorkerSpec) -> dict[str, Any]:
        """What the order to fork says about the device: cores, environment."""
        return {}

    def _met(self, worker: ForkedWorker) -> None:
        """The handshake with a worker is done."""

    def _gone(self, worker: ForkedWorker) -> None:
        """A worker has ended: forget what the subclass knows of it."""

    async def open(self, tell: Tell, home: Path, home_id: str) -> None:
        self._tell, self._home, self._home_id = tell, home, home_id
        self._loop = asyncio.get_running_loop()
        self._zygote = Zygote(home, self._from_zygote, self.zygote_name)
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

    def plan(
        self, ticket: int, entry: str, args: dict[str, Any], user: Mapping[str, Any] | None = None
    ) -> None:
        self._plans.add(ticket)
        private = {"entry": entry, "args": args}
        if user is not None:
            private = self._in_a_file(self._home / "w" / f"plan-{ticket}", private, user)
        self._zygote.send({"k": "plan", "ticket": ticket, **private, "device": self.kind})

    def start(self, spec: WorkerSpec) -> None:
        worker = ForkedWorker(spec, secrets.token_hex(16))
        spec.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        private: dict[str, Any] = {"env": dict(spec.env)}
        if spec.user is not None:
            # Its ranks meet in a file here, which is all that is its own.
            spec.folder.chmod(0o711)
            meeting = spec.folder / "ranks"
            meeting.touch(mode=0o600)
            os.chown(meeting, spec.user["uid"], spec.user["gid"])
            private = self._in_a_file(spec.folder / "order", private, spec.user)
        secret_file = spec.folder / "secret"
        secret_file.touch(mode=0o600)
        secret_file.write_text(worker.secret)
        self._workers[spec.worker_id] = worker  # not before: a full disk leaves no trace of it
        self._zygote.send(
            {"k": "fork", "worker_id": spec.worker_id, "folder": str(spec.folder),
             "log": str(spec.log), "home": str(spec.home), "cwd": spec.cwd,
             **private, "secret": worker.secret, "alone_s": spec.alone_s, **self._place(spec)}
        )  # fmt: skip

    def _in_a_file(
        self, path: Path, private: dict[str, Any], user: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What one user said must not lie in the memory that the next one's worker is forked
        from: the zygote gets a file's name, and only the child reads it."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(pack(private))
        return {"private": str(path), "user": dict(user)}

    def adopt(self, spec: WorkerSpec, os_pid: int, started: float) -> None:
        worker = ForkedWorker(spec, "", os_pid=os_pid, adopted=True, unheard=True)
        self._workers[spec.worker_id] = worker
        if procfs.started(os_pid) != started:
            # What it left before the machine went down says how that ended it, not how it did.
            self._ended(worker, self._written_status(worker) if started >= 0 else None)
            return
        with contextlib.suppress(OSError):
            worker.secret = (spec.folder / "secret").read_text()
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

    def signal(self, worker_id: str, signal: int) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.ended or not worker.os_pid:
            return
        worker.holding = worker.stopped = False
        # A stopped process takes no signal but KILL.
        tree.send(worker.os_pid, signal, signals.SIGCONT)

    def statistics(self) -> dict[str, Any]:
        return {"state": self._zygote.state, "os_pid": self._zygote.os_pid or None}

    # ---- what happens ----

    def _from_zygote(self, message: dict[str, Any]) -> None:
        match message["k"]:
            case "ready":
                # An earlier kernel died between asking for a worker and hearing of it.
                for worker_id, os_pid in message.get("workers", {}).items():
                    if worker_id not in self._workers:
                        tree.send(int(os_pid), signals.SIGKILL)
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
            case "gone":
                # Its workers were let go by the system when it died.
                for worker in self._workers.values():
                    if worker.stopped and not worker.ended:
                        self._hold_again(worker)

    def _zygote_down(self, why: str) -> None:
        error = WorkerLost(f"no worker can be started: the zygote is down; {why}").to_wire()
        for ticket in sorted(self._plans):
            self._tell(PlanMade(ticket, None, error))
        self._plans.clear()
        for worker in list(self._workers.values()):
            if not worker.os_pid:
                self._ended(worker, 71)

    def _came_to_be(self, worker: ForkedWorker) -> None:
        try:
            worker.pidfd = os.pidfd_open(worker.os_pid)
        except ProcessLookupError:
            self._spawn(self._find_status(worker))
            return
        self._loop.add_reader(worker.pidfd, self._died, worker)
        self._spawn(self._meet(worker))

    async def _meet(self, worker: ForkedWorker) -> None:
        if not worker.unheard:
            await self._dial(worker)
            return
        worker.unheard = False
        # It may have been held when the kernel died, and cannot answer while it is stopped. One at
        # a time: each is held again when it has spoken, so that they do not all compute at once.
        async with self._adopting:
            if not worker.ended:
                tree.send(worker.os_pid, signals.SIGCONT)
                await self._dial(worker)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GREET_S):
                        await worker.greeted.wait()
        if not worker.ended and not worker.greeted.is_set():
            self._loop.call_later(SILENT_S, self._end_silent, worker)

    def _end_silent(self, worker: ForkedWorker) -> None:
        """It lives and does not even say who it is."""
        if not worker.ended and not worker.greeted.is_set():
            tree.send(worker.os_pid, signals.SIGKILL)

    async def _dial(self, worker: ForkedWorker) -> None:
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
                tree.send(worker.os_pid, signals.SIGKILL)
            return
        waiting, worker.waiting = worker.waiting, []
        for message in waiting:
            self.send(worker.spec.worker_id, message)

    def _said(self, worker: ForkedWorker, message: dict[str, Any]) -> None:
        worker_id = worker.spec.worker_id
        if message["k"] == "hello":
            worker.met, worker.loaded = True, bool(message.get("loaded"))
            worker.greeted.set()
            self._met(worker)
            self._tell(WorkerCame(worker_id, worker.os_pid, message, worker.adopted))
            return
        worker.loaded = worker.loaded or message["k"] == "loaded"
        self._tell(WorkerSaid(worker_id, message))
        # A call is kept until its answer. The end of a guest is kept until it is in the journal:
        # the kernel says when.
        if "seq" in message and message["k"] not in ("call", "guest_done"):
            self.send(worker_id, {"k": "ack", "seq": message["seq"]})

    def _lost(self, worker: ForkedWorker) -> None:
        """The connection broke. If the worker lives and knew us, dial again."""
        worker.link = None
        if worker.ended or procfs.started(worker.os_pid) < 0:
            return
        if worker.met:
            worker.met, worker.adopted = False, True
            worker.greeted.clear()
            self._spawn(self._meet(worker))
        else:
            # It refused the handshake: it is not the worker that was meant.
            self._ended(worker, None)

    def _died(self, worker: ForkedWorker) -> None:
        self._unwatch(worker)
        self._spawn(self._find_status(worker))

    async def _find_status(self, worker: ForkedWorker) -> None:
        """The zygote reaps and tells; if it is gone, the worker is our child or nobody's."""
        deadline = self._loop.time() + STATUS_WAIT_S
        while not worker.ended:
            status = self._written_status(worker)
            if status is None:
                with contextlib.suppress(ChildProcessError):
                    status = reap(worker.os_pid, worker.spec.folder)
            if status is not None or self._loop.time() > deadline:
                self._ended(worker, status)
                return
            await asyncio.sleep(0.01)

    def _ended(self, worker: ForkedWorker, status: int | None) -> None:
        if worker.ended:
            return
        worker.ended = True
        worker.greeted.set()
        self._unwatch(worker)
        if worker.link is not None:
            worker.link.close()
        self._workers.pop(worker.spec.worker_id, None)
        self._gone(worker)
        self._tell(WorkerEnded(worker.spec.worker_id, status))

    # ---- holds, for subclasses ----

    def _hold_again(self, worker: ForkedWorker) -> None:
        """It was held, and the zygote's death has let it go."""

    def _alive(self, worker_id: str) -> ForkedWorker | None:
        worker = self._workers.get(worker_id)
        return None if worker is None or worker.ended else worker

    def _is_off(self, worker: ForkedWorker) -> None:
        """The hold has taken effect."""
        worker.holding, worker.held_at = False, self._loop.time()
        self._tell(WorkerHeld(worker.spec.worker_id))

    def _goes_on(self, worker: ForkedWorker) -> None:
        """It is about to get its lease: add up how long it was off."""
        if worker.stopped and not worker.holding:
            # A hold that had not shown yet has cost next to nothing.
            worker.held_s += self._loop.time() - worker.held_at
        worker.stopped = worker.holding = False

    # ---- small things ----

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _unwatch(self, worker: ForkedWorker) -> None:
        if worker.pidfd >= 0:
            self._loop.remove_reader(worker.pidfd)
            os.close(worker.pidfd)
            worker.pidfd = -1

    def _written_status(self, worker: ForkedWorker) -> int | None:
        try:
            return int(json.loads((worker.spec.folder / "exit").read_text())["status"])
        except (OSError, ValueError, KeyError):
            return None
