"""Making room: who is moved out of memory for a process that does not fit.

First idle engines, then what a person has paused, then lower classes, then those of the same
class that the policy lets it displace; among equals what costs least to bring back. Nothing is
moved that has not been there for ten times the cost of its move, so that moving loses a tenth of
the time at most. On a device that cannot keep memory on its host, moving out is an exact checkpoint
and the end of the worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmos.kernel import turns, watch
from llmos.kernel.events import Stop
from llmos.kernel.line import Bound
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.policies.base import Job
from llmos.kernel.process import Process, Residency, Role, State

# What a move costs before it was ever measured: bytes there and back, and a worker's start.
GUESSED_BYTES_PER_S = 1e9
GUESSED_START_S = 0.5

# One of the same class: last of all, and only if the policy lets it be displaced.
ASK = 4


@dataclass(frozen=True, slots=True)
class Room:
    """A way to let a process in: who goes, from which devices, at what cost in seconds."""

    devices: tuple[str, ...]
    victims: tuple[Worker, ...]
    cost_s: float
    rank: int


class Reach(NamedTuple):
    """Bytes that somebody could have."""

    free: int
    covered: int  # with what is on its way out
    most: int  # with all that could be moved out


def look_anew(m: Machine) -> None:
    """What the policy sees and says holds for one moment."""
    m.jobs_seen.clear()
    m.stays.clear()


def make_room(m: Machine, proc: Process, names: list[str]) -> bool:
    """Have somebody moved out, if that lets `proc` in -> whether that, or what the policy says
    now, has changed what others can have. What is on its way out already counts."""
    before = len(m.stays)
    found = find_room(m, proc, names)
    for worker in found.victims if found is not None else ():
        move_out(m, worker, proc)
    return len(m.stays) > before or bool(found and found.victims)


def find_room(m: Machine, proc: Process, names: list[str]) -> Room | None:
    """The cheapest way to let `proc` in, among these devices; None when there is none."""
    ways = [w for name in names if (w := _on_device(m, proc, name)) is not None]
    if len(ways) < proc.gang:
        return None
    ways = sorted(ways, key=lambda w: (w.rank, w.cost_s))[: proc.gang]
    victims = tuple(dict.fromkeys(v.worker_id for w in ways for v in w.victims))
    return Room(
        tuple(w.devices[0] for w in ways),
        tuple(m.workers[v] for v in victims),
        sum(w.cost_s for w in ways),
        max(w.rank for w in ways),
    )


def bound(m: Machine) -> Bound:
    """The most bytes that could be given on each of so many devices of the pool, now, were all in
    the line of a class. Who needs more is neither started nor makes room."""
    found: dict[int, list[Reach]] = {}

    def most(cls: int, gang: int) -> int:
        if cls not in found:
            found[cls] = reach(m, cls, list(m.pool))
        return found[cls][gang - 1].most if gang <= len(found[cls]) else -1

    return most


def reach(m: Machine, cls: int, names: list[str]) -> list[Reach]:
    """What somebody of a class could have on each of 1, 2, 3 ... of these devices."""
    each = [_could_get(m, cls, d) for d in names]
    columns = (sorted(column, reverse=True) for column in zip(*each, strict=True))
    return [Reach(*row) for row in zip(*columns, strict=True)]


def _could_get(m: Machine, cls: int, device: str) -> Reach:
    free = m.ledger.free(device)
    leaving, may_go = 0, 0
    for worker in (m.workers[w] for w in m.on_device[device]):
        if worker.leaving:
            leaving += m.ledger.would_free(worker.pid, device)
        elif _goes(m, cls, worker) is not None:
            may_go += m.ledger.would_free(worker.pid, device)
    return Reach(free, free + leaving, free + leaving + may_go)


def _on_device(m: Machine, proc: Process, device: str) -> Room | None:
    short = m.ledger.need(device, proc.segments) - m.ledger.free(device)
    here = [m.workers[w] for w in m.on_device[device]]
    short -= sum(m.ledger.would_free(w.pid, device) for w in here if w.leaving)
    if short <= 0:
        return Room((device,), (), 0.0, 0)
    ranked = sorted(
        (rank, cost_of(m, w), w.worker_id)
         for w in here if (rank := _rank(m, proc, w)) is not None
    )  # fmt: skip
    chosen: list[tuple[int, float, str]] = []
    for candidate in ranked:
        if short <= 0:
            break
        short -= m.ledger.would_free(m.workers[candidate[2]].pid, device)
        chosen.append(candidate)
    if short > 0:
        return None
    # What a later, larger one made unnecessary stays.
    for candidate in list(chosen):
        freed = m.ledger.would_free(m.workers[candidate[2]].pid, device)
        if short + freed <= 0:
            short += freed
            chosen.remove(candidate)
    victims = tuple(m.workers[c[2]] for c in chosen)
    return Room((device,), victims, sum(c[1] for c in chosen), max(c[0] for c in chosen))


def _rank(m: Machine, proc: Process, worker: Worker) -> int | None:
    """How soon a worker goes for `proc`, 0 first; None: not at all."""
    rank = _goes(m, int(proc.cls), worker)
    if rank == ASK and not m.policy.displaces(_job(m, proc), _job(m, m.procs[worker.pid])):
        if _speaks_for_those_behind(m, proc):
            m.stays.add((int(proc.cls), worker.worker_id))
        return None
    return rank


def _speaks_for_those_behind(m: Machine, proc: Process) -> bool:
    """Is it where the policy has put it? Then whom it does not displace nobody behind it does."""
    if not m.policy.in_order or proc.pid not in m.waiting:
        return False
    return m.waiting.place(proc.pid) == m.policy.place(_job(m, proc))


def _goes(m: Machine, cls: int, worker: Worker) -> int | None:
    """How soon a worker goes for somebody of a class; ASK: if the policy says so."""
    if worker.leaving or worker.away or worker.moving:
        return None
    owner = m.procs[worker.pid]
    if worker.idle_since is not None and not turns.runnable_guests(m, owner.pid):
        return 1 if m.guests_of(owner.pid) else 0
    if owner.role is not Role.PROCESS or not worker.loaded or not movable(m, owner):
        return None
    stay = m.now - worker.admitted_at
    if owner.moves and stay < m.settings.residency_moves * cost_of(m, worker):
        return None
    if owner.state is State.PAUSED:
        return 1
    if owner.cls > cls:
        return 4 - int(owner.cls)
    if owner.cls < cls or stay < m.settings.min_residency_s - 1e-6:
        return None
    asked = m.policy.displacing and (cls, worker.worker_id) not in m.stays
    return ASK if asked else None


def _job(m: Machine, proc: Process) -> Job:
    """What the policy sees of a process, once for all questions of one moment."""
    job = m.jobs_seen.get(proc.pid)
    if job is None:
        if m.leases_any(proc):
            for device in proc.devices:
                turns.charge(m, device)
        job = m.jobs_seen[proc.pid] = m.job_of(proc)
    return job


def movable(m: Machine, proc: Process) -> bool:
    """Can it be brought off its devices and back to the same result?"""
    return proc.has_checkpoint or all(m.moves_to.get(d) == "host" for d in proc.devices)


def cost_of(m: Machine, worker: Worker) -> float:
    """Seconds that it takes to bring a worker's memory out and back; measured, once it was."""
    owner = m.procs[worker.pid]
    if owner.move_s:
        return owner.move_s
    nbytes = m.ledger.on_one_device(worker.pid)
    back = 1 if owner.role is Role.ENGINE else 2  # there is nothing in an engine to be saved
    return GUESSED_START_S + back * nbytes / GUESSED_BYTES_PER_S


def move_out(m: Machine, worker: Worker, by: Process) -> None:
    """Begin to bring a worker's memory off its devices, for `by`, who pays for it."""
    owner = m.procs[worker.pid]
    if owner.role is Role.ENGINE:
        end_engine(m, worker, f"makes room for process {by.pid}")
        return
    owner.moves += 1
    owner.tell(m.now, "moved-out", f"makes room for process {by.pid}")
    m.record("moved-out", owner.pid, f"makes room for process {by.pid}", by.pid)
    worker.stop_asked, worker.stop_for = True, by.pid
    if all(m.moves_to.get(d) == "host" for d in worker.devices):
        worker.moving = "out"
    if owner.state is not State.PAUSED:
        m.move(owner, State.STOPPING, f"makes room for process {by.pid}", "moved-out")
    turns.update(m, worker)
    if m.leases(worker):
        turns.send_stop(m, worker)


def end_engine(m: Machine, worker: Worker, why: str) -> None:
    """An engine without work leaves: there is nothing in it to be saved."""
    if not worker.kill_signal:
        watch.end(m, worker, 15, why)


def release(m: Machine, worker: Worker) -> None:
    """A person wants the memory of a paused process back: to its checkpoint, and out."""
    worker.stop_asked = True
    if all(m.moves_to.get(d) == "host" for d in worker.devices):
        worker.moving = "out"
    turns.update(m, worker)
    if m.leases(worker):
        turns.send_stop(m, worker)


def stop_away(m: Machine, worker: Worker) -> None:
    """The kernel shuts down: what is on the host writes its checkpoint from there and ends.

    It needs no lease: the others are on their way out too.
    """
    worker.stop_asked = worker.stop_sent = True
    worker.stop_since = m.now
    m.out.append(Stop(worker.worker_id))


def moved_out(m: Machine, worker: Worker, where: str, left_bytes: int) -> int:
    """A worker says that its memory is off the device -> bytes that became free there."""
    proc = m.procs[worker.pid]
    freed = m.ledger.move_out(proc.pid, left_bytes, where)
    worker.moving, worker.away, worker.stop_asked, worker.stop_sent = "", True, False, False
    worker.stop_for = 0
    proc.residency = Residency(where)
    m.line_dirty = True
    return freed
