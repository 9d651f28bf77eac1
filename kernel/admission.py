"""Admission: a process starts when its promise fits in the books, not before.

Waiting processes are tried by class, then in the policy's order. A smaller one may pass a larger
one that does not fit, but not for ever: after a while nobody of its class passes it, and the
devices that it will get are kept for it. A gang gets all of its devices or none. What makes room
when memory is short is decided in `room`.
"""

from __future__ import annotations

from llmos.kernel import quota, room, standing, turns
from llmos.kernel.errors import NoMemory
from llmos.kernel.events import DiskTold, MoveIn, StartWorker
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Residency, Role, State

GIB = 1024**3

# The soonest that a resident is looked at again: when it has its device, and when it does not.
REVIEW_S, REVIEW_OFF_S = 1.0, 30.0


def devices_for(m: Machine, proc: Process) -> list[str]:
    """Where a process may run, the emptiest first: the device it asked for, or all of the kind
    that is preferred (an accelerator before a CPU)."""
    if proc.device_wanted:
        # A kernel may have been booted without the device that an earlier one had.
        return [proc.device_wanted] if proc.device_wanted in m.devices else []
    return [d for d in m.ledger.most_free() if d in m.pool]


def refuse_what_never_fits(m: Machine, proc: Process) -> None:
    """Raise NoMemory when no device could hold the process even if all others left.

    A copy of the state for checkpoints is left out first: without it the process stands still
    while they are written.
    """
    names = devices_for(m, proc)
    if sum(m.ledger.can_ever_reserve(d, proc.segments) for d in names) >= proc.gang:
        quota.refuse_what_never_fits(m, proc, names)
        return
    spared = [s for s in proc.segments if s["kind"] != "checkpoint"]
    if len(spared) < len(proc.segments):
        proc.segments = spared
        return refuse_what_never_fits(m, proc)
    need = sum(s["bytes"] for s in proc.segments)
    if len(names) < proc.gang:
        raise NoMemory(
            f"{proc.program} wants {proc.gang} devices; there are {len(names)}",
            "ask for fewer (--devices) or boot with more (--device)",
        )
    largest = max(names, key=m.ledger.capacity)
    system = m.ledger.system(largest)
    taken = f", and llmos itself takes {system / GIB:,.2f} of them" if system else ""
    raise NoMemory(
        f"{proc.program} needs {need / GIB:,.2f} GiB; {largest} has "
        f"{m.ledger.capacity(largest) / GIB:,.2f} GiB in all{taken}",
        "make it smaller (batch, context, width, dtype; `llmos plan` finds what fits) or boot "
        "with a larger device",
    )


def place_for(m: Machine, proc: Process, closed: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The devices that can take a process now, as many as it wants; () when there are not."""
    if m.worker_of(proc) is not None:  # moved out, and its worker lives: only back to where it was
        devices = proc.devices
        away = m.ledger.away_bytes(proc.pid)
        return devices if all(m.ledger.free(d) >= away for d in devices) else ()
    closed |= quota.full(m, proc)
    if proc.device_wanted:
        names = [d for d in devices_for(m, proc) if m.ledger.can_reserve(d, proc.segments)]
        return tuple(d for d in names if d not in closed)[:1]
    need = proc.segments_bytes
    skipped = len(closed) + len(m.devices) - len(m.pool)
    found = m.ledger.with_free(need, proc.gang + skipped)
    shared = [s["shared"] for s in proc.segments if s.get("shared")]
    if shared and proc.gang == 1:
        there = m.ledger.holds_shared(shared)
        found[:0] = [d for d in there if m.ledger.can_reserve(d, proc.segments)]
    found = [d for d in found if d in m.pool and d not in closed]
    # In order: the first of a gang's devices is that of its rank 0.
    return tuple(sorted(found[: proc.gang])) if len(found) >= proc.gang else ()


def admit_waiting(m: Machine) -> None:
    """Start whatever fits now."""
    if m.shutting_down or m.disk_trouble or not m.line_dirty:
        return
    m.line_dirty = False
    room.look_anew(m)
    if m.order_stale:
        m.order_stale = False
        m.waiting.rebuild({pid: standing.place(m, m.procs[pid]) for pid in m.waiting})
    _Pass(m).run()
    if not len(m.waiting):
        m.reviewing = False
    elif not m.reviewing:
        m.reviewing = True
        for worker in list(m.workers.values()):
            for device in worker.devices:
                turns.charge(m, device)
            review(m, m.procs[worker.pid])


class _Pass:
    """One pass over the line."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        # By class: the devices that are kept for somebody who has waited too long to be passed;
        # and the classes for which they are all there are.
        self.kept: dict[int, frozenset[str]] = {}
        self.closed: set[int] = set()
        # What those of a class can have of one, two ... devices, until something is given or taken.
        self.reach: dict[int, list[room.Reach]] = {}
        # By class: the most for which the policy was asked about all who would have to go.
        self.asked: dict[int, int] = {}

    def run(self) -> None:
        for pid in self.m.waiting.heads(self.m.now, room.bound(self.m), self.closed):
            proc = self.m.procs[pid]
            if not self._is_hopeless(proc):
                self._try(proc)

    def _is_hopeless(self, proc: Process) -> bool:
        """Can nothing come of trying it: neither memory nor room, nor a device closed to others?"""
        need, cls = self.m.waiting.need(proc.pid), int(proc.cls)
        if need.more or self.m.now >= standing.late_at(self.m, proc):
            return False
        if cls not in self.reach:
            kept = self.kept.get(cls, frozenset())
            names = [d for d in self.m.pool if d not in kept]
            self.reach[cls] = room.reach(self.m, cls, names)
        if need.gang > len(self.reach[cls]):
            return True
        found = self.reach[cls][need.gang - 1]
        if need.nbytes <= found.free:
            return False
        if need.nbytes <= found.covered:
            return True  # what it waits for is on its way out
        if need.nbytes <= found.most:
            return False
        if need.nbytes > self.asked.get(cls, 0):
            self.asked[cls] = need.nbytes
            return False
        return True

    def _try(self, proc: Process) -> None:
        """Start it, or have room made for it, or note that nobody may pass it any more."""
        m, cls = self.m, int(proc.cls)
        if quota.is_over(m, proc):
            proc.reason = "quota"
            return
        kept = self.kept.get(cls, frozenset())
        devices = place_for(m, proc, kept)
        if devices:
            start(m, proc, devices)
            self.reach.clear()
            return
        names = devices_for(m, proc)
        full = quota.full(m, proc)
        if names and len(set(names) - full) < proc.gang:
            proc.reason = "quota"  # others of its user have to end, and nobody else
            return
        names = [d for d in names if d not in full]
        proc.reason = "memory" if names else "device"
        if room.make_room(m, proc, [d for d in names if d not in kept]):
            self.reach.clear()
        if m.now >= standing.late_at(m, proc):
            could = [d for d in names if d not in kept
                     and m.ledger.can_ever_reserve(d, proc.segments)]  # fmt: skip
            self._keep(cls, kept | frozenset(could[: proc.gang]))

    def _keep(self, cls: int, devices: frozenset[str]) -> None:
        self.kept[cls] = devices
        self.reach.clear()
        if devices >= self.m.pool.keys():
            self.closed.add(cls)


def disk_told(m: Machine, e: DiskTold) -> None:
    """Nothing is started on a disk that takes nothing: it could leave no word of itself."""
    m.disk_trouble = e.trouble
    m.line_dirty = True
    for pid in m.waiting:
        m.procs[pid].reason = "disk" if e.trouble else "memory"
    if e.trouble:
        return
    for proc in list(m.procs.values()):
        if proc.state is State.WAITING and not proc.needs_device and not proc.worker_id:
            wait_for_memory(m, proc)


def start(m: Machine, proc: Process, devices: tuple[str, ...]) -> None:
    """Promise the memory and have a worker forked, or bring back what was moved out."""
    m.waiting.pop(proc.pid)
    worker = m.worker_of(proc)
    if worker is not None:
        _bring_back(m, proc, worker)
        return
    if devices:
        m.ledger.reserve(devices, proc.pid, proc.segments)
    worker = Worker(f"w{proc.pid}-{m.next_worker}", proc.pid, devices, admitted_at=m.now)
    m.next_worker += 1
    m.workers[worker.worker_id] = worker
    for device in devices:
        m.on_device[device][worker.worker_id] = None
    proc.worker_id, proc.devices = worker.worker_id, devices
    proc.next_start_at = None
    show_promise(m, proc)
    why = f"memory is promised on {' and '.join(devices)}" if devices else "it needs no device"
    m.move(proc, State.STARTING, why)
    proc.residency = Residency.DEVICE
    m.out.append(StartWorker(worker.worker_id, proc.pid, devices))
    m.record("started", proc.pid)
    m.save(proc)
    review(m, proc)


def _bring_back(m: Machine, proc: Process, worker: Worker) -> None:
    m.ledger.move_in(proc.pid)
    worker.moving, worker.admitted_at = "in", m.now
    show_promise(m, proc)
    m.move(proc, State.STARTING, "its memory comes back to the device")
    m.out.append(MoveIn(worker.worker_id))
    m.record("moves-in", proc.pid)
    review(m, proc)


def review(m: Machine, proc: Process) -> None:
    """Look again when the policy may want it moved out for somebody who waits."""
    worker = m.worker_of(proc) if m.reviewing else None
    if worker is None or not worker.devices or worker.review_at > m.now + 1e-6:
        return
    if proc.role is not Role.PROCESS:
        return
    in_s = m.policy.review_s(m.job_of(proc))
    if in_s is not None:
        # Seconds of a device pass only while it has one.
        soonest = m.now + max(in_s, REVIEW_S if m.leases(worker) else REVIEW_OFF_S)
        stays_until = worker.admitted_at + m.settings.min_residency_s
        worker.review_at = min(soonest, stays_until) if stays_until > m.now + 1e-6 else soonest
        m.wake_at(worker.review_at, pid=proc.pid)


def show_promise(m: Machine, proc: Process) -> None:
    """Copy what the books say about a process into the table."""
    promised, measured, peak, kinds = m.ledger.memory_of(proc.pid)
    proc.memory.promised_bytes, proc.memory.measured_bytes = promised, measured
    proc.memory.peak_bytes, proc.memory.by_kind = max(peak, proc.memory.peak_bytes), kinds


def wait_for_memory(m: Machine, proc: Process) -> None:
    """Put a process in the line for memory; who needs no device needs none on it either."""
    proc.reason = "disk" if m.disk_trouble else "memory"
    if not proc.needs_device:
        if not m.shutting_down and (proc.role is Role.SERVICE or not m.disk_trouble):
            start(m, proc, ())
        return
    proc.waiting_since = m.now
    if not proc.in_line_before:
        proc.in_line_before = True
        standing.moved(m, m.policy.arrived(m.job_of(proc)))
    standing.stand(m, proc)
    standing.look_when_late(m, proc)
