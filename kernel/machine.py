"""The state of the core: the tables of processes, workers and devices, and the orders so far.

The parts of the core (`lifecycle`, `admission`, `turns`, `guests`) are functions over this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmos.kernel.errors import NoSuchProcess
from llmos.kernel.events import Changed, Order, Record, Save, WakeAt
from llmos.kernel.ledger import Ledger
from llmos.kernel.process import Process, Role, State
from llmos.kernel.sched import DeviceQueue


@dataclass(slots=True)
class Worker:
    """An OS process in which one process, or one engine with its guests, lives."""

    worker_id: str
    pid: int  # of the process that owns it
    device: str  # empty for a service
    os_pid: int = 0
    up: bool = False  # answered the handshake
    load_sent: bool = False
    loaded: bool = False
    reports: int = 0
    kill_signal: int = 0  # a person asked for its end
    kill_why: str = ""
    stop_asked: bool = False  # to a safepoint and out, to be continued later
    stop_sent: bool = False
    saved_for_stop: bool = False
    done: tuple[int, str] | None = None  # status and reason that the program itself gave
    admits_sent: int = 0
    admitted: set[int] = field(default_factory=set)
    # Which of the messages sent was the last input of a guest: an older "idle" says nothing.
    inputs_sent: dict[int, int] = field(default_factory=dict)
    floor: int = 2
    unsplit_s: float = 0.0  # device-seconds of an engine not yet split among its guests
    idle_since: float | None = None


@dataclass
class Machine:
    started_at: float
    ledger: Ledger = field(default_factory=Ledger)
    procs: dict[int, Process] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    devices: dict[str, DeviceQueue] = field(default_factory=dict)
    engines: dict[str, int] = field(default_factory=dict)  # engine_key -> pid, while it lives
    guests: dict[int, dict[int, None]] = field(default_factory=dict)  # engine pid -> guest pids
    waiting: dict[int, None] = field(default_factory=dict)  # pids that wait for memory
    now: float = 0.0
    out: list[Order] = field(default_factory=list)
    shutting_down: bool = False
    early_input: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by guest
    next_worker: int = 1
    earlier_s: float = 0.0  # device-seconds charged by earlier kernels

    def find(self, pid: int) -> Process:
        if pid not in self.procs:
            raise NoSuchProcess(f"there is no process {pid}")
        return self.procs[pid]

    def worker_of(self, proc: Process) -> Worker | None:
        return self.workers.get(proc.worker_id) if proc.worker_id else None

    def guests_of(self, engine_pid: int) -> list[Process]:
        return [self.procs[p] for p in self.guests.get(engine_pid, ())]

    def move(self, proc: Process, to: State, why: str, reason: str = "") -> None:
        """Change a state, and tell who waits for it."""
        if proc.state is to:
            proc.reason = reason
            return
        proc.move(to, why, self.now, reason)
        self.out.append(Changed(proc.pid))

    def record(self, what: str, pid: int, why: str = "", by: int = 0) -> None:
        self.out.append(Record(what, pid, why, by))

    def save(self, proc: Process) -> None:
        self.out.append(Save(proc.pid))

    def wake_at(self, at: float) -> None:
        self.out.append(WakeAt(at))

    def enter(self, proc: Process) -> None:
        self.procs[proc.pid] = proc
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

    def leave_engine(self, proc: Process) -> None:
        """A guest or an engine has ended: it is in nobody's list any more."""
        if proc.role is Role.ENGINE:
            self.retire(proc)
            self.guests.pop(proc.pid, None)
        elif proc.role is Role.GUEST:
            self.guests.get(proc.engine_pid, {}).pop(proc.pid, None)
