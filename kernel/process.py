"""A process of llmos: what it is, where it stands, and the one table of allowed moves.

Knows no device, no clock and no socket. `state` says what the process is doing, `residency`
where its memory lies, and `exit_status` with `reason` how it ended: three fields, not one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from llmos.kernel.errors import KernelBug

# What a process keeps of its own history; the oldest lines go first.
STORY_LINES = 200

# Linux's sched_prio_to_weight: each step of nice is about 1.25x. nice -20 ... 19.
NICE_WEIGHTS = (
    88761, 71755, 56483, 46273, 36291, 29154, 23254, 18705, 14949, 11916,
    9548, 7620, 6100, 4904, 3906, 3121, 2501, 1991, 1586, 1277,
    1024, 820, 655, 526, 423, 335, 272, 215, 172, 137,
    110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
)  # fmt: skip


def weight_of(nice: int) -> int:
    """The share of a nice value, as Linux has it: nice 0 is 1024."""
    return NICE_WEIGHTS[nice + 20]


class State(StrEnum):
    NEW = "new"
    PLANNING = "planning"
    WAITING = "waiting"  # not runnable: `reason` says for what (memory, engine, input, ...)
    STARTING = "starting"  # memory is promised, the worker is being forked
    READY = "ready"  # runnable, its turn has not come
    RUNNING = "running"  # holds the device
    PREEMPTED = "preempted"  # the kernel took the device from it for something more urgent
    PAUSED = "paused"  # a person took the device from it
    BACKOFF = "backoff"  # it failed and is restarted later
    STOPPING = "stopping"  # on its way to a safepoint and out of the device
    EXITED = "exited"


_S = State

# The whole life of a process. The tests walk this table and docs/reference/states.md is
# compared with it.
MOVES: dict[State, frozenset[State]] = {
    _S.NEW: frozenset({_S.PLANNING, _S.WAITING, _S.EXITED}),
    _S.PLANNING: frozenset({_S.WAITING, _S.EXITED}),
    _S.WAITING: frozenset({_S.STARTING, _S.READY, _S.PAUSED, _S.STOPPING, _S.BACKOFF,
                           _S.EXITED}),
    _S.STARTING: frozenset({_S.READY, _S.RUNNING, _S.WAITING, _S.PAUSED, _S.BACKOFF,
                            _S.STOPPING, _S.EXITED}),
    _S.READY: frozenset({_S.RUNNING, _S.WAITING, _S.PAUSED, _S.STOPPING, _S.BACKOFF, _S.EXITED}),
    _S.RUNNING: frozenset({_S.READY, _S.PREEMPTED, _S.WAITING, _S.PAUSED, _S.STOPPING,
                           _S.BACKOFF, _S.EXITED}),
    _S.PREEMPTED: frozenset({_S.RUNNING, _S.WAITING, _S.PAUSED, _S.STOPPING, _S.BACKOFF,
                             _S.EXITED}),
    _S.PAUSED: frozenset({_S.STARTING, _S.READY, _S.WAITING, _S.STOPPING, _S.BACKOFF, _S.EXITED}),
    _S.BACKOFF: frozenset({_S.WAITING, _S.PAUSED, _S.EXITED}),
    _S.STOPPING: frozenset({_S.WAITING, _S.READY, _S.PAUSED, _S.BACKOFF, _S.EXITED}),
    _S.EXITED: frozenset(),
}  # fmt: skip

# States in which a process is a candidate for its device.
RUNNABLE = frozenset({State.READY, State.RUNNING, State.PREEMPTED})


class Residency(StrEnum):
    NONE = "none"
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Class(IntEnum):
    """Strict order: a runnable process of a smaller class goes first."""

    INTERACTIVE = 0
    BATCH = 1
    IDLE = 2

    @property
    def word(self) -> str:
        return self.name.lower()


CLASSES = {c.word: c for c in Class}


class Role(StrEnum):
    PROCESS = "process"  # has a worker of its own
    ENGINE = "engine"  # has a worker of its own, and guests
    GUEST = "guest"  # runs in the worker of an engine
    SERVICE = "service"  # has a worker, wants no device


@dataclass(slots=True)
class Memory:
    """Bytes on the process's device: what was promised, what was measured."""

    promised_bytes: int = 0
    measured_bytes: int = 0
    peak_bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Process:
    # Set once, at submit; never changed after, but for how long an engine keeps its model.
    pid: int
    program: str
    args: dict[str, Any]
    user: str
    uid: int
    submitted_at: float
    ppid: int = 0
    name: str = ""
    role: Role = Role.PROCESS
    device_wanted: str = ""
    cwd: str = ""
    env: dict[str, str] = field(default_factory=dict)
    attached: bool = False
    restart: str = "no"  # as kernel/restarts.py reads it
    hang_s: float | None = None  # without a sign of life it hangs after so long; 0: never
    has_checkpoint: bool = False
    engine_key: str = ""  # guests and their engine share it
    preload: bool = False  # of an engine: somebody wants it loaded before it has a guest
    gang: int = 1  # how many devices it wants, all or none; 0: it works without any
    profile_key: str = ""  # what its memory and its speed are remembered by
    declared: bool = False  # its user said what it takes: measured less does not lower it
    may_shrink: bool = False  # its micro-batch may be made smaller when memory is short
    lanes: int = 0  # of a CPU device that it can use; 0: all

    # A person may change these at any time.
    cls: Class = Class.BATCH
    nice: int = 0
    deadline_at: float | None = None

    # Only the core writes these.
    state: State = State.NEW
    residency: Residency = Residency.NONE
    reason: str = ""
    exit_status: int | None = None
    devices: tuple[str, ...] = ()
    worker_id: str = ""
    engine_pid: int = 0  # of a guest
    awaits_input: bool = False  # a guest between two turns
    inputs: list[dict[str, Any]] = field(default_factory=list)  # of a detached one: open
    segments: list[dict[str, Any]] = field(default_factory=list)  # as planned
    started_at: float | None = None
    ended_at: float | None = None
    device_seconds: float = 0.0
    preemptions: int = 0
    restarts: int = 0
    failures: int = 0  # in a row
    next_start_at: float | None = None
    waiting_since: float = 0.0  # for memory
    in_line_before: bool = False
    predicted_s: float | None = None  # device-seconds that it still needs, if that is known
    out_of_memory: int = 0  # how often it was put back with a larger promise
    moves: int = 0  # how often it was moved out of memory
    move_s: float = 0.0  # the most that a move out and back has taken, in seconds
    move_error: str = ""  # why its memory could not be moved, when it was asked for last
    watched_at: float = 0.0  # when its deadline is looked at again
    story: list[tuple[float, str, str]] = field(default_factory=list)

    # Reported by the worker, so possibly stale: never decided on alone.
    memory: Memory = field(default_factory=Memory)
    progress: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def segments_bytes(self) -> int:
        """What it was planned to need on each of its devices."""
        return sum(int(s["bytes"]) for s in self.segments)

    @property
    def device(self) -> str:
        """The first of its devices; empty when it has none."""
        return self.devices[0] if self.devices else ""

    @property
    def needs_device(self) -> bool:
        """A service needs none, nor does a program that only waits for a network or a disk."""
        return self.role is not Role.SERVICE and self.gang > 0

    @property
    def live(self) -> bool:
        return self.state is not State.EXITED

    def move(self, to: State, why: str, now: float, reason: str = "", told: bool = True) -> None:
        """Change the state by the table. `reason` is what `ps` shows while it lasts.

        Not `told`: the story leaves it out. Turns come every half second, for days.
        """
        if to not in MOVES[self.state]:
            raise KernelBug(f"process {self.pid} cannot go from {self.state} to {to} ({why})")
        if told:
            self.tell(now, str(to), why)
        self.state = to
        self.reason = reason

    def tell(self, now: float, what: str, why: str) -> None:
        """Add a line to the story that `explain` shows."""
        self.story.append((now, what, why))
        if len(self.story) > STORY_LINES:
            # The beginning is what explains the rest: keep it, drop from the middle.
            del self.story[STORY_LINES // 4]

    def rank(self) -> tuple[int, int, int]:
        """The order among the guests of an engine: smaller goes first."""
        return (int(self.cls), self.nice, self.pid)

    def to_wire(self) -> dict[str, Any]:
        """What `ps --json` shows."""
        m = self.memory
        return {
            "pid": self.pid,
            "ppid": self.ppid,
            "user": self.user,
            "program": self.program,
            "name": self.name,
            "role": str(self.role),
            "args": self.args,
            "state": str(self.state),
            "residency": str(self.residency),
            "reason": self.reason,
            "class": self.cls.word,
            "nice": self.nice,
            "device": "+".join(self.devices) or None,
            "devices": self.gang,
            "deadline_at": self.deadline_at,
            "device_seconds": round(self.device_seconds, 6),
            "submitted_at": self.submitted_at,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "exit_status": self.exit_status,
            "memory": {
                "promised_bytes": m.promised_bytes,
                "measured_bytes": m.measured_bytes,
                "peak_bytes": m.peak_bytes,
                "by_kind": dict(m.by_kind),
            },
            "worker_id": self.worker_id or None,
            "progress": dict(self.progress),
            "preemptions": self.preemptions,
            "restarts": self.restarts,
            "next_start_at": self.next_start_at,
            "checkpoint": self.checkpoint,
            "result": self.result,
        }
