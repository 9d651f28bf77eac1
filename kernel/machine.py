"""The state of the core: the tables of processes, workers and devices, and the orders so far.

The parts of the core (`lifecycle`, `endings`, `admission`, `turns` and others) are functions over
this.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

from llmos.kernel.errors import NoSuchProcess
from llmos.kernel.events import Changed, Order, Record, Save, WakeAt
from llmos.kernel.ledger import Ledger
from llmos.kernel.line import Line
from llmos.kernel.packing import Packing
from llmos.kernel.policies.base import Job, Policy
from llmos.kernel.process import Process, Role, State, weight_of
from llmos.kernel.sched import DeviceQueue
from llmos.kernel.settings import Settings
from llmos.kernel.usage import Usage


@dataclass(frozen=True, slots=True)
class Input:
    """What somebody gave a guest. By its key an engine knows what it has read already."""

    key: str
    message: dict[str, Any]


@dataclass(slots=True)
class Worker:
    """An OS process in which one process, or one engine with its guests, lives."""

    worker_id: str
    pid: int  # of the process that owns it
    devices: tuple[str, ...]  # none for a service; several for a gang
    os_pid: int = 0
    up: bool = False  # answered the handshake
    load_sent: bool = False
    loaded: bool = False
    reports: int = 0
    step_s: float = 0.0  # device-seconds of a step, lately; 0: not known yet
    leased_s: float = 0.0  # that it had its (first) device for
    settled_s: float = 0.0  # the same at the last report
    last_step: int | None = None  # None: of an adopted one, until it reports
    turn_over: bool = False  # its last hold was the end of a turn, nothing to tell
    beside: str = ""  # the worker that shares the device with it
    mixed: bool = False  # that has changed since the last report
    admitted_at: float = 0.0
    review_at: float = 0.0  # when its place in memory is looked at again
    limit_bytes: int = 0  # the wall that the driver was told
    shrink_asked: str = ""  # how it was told to become smaller: caches, batch
    kill_signal: int = 0  # its end was asked for, by a person unless `kill_why` says otherwise
    kill_why: str = ""
    failed: str = ""  # it hangs, or talks nonsense: how; it is being ended
    end_at: float = 0.0  # when it is made to end, if it has not by then
    heard_s: float = 0.0  # its `leased_s` at the last sign of life
    stop_leased_s: float = 0.0  # the same when it was told to stop
    watched: bool = False  # somebody will look at it
    stop_asked: bool = False  # to a safepoint and out, to be continued later
    stop_for: int = 0  # the pid that pays for the stop; 0: itself
    stop_sent: bool = False
    stop_since: float = 0.0
    saved_for_stop: bool = False
    away: bool = False  # its memory was moved out (to the host); it lives
    moving: str = ""  # "out" or "in", while that is under way
    done: tuple[int, str] | None = None  # status and reason that the program itself gave
    admits_sent: int = 0
    admitted: set[int] = field(default_factory=set)
    # Which of the messages sent was the last input of a guest: an older "idle" says nothing.
    inputs_sent: dict[int, int] = field(default_factory=dict)
    # Inputs that it may not have read: the number of the message, whose, what.
    unread: list[tuple[int, int, Input]] = field(default_factory=list)
    floor: int = 2
    unsplit_s: float = 0.0  # device-seconds of an engine not yet split among its guests
    idle_since: float | None = None

    @property
    def device(self) -> str:
        """Its first device; empty for a service."""
        return self.devices[0] if self.devices else ""

    @property
    def ending(self) -> bool:
        """It will not work any more."""
        return bool(self.kill_signal or self.failed or self.done)

    @property
    def leaving(self) -> bool:
        """Its memory is on its way out: nobody has to make it go."""
        return bool(self.ending or self.stop_asked or self.moving == "out")


@dataclass
class Machine:
    started_at: float
    policy: Policy
    settings: Settings = field(default_factory=Settings)
    ledger: Ledger = field(default_factory=Ledger)
    packing: Packing = field(default_factory=Packing)
    procs: dict[int, Process] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    devices: dict[str, DeviceQueue] = field(default_factory=dict)
    engines: dict[str, int] = field(default_factory=dict)  # engine_key -> pid, while it lives
    guests: dict[int, dict[int, None]] = field(default_factory=dict)  # engine pid -> guest pids
    waiting: Line = field(default_factory=Line)  # for memory
    on_device: dict[str, dict[str, None]] = field(default_factory=dict)  # device -> worker ids
    moves_to: dict[str, str] = field(default_factory=dict)  # device -> "disk" or "host"
    lanes: dict[str, int] = field(default_factory=dict)  # of CPU devices
    gangs: dict[str, None] = field(default_factory=dict)  # workers with several devices
    pool: dict[str, None] = field(default_factory=dict)  # devices for who names none
    now: float = 0.0
    out: list[Order] = field(default_factory=list)
    shutting_down: bool = False
    disk_trouble: str = ""  # what keeps the home from being written: nothing is started then
    early_input: dict[int, list[Input]] = field(default_factory=dict)  # by guest
    # By guest: the keys of the inputs that wait for its answer, and how many bytes each has.
    input_bytes: dict[int, dict[str, int]] = field(default_factory=dict)
    inputs: int = 0  # how many were given, for their keys
    jobs_seen: dict[int, Job] = field(default_factory=dict)  # by pid, during one pass of the line
    # In that pass, by class: whom the policy lets nobody displace who comes now.
    stays: set[tuple[int, str]] = field(default_factory=set)
    dirty: dict[str, None] = field(default_factory=dict)  # devices to decide about
    line_dirty: bool = False  # memory came free, or somebody came into the line
    reviewing: bool = False  # somebody waits for memory: residents are looked at again and again
    order_stale: bool = False  # the policy was replaced: everybody stands in its old order
    alarms: list[tuple[float, int, str]] = field(default_factory=list)  # at, pid, device
    next_worker: int = 1
    by_user: dict[int, dict[int, None]] = field(default_factory=dict)  # uid -> pids that live
    usage: Usage = field(default_factory=lambda: Usage(86_400.0))
    over_quota: dict[int, float] = field(default_factory=dict)  # uid -> when its window has moved
    quota_changed: dict[int, None] = field(default_factory=dict)  # users to be looked at
    quota_looks: dict[int, float] = field(
        default_factory=dict
    )  # uid -> the next look at what is left
    earlier_s: float = 0.0  # device-seconds charged by earlier kernels

    def find(self, pid: int) -> Process:
        if pid not in self.procs:
            raise NoSuchProcess(f"there is no process {pid}")
        return self.procs[pid]

    def worker_of(self, proc: Process) -> Worker | None:
        return self.workers.get(proc.worker_id) if proc.worker_id else None

    def guests_of(self, engine_pid: int) -> list[Process]:
        return [self.procs[p] for p in self.guests.get(engine_pid, ())]

    def move(self, proc: Process, to: State, why: str, reason: str = "", told: bool = True) -> None:
        """Change a state, and tell who waits for it."""
        if proc.state is to:
            proc.reason = reason
            return
        proc.move(to, why, self.now, reason, told)
        self.out.append(Changed(proc.pid))

    def record(self, what: str, pid: int, why: str = "", by: int = 0) -> None:
        self.out.append(Record(what, pid, why, by))

    def save(self, proc: Process) -> None:
        self.out.append(Save(proc.pid))

    def wake_at(self, at: float, pid: int = 0, device: str = "") -> None:
        """Look at a process or a device again at that moment; with neither at the line."""
        heapq.heappush(self.alarms, (at, pid, device))
        self.out.append(WakeAt(at))

    def touch(self, worker: Worker) -> None:
        """Something that matters for the devices of a worker has changed."""
        for device in worker.devices:
            self.dirty[device] = None

    def leases_any(self, proc: Process) -> bool:
        worker = self.worker_of(proc)
        return worker is not None and self.leases(worker)

    def leases(self, worker: Worker) -> bool:
        """Does it hold its devices (or are they still being taken from it)?"""
        return bool(worker.devices) and worker.worker_id in self.devices[worker.device].leases

    def job_of(self, proc: Process, key: str = "") -> Job:
        """What a policy may know of a process."""
        slice_s = self.settings.slice_of(proc.cls)
        job = Job(key or str(proc.pid), float(weight_of(proc.nice)), proc.user, proc.submitted_at)
        job.entered_at = proc.waiting_since
        job.request_s = slice_s
        job.attained_s = proc.device_seconds
        job.predicted_s = proc.predicted_s
        job.devices = proc.gang
        job.family = f"{proc.user}/{proc.program}/{proc.gang}"
        return job

    def enter(self, proc: Process) -> None:
        self.procs[proc.pid] = proc
        self.by_user.setdefault(proc.uid, {})[proc.pid] = None
        if proc.role is Role.ENGINE:
            self.engines[proc.engine_key] = proc.pid
            self.guests[proc.pid] = {}
        elif proc.role is Role.GUEST and proc.engine_key in self.engines:
            proc.engine_pid = self.engines[proc.engine_key]
            self.guests[proc.engine_pid][proc.pid] = None

    def engine_of(self, guest: Process) -> Process | None:
        """The engine a guest is in, or waits for; None when it has yet to be made."""
        return self.procs.get(guest.engine_pid)

    def retire(self, engine: Process) -> None:
        """An engine is about to end: a guest that comes now gets a new one."""
        if self.engines.get(engine.engine_key) == engine.pid:
            del self.engines[engine.engine_key]

    def return_engine(self, engine: Process) -> Process:
        """It was about to end, and its guests want it still -> the engine that they are in: itself,
        or one of the same key that was made in the meantime."""
        other = self.engines.setdefault(engine.engine_key, engine.pid)
        if other != engine.pid:
            for pid in self.guests.pop(engine.pid, {}):
                self.procs[pid].engine_pid = other
                self.guests[other][pid] = None
            self.guests[engine.pid] = {}
        return self.procs[other]

    def leave_engine(self, proc: Process) -> None:
        """A process has ended: it is in nobody's list any more."""
        mine = self.by_user.get(proc.uid, {})
        mine.pop(proc.pid, None)
        self.input_bytes.pop(proc.pid, None)
        if not mine:
            self.by_user.pop(proc.uid, None)
        if proc.role is Role.ENGINE:
            self.retire(proc)
            self.guests.pop(proc.pid, None)
        elif proc.role is Role.GUEST:
            self.guests.get(proc.engine_pid, {}).pop(proc.pid, None)
