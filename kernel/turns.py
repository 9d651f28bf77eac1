"""Device time: which workers want a device, what they are charged, and what a turn changes.

An engine ranks as its most urgent runnable guest, and its lease carries a floor: guests of a
less urgent class are left out, so that a batch guest never rides past a waiting training.
"""

from __future__ import annotations

from typing import Any

from llmos.kernel.events import Admit, Changed, Forward, Grant, Hold, Load, Stop
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import RUNNABLE, Class, Process, Role, State


def runnable_guests(m: Machine, engine_pid: int) -> list[Process]:
    return [g for g in m.guests_of(engine_pid) if g.state in RUNNABLE]


def _rank(m: Machine, worker: Worker) -> tuple[Class, int] | None:
    """The class and nice a worker wants the device with; None when it does not want it."""
    proc = m.procs[worker.pid]
    if not worker.device or not worker.up or worker.done or worker.kill_signal:
        return None
    if worker.stop_asked:
        return Class.INTERACTIVE, proc.nice  # whoever asked for the stop waits for it
    if proc.role is Role.ENGINE:
        best = min(runnable_guests(m, proc.pid), key=Process.rank, default=None)
        return (best.cls, best.nice) if best else None
    return (proc.cls, proc.nice) if proc.state in RUNNABLE else None


def update(m: Machine, worker: Worker) -> None:
    """Bring a worker's place in its device's queue up to date with its process."""
    if not worker.device:
        return
    queue = m.devices[worker.device]
    charge(m, worker.device)
    rank = _rank(m, worker)
    if rank is None:
        engine = m.procs[worker.pid].role is Role.ENGINE
        dying = worker.done is not None or worker.kill_signal
        queue.dequeue(worker.worker_id, "leaving" if dying else "yielding" if engine else "")
        return
    worker.idle_since = None
    if worker.worker_id in queue:
        queue.rerank(worker.worker_id, *rank)
    else:
        queue.enqueue(worker.worker_id, *rank)
    leased = queue.lease is not None and queue.lease.worker_id == worker.worker_id
    if leased and not queue.lease.holding:  # type: ignore[union-attr]
        if worker.floor != int(rank[0]):
            _grant(m, worker)
        _admit_guests(m, worker)


def charge(m: Machine, device: str) -> None:
    """Account the device's time up to now."""
    paid = m.devices[device].charge(m.now)
    if paid is None:
        return
    worker = m.workers[paid.worker_id]
    proc = m.procs[worker.pid]
    if proc.role is Role.ENGINE:
        worker.unsplit_s += paid.seconds
    else:
        proc.device_seconds += paid.seconds


def split(m: Machine, worker: Worker, shares: dict[int, float]) -> None:
    """Share an engine's device-seconds among the guests that caused them."""
    if worker.device:
        charge(m, worker.device)
    mine = {pid: s for pid, s in shares.items() if s > 0 and pid in m.procs}
    total = sum(mine.values())
    for pid, share in mine.items():
        m.procs[pid].device_seconds += worker.unsplit_s * share / total
    if not mine:
        m.procs[worker.pid].device_seconds += worker.unsplit_s
    worker.unsplit_s = 0.0


def decide(m: Machine, device: str) -> None:
    """Give or take the device, as its queue says now."""
    queue = m.devices[device]
    charge(m, device)
    decision = queue.decide(m.now)
    if decision is not None:
        worker = m.workers[decision.worker_id]
        if decision.what == "grant":
            _grant(m, worker)
        else:
            m.out.append(Hold(worker.worker_id))
            queue.lease.taken_by = m.workers[decision.by].pid if decision.by else 0  # type: ignore[union-attr]
            if decision.why == "preempted":
                _note_preemption(m, worker, m.workers[decision.by])
    wake = queue.wake_at()
    if wake is not None:
        m.wake_at(wake)


def _grant(m: Machine, worker: Worker) -> None:
    """The worker has the device: load first, then whatever its turn is for."""
    proc = m.procs[worker.pid]
    queue = m.devices[worker.device]
    assert queue.lease is not None
    worker.floor = int(queue.lease.cls)
    m.out.append(Grant(worker.worker_id, worker.device, worker.floor))
    if not worker.load_sent:
        worker.load_sent = True
        m.out.append(Load(worker.worker_id, worker.pid))
    if worker.stop_asked and not worker.stop_sent:
        worker.stop_sent = True
        m.out.append(Stop(worker.worker_id))
    if proc.state in (State.READY, State.PREEMPTED):
        m.move(proc, State.RUNNING, f"has {worker.device}")
    if proc.role is Role.ENGINE:
        _admit_guests(m, worker)
        for guest in runnable_guests(m, proc.pid):
            if int(guest.cls) <= worker.floor:
                m.move(guest, State.RUNNING, f"the engine has {worker.device}")
            elif guest.state is State.RUNNING:
                m.move(guest, State.READY, "a more urgent guest is served")
    m.record("granted", worker.pid)


def _admit_guests(m: Machine, worker: Worker) -> None:
    """Hand the guests that came in the meantime to an engine that has the device."""
    proc = m.procs[worker.pid]
    if proc.role is not Role.ENGINE:
        return
    for guest in runnable_guests(m, proc.pid):
        if guest.pid not in worker.admitted:
            worker.admitted.add(guest.pid)
            worker.admits_sent += 1
            m.out.append(Admit(worker.worker_id, guest.pid))
            for message in m.early_input.pop(guest.pid, ()):
                forward(m, worker, guest.pid, message)
        if guest.state is State.READY and int(guest.cls) <= worker.floor:
            m.move(guest, State.RUNNING, f"the engine has {worker.device}")


def forward(m: Machine, worker: Worker, pid: int, message: dict[str, Any]) -> None:
    """Hand input to the engine that a guest is in."""
    worker.admits_sent += 1
    worker.inputs_sent[pid] = worker.admits_sent
    m.out.append(Forward(worker.worker_id, pid, message))


def _note_preemption(m: Machine, worker: Worker, by: Worker) -> None:
    urgent: Process = m.procs[by.pid]
    if urgent.role is Role.ENGINE:
        urgent = min(runnable_guests(m, by.pid), key=Process.rank)
    for proc in _occupants(m, worker):
        proc.preemptions += 1
        m.record("preempted", proc.pid, f"{urgent.cls.word} process {urgent.pid}", urgent.pid)


def _occupants(m: Machine, worker: Worker) -> list[Process]:
    """Whom a turn of this worker serves: its process, or the running guests of an engine."""
    proc = m.procs[worker.pid]
    if proc.role is not Role.ENGINE:
        return [proc]
    return [g for g in m.guests_of(proc.pid) if g.state is State.RUNNING]


def held(m: Machine, worker: Worker) -> None:
    """The driver says: the worker is off the device."""
    queue = m.devices[worker.device]
    charge(m, worker.device)
    lease = queue.lease if queue.lease and queue.lease.worker_id == worker.worker_id else None
    why = lease.holding if lease else ""
    by = f", for process {lease.taken_by}" if lease and lease.taken_by else ""
    queue.released(worker.worker_id)
    proc = m.procs[worker.pid]
    affected = [*_occupants(m, worker), *([proc] if proc.role is Role.ENGINE else [])]
    for p in affected:
        if p.state is State.RUNNING:
            to = State.PREEMPTED if why == "preempted" else State.READY
            m.move(p, to, (why or "held") + by, "device")
    m.out.append(Changed(worker.pid))  # a pause waits for the device, not for a state
    m.record("held", worker.pid, why)


def off(m: Machine, worker: Worker) -> None:
    """The worker uses the device no more by itself: it is idle, or gone."""
    if worker.device:
        charge(m, worker.device)
        m.devices[worker.device].released(worker.worker_id)
