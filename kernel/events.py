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
    """A worker answered the handshake.

    `away`: an earlier kernel had its memory moved out, but for `left_bytes`.
    """

    worker_id: str
    os_pid: int
    loaded: bool = False
    away: bool = False
    left_bytes: int = 0


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
class Alive:
    """A worker's main thread has moved, though it has nothing to report."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Misspoke:
    """A worker said what makes no sense, too often to be trusted any more."""

    worker_id: str
    what: str


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
class MoveFailed:
    """There was no room where a worker's memory was to go: it is where it was."""

    worker_id: str
    why: str


@dataclass(frozen=True, slots=True)
class CanCheckpoint:
    """A program of which it was not known has said that it can write checkpoints."""

    worker_id: str


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
class Shrunk:
    """A worker was told to become smaller and did what it could; `freed_bytes` may be 0."""

    worker_id: str
    level: str
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class MovedOut:
    """A worker's memory is off the device, on the host or on disk; `left_bytes` stay on it."""

    worker_id: str
    where: str
    freed_bytes: int
    left_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MovedIn:
    worker_id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class KillAsked:
    pid: int
    signal: int


@dataclass(frozen=True, slots=True)
class PauseAsked:
    """`release`: its memory is given back too; it goes on from a checkpoint."""

    pid: int
    release: bool = False


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    pid: int


@dataclass(frozen=True, slots=True)
class ReniceAsked:
    """What is None stays. A `deadline_at` of 0 takes the deadline away."""

    pid: int
    nice: int | None = None
    cls: str | None = None
    deadline_at: float | None = None


@dataclass(frozen=True, slots=True)
class RestartAsked:
    """A person restarts a service."""

    pid: int


@dataclass(frozen=True, slots=True)
class StopAsked:
    """A person stops a service: it ends and is not started again."""

    pid: int


@dataclass(frozen=True, slots=True)
class CheckpointAsked:
    pid: int


@dataclass(frozen=True, slots=True)
class InputGiven:
    pid: int
    message: dict[str, Any]
    key: str = ""  # of the client's choice


@dataclass(frozen=True, slots=True)
class KeepAsked:
    """A person says how long an engine keeps its model when nobody uses it; below 0: for ever."""

    pid: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The files of a worker could not be made: there never was one."""

    worker_id: str
    why: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Of this process nothing can come, whatever is tried: it ends, and it alone."""

    pid: int
    why: str


@dataclass(frozen=True, slots=True)
class DiskTold:
    """What is wrong with the disk of the home; empty: it is well."""

    trouble: str


@dataclass(frozen=True, slots=True)
class Expired:
    """Processes that ended long ago are forgotten."""

    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShutdownAsked:
    pass


@dataclass(frozen=True, slots=True)
class Clock:
    """Time passed: slices may be over, a restart may be due."""


Event = (
    Submitted | Planned | PlanFailed | WorkerUp | Loaded | Reported | Alive | Misspoke
    | WorkerIdle | GuestIdle | ProcessDone | Checkpointed | WorkerHeld | WorkerGone | Measured
    | Shrunk | MovedOut | MovedIn | MoveFailed | CanCheckpoint | KillAsked | PauseAsked
    | ResumeAsked | ReniceAsked | RestartAsked | StopAsked | CheckpointAsked | InputGiven
    | KeepAsked | ShutdownAsked | StartFailed | GivenUp | DiskTold | Expired | Clock
)  # fmt: skip

# ---- orders ----


@dataclass(frozen=True, slots=True)
class StartWorker:
    """One worker, on one device or on all of a gang's."""

    worker_id: str
    pid: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Have a worker load its program, from its process's checkpoint when there is one."""

    worker_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class Grant:
    """The worker has its devices: guests less urgent than `floor` stay out."""

    worker_id: str
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
class Limit:
    """The wall: a worker that wants more than so many bytes of a device gets an error."""

    worker_id: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shrink:
    """Have a worker become smaller: drop its caches, or halve its micro-batch -> Shrunk."""

    worker_id: str
    level: str


@dataclass(frozen=True, slots=True)
class MoveOut:
    """Bring a worker's memory off its device, with its worker alive -> MovedOut."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class MoveIn:
    worker_id: str


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
    key: str = ""


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
class Learned:
    """A run has shown what it takes of one device, in private bytes at its peak."""

    pid: int
    peak_bytes: int


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


# Orders after which what a worker does follows from what the order follows from.
SETTING_OFF = (
    StartWorker | Load | Grant | Hold | Stop | Signal | Shrink | MoveOut | MoveIn | AskCheckpoint
    | Admit | Drop | Forward
)  # fmt: skip

Order = (
    StartWorker | Load | Grant | Hold | Stop | Signal | Limit | Shrink | MoveOut | MoveIn
    | AskCheckpoint | Admit | Drop | Rank
    | Forward | Save | Forget | Changed | Learned | WakeAt | Record
)  # fmt: skip
