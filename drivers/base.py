"""The contract of a driver: the code that makes one kind of device look like every other.

A driver finds devices, starts workers on them, grants and holds their time, and measures
their memory. It decides nothing. All of its methods return at once; what takes time comes back
through `tell` as one of the events below, in the order in which it happened for each worker.

Between driver and worker go messages: plain maps with a key `k`, as MessagePack frames where a
socket is between them. To the worker:

    hello     proto, secret, home_id          the handshake; the worker answers `hello`
    load      pid, program, entry, args, work, home, device, threads, restore, role, copy,
              ranks                           [{device, threads}] for each device it spans
    lease     floor, held_s                   it has the device (guests above floor stay out);
                                              for how long it has been held so far, in all
    admit     pid, program, args, rank, sent, parked, work      a guest for an engine
    drop      pid                             a guest was killed
    rank      pid, rank, parked               a guest's rank changed
    input     pid, message                    input for a guest
    checkpoint                                write one at the next step boundary
    stop                                      checkpoint at the next step boundary and exit 0
    ack       seq                             everything up to seq has arrived
    call      id, method, args                (services) serve a call
    answer    id, ok | error                  (programs) the answer to a `call`
    shrink    level                           take less memory at the next step boundary: "caches",
                                              or "batch" (where the user has allowed it)
    limit     promised_bytes, own_bytes       what it was promised, for its last words; and what
                                              its allocator may take, where the device keeps that
    hold      n                               (where no signal holds) answer `held` when the
                                              device is free of this worker; a `lease` ends it
    move_out  where                           at the next step boundary, to "host" or "disk"; from
                                              the host it can go on to the disk
    move_in                                   back to the device; needs no lease

From the worker; those with a `seq` are kept and sent again until they are acknowledged:

    hello     worker_id, os_pid, loaded, step, guests, waiting, seen, away    after the kernel's
                                              hello; `waiting`: the guests that wait for input;
                                              `away`: its memory has been moved out
    loaded    seq
    report    step, total, metrics, shares, marks              one step is done
    mark      pid                             the stream of pid has grown
    can_checkpoint  seq                       a program that learns it while it runs can save now
    checkpointed  seq, folder, step
    shrunk    seq, level, shrank, freed_bytes                  the answer to `shrink`
    guest_idle    seq, pid, seen
    guest_done    seq, pid, status, reason, result
    done      seq, status, reason, result     the program ended; the worker exits
    idle      seen                            nothing to do after `seen` messages about guests
    call      id, method, args, limit_s       call a service
    answer    id, ok | error                  (services) the answer to a call
    held      n, took_s, longest_s            to `hold` n, for the driver: how long it took, and
                                              the longest work between two safepoints
    moved_out seq, bytes, seconds, where, left_bytes, host_bytes, device_bytes
    moved_in  seq, bytes, seconds, where, left_bytes, host_bytes, device_bytes
    move_failed  seq, what, error             `what` (moved_out, moved_in) had no room; nothing
                                              has changed

`device_bytes` in `loaded`, `report` and the moves: what the worker's allocator has taken from the
device, where only the worker knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device as a driver found it. `lanes` are what a device-second is divided by."""

    name: str
    kind: str
    capacity_bytes: int
    lanes: int
    torch_device: str = "cpu"
    why: str = ""  # where capacity and lanes come from, for `status`
    moves_to: str = "disk"  # where a worker's memory can be moved: "disk" (its end) or "host"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a driver needs to start a worker. The worker's socket and log lie in `folder`."""

    worker_id: str
    device: str
    folder: Path
    log: Path
    home: Path
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    service: str = ""  # name and entry point of a service, for a driver that hosts them
    # Whom it becomes before it touches any path: uid, gid, groups, name, home; None: it stays.
    user: Mapping[str, Any] | None = None
    memory_bytes: int = 0  # what a service may have; 0: no limit
    devices: tuple[str, ...] = ()  # all that it spans, one rank each; `device` is the first
    alone_s: float = 20.0  # without a kernel for so long it goes to a safepoint and waits

    def __post_init__(self) -> None:
        if not self.devices and self.device:
            object.__setattr__(self, "devices", (self.device,))


@dataclass(frozen=True, slots=True)
class MemorySample:
    """One pass over a device. Private bytes by worker; `system` is the driver's own processes."""

    total_bytes: int
    available_bytes: int
    foreign_bytes: int
    system_bytes: int
    workers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class WorkerCame:
    """The handshake with a worker is done; `hello` is its answer. `adopted` after `adopt`."""

    worker_id: str
    os_pid: int
    hello: dict[str, Any]
    adopted: bool = False


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    worker_id: str
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WorkerHeld:
    """The worker is off the device."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """The OS process is gone. status: exit status, 128 + n for signal n, None when unknown."""

    worker_id: str
    status: int | None


@dataclass(frozen=True, slots=True)
class PlanMade:
    """The answer to `plan`: segments, or an error as LlmosError.to_wire has it."""

    ticket: int
    segments: list[dict[str, Any]] | None
    error: dict[str, Any] | None = None


DriverEvent = WorkerCame | WorkerSaid | WorkerHeld | WorkerEnded | PlanMade
Tell = Callable[[DriverEvent], None]


class Driver(Protocol):
    """What the kernel asks of a kind of device. One instance serves all devices of its kind."""

    kind: str

    def devices(self) -> Sequence[DeviceInfo]:
        """The devices this driver was configured with. Raises LlmosError for impossible ones."""
        ...

    async def open(self, tell: Tell, home: Path, home_id: str) -> None:
        """Be ready to start workers soon; events go to `tell` from now on."""
        ...

    async def close(self) -> None:
        """Leave no OS process and no socket behind, but workers that were not ended."""
        ...

    def plan(
        self, ticket: int, entry: str, args: dict[str, Any], user: Mapping[str, Any] | None = None
    ) -> None:
        """Have a program predict its memory, as `user` (WorkerSpec) -> PlanMade.

        Without an entry: say only whether that user can open `args["paths"]`.
        """
        ...

    def start(self, spec: WorkerSpec) -> None:
        """-> WorkerCame, or WorkerEnded when it could not be started."""
        ...

    def adopt(self, spec: WorkerSpec, os_pid: int, started: float) -> None:
        """Take over a worker that an earlier kernel started -> WorkerCame or WorkerEnded.

        It may be held, and is left running. `started` is its start time, for identity.
        """
        ...

    def started(self, os_pid: int) -> float:
        """When an OS process began, as the system counts it; with the pid it is its identity."""
        ...

    def send(self, worker_id: str, message: dict[str, Any]) -> None:
        """Give a message to a worker; one that is held reads it when it goes on."""
        ...

    def grant(self, worker_id: str, floor: int) -> None:
        """The worker may use the device. Granting again changes the floor."""
        ...

    def hold(self, worker_id: str) -> None:
        """Take the device, keep the memory -> WorkerHeld."""
        ...

    def signal(self, worker_id: str, signal: int) -> None:
        """Send a signal to the worker and let it run to take it -> WorkerEnded."""
        ...

    def limit(self, worker_id: str, nbytes: int) -> None:
        """Make the promise a wall: who wants more than `nbytes` gets an error from its allocator.

        `nbytes` is the whole footprint (files that it maps too) with its margin; again with
        another number it is raised or lowered. May be called before the worker has come, and
        for one that is held. A driver gives some slack and makes it exact at `measure`. The
        program ends with the error `out-of-memory` in its result.
        """
        ...

    async def measure(self, device: str, system_pids: Sequence[int]) -> MemorySample:
        """What is used now. `system_pids` are llmos's own OS processes beside the driver's."""
        ...

    def statistics(self) -> dict[str, Any]:
        """For `status`: the driver's helper processes and what they do."""
        ...
