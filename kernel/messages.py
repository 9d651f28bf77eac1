"""What drivers and workers say, checked and turned into events of the core.

A worker is not trusted to be right: a message that makes no sense is logged and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import stat
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.drivers.base import (
    DriverEvent,
    PlanMade,
    WorkerCame,
    WorkerEnded,
    WorkerHeld,
    WorkerSaid,
)
from llmos.kernel import access
from llmos.kernel import events as ev
from llmos.kernel.dmesg import Cause
from llmos.kernel.endings import describe_status
from llmos.kernel.errors import HomeUnusable, LlmosError
from llmos.kernel.home import boot_id
from llmos.kernel.log import log
from llmos.kernel.machine import Worker
from llmos.kernel.process import Process, Role
from llmos.kernel.rows import DamagedRow, unpack_row
from llmos.kernel.streams import read_bytes
from llmos.kernel.wire import MAX_FRAME_BYTES

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel


# A disk that took nothing is asked again after so long.
ACK_AGAIN_S = 1.0

# What workers say all the time, and what nothing follows from.
_CHATTER = frozenset({"report", "mark", "alive", "idle"})

# What a service says of itself is in every row of `service ls`.
ABOUT_CHARS = 200

# A worker that said so many things that make no sense is ended.
MOST_NONSENSE = 20

# Of a step, by a guest. Beyond them a sum would be rounded until somebody pays nothing.
LEAST_SHARE, MOST_SHARE = 1e-6, 1e9

# What reading nonsense raises.
_NONSENSE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class _Hello:
    """What a worker says of itself when it is met. It is read before anything follows from it."""

    loaded: bool
    away: bool
    device_bytes: int
    guests: set[int]
    waiting: list[int]
    seen: int
    rows: dict[int, Any]

    @classmethod
    def of(cls, said: dict[str, Any]) -> _Hello:
        """Raises one of `_NONSENSE`."""
        return cls(
            bool(said.get("loaded")), bool(said.get("away")),
            max(0, int(said.get("device_bytes", 0))),
            {int(pid) for pid in said.get("guests", ())},
            [int(pid) for pid in said.get("waiting", ())],
            int(said.get("seen", 0)),
            {int(pid): row for pid, row in dict(said.get("rows", {})).items()},
        )  # fmt: skip


class Inbox:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        self._nonsense: dict[str, int] = {}  # by worker: how often it made none

    def take(self, event: DriverEvent) -> None:
        if isinstance(event, PlanMade):
            self._k.planner.planned(event.ticket, event.segments, event.error)
            return
        with self._k.dmesg.because(self._cause_of(event)):
            self._take(event)

    def _cause_of(self, event: WorkerCame | WorkerSaid | WorkerHeld | WorkerEnded) -> Cause | None:
        """What a worker does follows from its last order, unless it did it by itself."""
        k, worker_id = self._k, event.worker_id
        worker = k.core.m.workers.get(worker_id)
        if worker is None:
            return None
        if isinstance(event, WorkerEnded):
            if not worker.ending and not worker.stop_sent and not k.core.m.shutting_down:
                status = "nobody knows how" if event.status is None else f"status {event.status}"
                return k.dmesg.cause("worker-died", f"{worker_id}: {status}", worker.pid)
        elif isinstance(event, WorkerSaid):
            kind = event.message["k"]
            if kind in _CHATTER or (kind == "checkpointed" and not worker.stop_sent):
                return None  # one that was asked for is told by its own call
            if kind in ("done", "guest_done"):
                pid: Any = event.message.get("pid") if kind == "guest_done" else worker.pid
                if pid == worker.pid or self._is_guest(pid, worker.pid):
                    k.last_cause[worker_id] = k.dmesg.cause("done", "by itself", pid)
        return k.last_cause.get(worker_id)

    def _take(self, event: WorkerCame | WorkerSaid | WorkerHeld | WorkerEnded) -> None:
        worker = self._k.core.m.workers.get(event.worker_id)
        if worker is None:
            return
        match event:
            case WorkerCame():
                self._came(event)
            case WorkerSaid():
                self._said(event)
            case WorkerHeld():
                self._k.post(ev.WorkerHeld(event.worker_id))
            case WorkerEnded():
                self._ended(event)

    def _came(self, e: WorkerCame) -> None:
        k = self._k
        worker = k.core.m.workers[e.worker_id]
        if worker.up:
            return  # the line was broken and mended: nothing has changed
        try:
            hello = _Hello.of(e.hello)
        except _NONSENSE as exc:
            what = f"{exc!r} in its hello"
            log(f"worker {e.worker_id} said what makes no sense: {what}")
            k.post(ev.Misspoke(e.worker_id, what))
            return
        driver = k.driver_of(e.worker_id)
        proc = k.core.m.procs[worker.pid]
        if worker.devices:  # one without ends with the kernel: there is nothing to adopt
            k.worker_rows[proc.pid] = {
                "worker_id": e.worker_id, "devices": list(worker.devices), "os_pid": e.os_pid,
                "started": driver.started(e.os_pid), "boot": boot_id(),
            }  # fmt: skip
        if e.adopted:
            self._adopt_guests(worker, hello.rows)
            driver.hold(e.worker_id)  # until it is its turn
            # Whom the earlier kernel had not handed over yet is not in it.
            worker.admitted &= hello.guests
            worker.admits_sent = hello.seen
            # What it said before is older than its list of those who wait.
            worker.inputs_sent = dict.fromkeys(worker.admitted, hello.seen)
            k.dmesg.write("adopted", worker.pid, f"worker {e.worker_id}, OS process {e.os_pid}")
        up = (hello.loaded, hello.away, hello.device_bytes)
        k.post(ev.WorkerUp(e.worker_id, e.os_pid, *up))
        if e.adopted:
            # Those whose clients went with the earlier kernel are nobody's any more.
            for pid in sorted(hello.guests - worker.admitted):
                if pid not in k.core.m.procs or not k.core.m.procs[pid].live:
                    worker.admits_sent += 1
                    k.carry_out([ev.Drop(e.worker_id, pid)])
            for pid in hello.waiting:
                if self._is_guest(pid, worker.pid):
                    k.post(ev.GuestIdle(e.worker_id, pid))
            # What was acknowledged and may not have been handed over. It knows what it has read.
            for pid in sorted(worker.admitted):
                for given in k.core.m.early_input.pop(pid, ()):
                    k.post(ev.InputGiven(pid, given.message, given.key))
        k.carry_out([ev.Save(proc.pid)])

    def _adopt_guests(self, worker: Worker, rows: dict[int, Any]) -> None:
        """Attached ones: their clients have a while to come back."""
        k = self._k
        for pid, row in sorted(rows.items()):
            try:
                guest, _ = unpack_row(row)
            except (DamagedRow, HomeUnusable) as exc:
                log(f"worker {worker.worker_id} has a guest that makes no sense: {exc}")
                continue
            if guest.pid == pid and self._may_be_in(guest, k.core.m.procs[worker.pid]):
                k.core.adopt_guest(guest, worker.worker_id)
                k.owners.wait_for(guest.pid)

    def _may_be_in(self, guest: Process, engine: Process) -> bool:
        """A worker runs as its user, who may have it say anything: nothing that it could not
        have been handed comes into the table by it, and nothing of another user's. The pid was
        given away by an earlier kernel, which made a folder for it; and it is no more important
        than its user may have it."""
        k = self._k
        schema = k.manifest.get("programs", {}).get(guest.program, {})
        default = schema.get("default_class", engine.cls.word)
        values = [getattr(guest, f.name) for f in fields(guest)]
        return (
            guest.pid not in k.core.m.procs
            and 0 < guest.pid < k.first_pid
            and (guest.role, guest.live, guest.attached) == (Role.GUEST, True, True)
            and (guest.engine_key, guest.uid) == (engine.engine_key, engine.uid)
            and guest.user == engine.user
            and engine.role is Role.ENGINE
            and not guest.inputs  # those of an attached one are nowhere but in its engine
            and all(math.isfinite(v) for v in values if isinstance(v, float))
            and guest.device_seconds >= 0
            and -20 <= guest.nice <= 19
            and access.may_rank(guest.uid, default, guest.nice, guest.cls, guest.deadline_at)
            and _is_folder_of(k.home.work(guest.pid), guest.uid)
        )

    def _is_guest(self, pid: Any, engine_pid: int) -> bool:
        """Whether a process is a guest of this engine, or was: a worker speaks for no other."""
        proc = self._k.core.m.procs.get(pid) if isinstance(pid, int) else None
        return proc is not None and proc.role is Role.GUEST and proc.engine_pid == engine_pid

    def _guest(self, pid: Any, engine_pid: int) -> int:
        """The pid, checked. Raises ValueError. Who has been forgotten is nobody's: nothing follows
        from what is said about it."""
        if self._is_guest(pid, engine_pid):
            return int(pid)
        given = isinstance(pid, int) and 0 < pid < self._k.next_pid
        if given and pid not in self._k.core.m.procs:
            return int(pid)
        raise ValueError(f"process {pid!r} is no guest of this worker")

    def _own(self, pid: Any, worker_pid: int) -> int:
        return worker_pid if pid == worker_pid else self._guest(pid, worker_pid)

    def _shares(self, said: Iterable[tuple[Any, Any]], worker_pid: int) -> dict[int, float]:
        """Who caused how much of a step; without those that nobody knows (any more)."""
        shares: dict[int, float] = {}
        for pid, value in said:
            share = float(value)
            if share and not LEAST_SHARE <= share <= MOST_SHARE:
                raise ValueError(f"a share of {share!r}")
            if pid in self._k.core.m.procs:
                shares[self._own(pid, worker_pid)] = share
        return shares

    def _ended(self, e: WorkerEnded) -> None:
        k = self._k
        worker = k.core.m.workers[e.worker_id]
        proc = k.core.m.procs[worker.pid]
        if worker.done is None and proc.role is Role.PROCESS and not worker.kill_signal:
            last = result_of(k.home.work(proc.pid))
            if last is not None:
                self._done(e.worker_id, proc.pid, last)
        k.worker_rows.pop(proc.pid, None)
        k.post(ev.WorkerGone(e.worker_id, e.status))
        k.clean_worker(e.worker_id)
        self._nonsense.pop(e.worker_id, None)
        if proc.role is Role.SERVICE:
            how = worker.done[1] if worker.done else worker.failed or worker.kill_why
            how = how or describe_status(e.status)
            how = "was restarted by a person" if how == "restart" else how
            k.calls.ended(proc.name, e.worker_id, how)

    def _done(self, worker_id: str, pid: int, m: dict[str, Any]) -> None:
        status, reason = int(m.get("status", 1)), str(m.get("reason", ""))
        result = m.get("result")
        self._k.post(
            ev.ProcessDone(
                worker_id, pid, status, reason, result if isinstance(result, dict) else {}
            )
        )

    def _said(self, e: WorkerSaid) -> None:
        try:
            self._understand(e.worker_id, e.message)
        except (*_NONSENSE, LlmosError) as exc:
            self._misspoke(e.worker_id, f"{exc!r} in {str(e.message)[:200]}")

    def _misspoke(self, worker_id: str, what: str) -> None:
        """Forgiven a few times: a worker of another version may know words that we do not."""
        log(f"worker {worker_id} said what makes no sense: {what}")
        times = self._nonsense[worker_id] = self._nonsense.get(worker_id, 0) + 1
        if times == MOST_NONSENSE and worker_id in self._k.core.m.workers:
            self._k.post(ev.Misspoke(worker_id, what))

    def _understand(self, worker_id: str, m: dict[str, Any]) -> None:
        k = self._k
        pid = k.core.m.workers[worker_id].pid
        if k.core.m.procs[pid].role is Role.SERVICE:
            self._from_service(k.core.m.procs[pid].name, worker_id, pid, m)
            return
        match m["k"]:
            case "report":
                for marked in [self._own(marked, pid) for marked in m["marks"]]:
                    k.growth.grown(marked)
                total = None if m["total"] is None else int(m["total"])
                metrics = {str(a): float(b) for a, b in m["metrics"].items()}
                shares = self._shares(m["shares"].items(), pid)
                k.post(ev.Reported(worker_id, int(m["step"]), total, metrics, shares))
            case "mark":
                k.growth.grown(self._own(m["pid"], pid))
            case "loaded":
                k.post(ev.Loaded(worker_id))
            case "alive":
                k.post(ev.Alive(worker_id))
            case "idle":
                k.post(ev.WorkerIdle(worker_id, int(m["seen"])))
            case "guest_idle":
                seen = m.get("seen")
                idle = self._guest(m["pid"], pid)
                k.post(ev.GuestIdle(worker_id, idle, None if seen is None else int(seen)))
            case "guest_done":
                self._done(worker_id, self._guest(m["pid"], pid), m)
                if "seq" in m:
                    k.spawn(self._acknowledge(worker_id, int(m["seq"])))
            case "done":
                self._done(worker_id, pid, m)
            case "can_checkpoint":
                k.post(ev.CanCheckpoint(worker_id))
            case "shrunk":
                k.post(ev.Shrunk(worker_id, str(m["level"]), int(m["freed_bytes"])))
            case "moved_out":
                left = int(m.get("device_bytes") or m.get("left_bytes", 0))
                moved = (str(m["where"]), int(m["bytes"]), left, float(m["seconds"]))
                k.post(ev.MovedOut(worker_id, *moved))
            case "moved_in":
                k.post(ev.MovedIn(worker_id, float(m["seconds"])))
            case "move_failed":
                k.post(ev.MoveFailed(worker_id, str(m["error"]["message"])))
            case "checkpointed":
                k.post(ev.Checkpointed(worker_id, str(m["folder"]), int(m["step"])))
            case "call":
                number, method, args, _ = _call_of(m)
                called = k.calls.call(method, args, None, k.core.m.procs[pid].uid)
                k.spawn(self._call(worker_id, number, called))
            case unknown:
                raise ValueError(f"{unknown!r} is no message of a worker")

    async def _acknowledge(self, worker_id: str, seq: int) -> None:
        """When what followed is on the disk: until then its worker keeps it for the next kernel."""
        k = self._k
        while worker_id in k.core.m.workers:
            with contextlib.suppress(LlmosError):
                await k.journal.flushed()
                break
            await asyncio.sleep(ACK_AGAIN_S)
        if worker_id in k.core.m.workers:
            k.driver_of(worker_id).send(worker_id, {"k": "ack", "seq": seq})

    def _from_service(self, name: str, worker_id: str, pid: int, m: dict[str, Any]) -> None:
        """A service may say less than a program: what it cannot mean is not even looked at."""
        k = self._k
        match m["k"]:
            case "loaded":
                k.post(ev.Loaded(worker_id))
                k.calls.look(name)
            case "done":
                self._done(worker_id, pid, m)
            case "answer":
                k.calls.answered(name, worker_id, m)
            case "about":
                k.services.says(name, worker_id, str(m["text"])[:ABOUT_CHARS])
            case "call":
                number, method, args, limit_s = _call_of(m)
                uid = k.calls.works_for(name)  # now: its answer may be right behind
                called = k.calls.call_of_service(name, method, args, limit_s, uid)
                k.calls.nests(name, k.spawn(self._call(worker_id, number, called)))
            case unknown:
                raise ValueError(f"{unknown!r} is no message of a service")

    async def _call(self, worker_id: str, number: int, called: Awaitable[Any]) -> None:
        """A program, or a service, calls a service."""
        k = self._k
        try:
            answer = {"ok": await called}
        except LlmosError as exc:
            answer = {"error": exc.to_wire()}
        if worker_id in k.core.m.workers:
            k.driver_of(worker_id).send(worker_id, {"k": "answer", "id": number, **answer})


def _call_of(m: dict[str, Any]) -> tuple[int, str, dict[str, Any], float | None]:
    """The parts of a call that a worker makes. KeyError, TypeError, ValueError for nonsense."""
    args = {str(name): value for name, value in dict(m["args"]).items()}
    limit_s = m.get("limit_s")
    return int(m["id"]), str(m["method"]), args, None if limit_s is None else float(limit_s)


def result_of(work: Path) -> dict[str, Any] | None:
    """What a program left as its last words, if it came that far."""
    try:
        found = json.loads(read_bytes(work / "result.json", 0, MAX_FRAME_BYTES))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_folder_of(path: Path, uid: int) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid
