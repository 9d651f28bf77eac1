"""What goes into the core and what comes out: events and orders, plain and frozen.

Events are facts (a person asked, a worker reported, time passed). Orders are wishes of the core
that the supervisor carries out. Both name workers by worker_id and processes by pid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmos.kernel.process import Process

# ---- events ----


@dataclass(frozen=True, slots=True)
class Submitted:
    """A process enters the table. A guest names its engine by `engine_key`; when no engine of
    that key lives, `engine` is the process to make."""

    process: Process
    engine: Process | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    pid: int
    segments: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PlanFailed:
    pid: int
    why: str


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker answered the handshake. `adopted`: it was there before this kernel."""

    worker_id: str
    os_pid: int
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker has brought its program to the device; the first step comes next."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Reported:
    worker_id: str
    step: int
    total: int | None
    metrics: dict[str, float]
    shares: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerIdle:
    """Nothing to do in a worker that had processed `seen` messages about guests."""

    worker_id: str
    seen: int


@dataclass(frozen=True, slots=True)
class GuestIdle:
    """A guest waits for input, in a worker that had processed `seen` messages about guests."""

    worker_id: str
    pid: int
    seen: int | None = None


@dataclass(frozen=True, slots=True)
class ProcessDone:
    """A program or a guest ended by itself. For a program the worker's exit follows."""

    worker_id: str
    pid: int
    status: int
    reason: str
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpointed:
    worker_id: str
    folder: str
    step: int


@dataclass(frozen=True, slots=True)
class WorkerHeld:
    """The worker is off the device, its memory stays."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """The OS process has ended; `status` is 128 + n for a signal, None when nobody knows."""

    worker_id: str
    status: int | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One pass over a device: by pid the private bytes; what is available and foreign."""

    device: str
    by_pid: dict[int, int]
    available_bytes: int
    foreign_bytes: int


@dataclass(frozen=True, slots=True)
class KillAsked:
    pid: int
    signal: int


@dataclass(frozen=True, slots=True)
class PauseAsked:
    pid: int


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    pid: int


@dataclass(frozen=True, slots=True)
class ReniceAsked:
    pid: int
    nice: int


@dataclass(frozen=True, slots=True)
class RestartAsked:
    """A person restarts a service."""

    pid: int


@dataclass(frozen=True, slots=True)
class CheckpointAsked:
    pid: int


@dataclass(frozen=True, slots=True)
class InputGiven:
    pid: int
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShutdownAsked:
    pass


@dataclass(frozen=True, slots=True)
class Clock:
    """Time passed: slices may be over, a restart may be due."""


Event = (
    Submitted | Planned | PlanFailed | WorkerUp | Loaded | Reported | WorkerIdle | GuestIdle
    | ProcessDone | Checkpointed | WorkerHeld | WorkerGone | Measured | KillAsked | PauseAsked
    | ResumeAsked | ReniceAsked | RestartAsked | CheckpointAsked | InputGiven | ShutdownAsked
    | Clock
)  # fmt: skip

# ---- orders ----


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker_id: str
    pid: int
    device: str


@dataclass(frozen=True, slots=True)
class Load:
    """Have a worker load its program, from its process's checkpoint when there is one."""

    worker_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class Grant:
    worker_id: str
    device: str
    floor: int = 2


@dataclass(frozen=True, slots=True)
class Hold:
    worker_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Bring a worker to a safepoint, with a checkpoint, and end it."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Signal:
    worker_id: str
    signal: int


@dataclass(frozen=True, slots=True)
class AskCheckpoint:
    worker_id: str


@dataclass(frozen=True, slots=True)
class Admit:
    worker_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class Drop:
    worker_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class Rank:
    """Tell an engine a guest's new rank, and whether it is parked."""

    worker_id: str
    pid: int
    parked: bool


@dataclass(frozen=True, slots=True)
class Forward:
    worker_id: str
    pid: int
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Save:
    """The process's row belongs on disk."""

    pid: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The process never was: nothing of it stays."""

    pid: int


@dataclass(frozen=True, slots=True)
class Changed:
    """The process's state changed: who waits for it should look."""

    pid: int


@dataclass(frozen=True, slots=True)
class WakeAt:
    at: float


@dataclass(frozen=True, slots=True)
class Record:
    """A line in the kernel's own record of decisions."""

    what: str
    pid: int
    why: str = ""
    by: int = 0


Order = (
    StartWorker | Load | Grant | Hold | Stop | Signal | AskCheckpoint | Admit | Drop | Rank
    | Forward | Save | Forget | Changed | WakeAt | Record
)  # fmt: skip
