"""The life of a process: submitted, planned, and what its worker says as it comes up and works."""

from __future__ import annotations

from llmos.kernel import admission, moving, outgrown, turns, watch
from llmos.kernel.endings import end
from llmos.kernel.errors import NoMemory
from llmos.kernel.events import (
    Alive,
    CanCheckpoint,
    Changed,
    Checkpointed,
    Forget,
    Grant,
    Hold,
    Load,
    Loaded,
    Misspoke,
    PlanFailed,
    Planned,
    ProcessDone,
    Reported,
    Signal,
    Submitted,
    WorkerHeld,
    WorkerIdle,
    WorkerUp,
)
from llmos.kernel.guests import has_read, join_engine, keep_longer, rest_engine, want
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Role, State

# Who has said that it is done is gone within this, or waits for something.
LINGERS_S = 2.0


# ---- submit and plan ----


def submitted(m: Machine, e: Submitted) -> None:
    engine = e.engine
    if engine is not None and engine.engine_key not in m.engines:
        m.enter(engine)
        m.move(engine, State.PLANNING, f"made for process {e.process.pid}")
    m.enter(e.process)
    if e.process.role is Role.GUEST:
        m.move(e.process, State.WAITING, "submitted", "engine")
        join_engine(m, e.process)
        keep_longer(m, e.process)
        host = m.engine_of(e.process)
        want(m, host)
        if host is not None and host.state is not State.PLANNING:
            m.save(e.process)  # else it is saved, or forgotten, with its engine
    else:
        m.move(e.process, State.PLANNING, "submitted")


def planned(m: Machine, e: Planned) -> None:
    """The footprint is known. Raises NoMemory, and forgets the process, when it never fits."""
    proc = m.find(e.pid)
    proc.segments = e.segments
    if proc.needs_device:
        try:
            admission.refuse_what_never_fits(m, proc)
        except NoMemory:
            plan_failed(m, PlanFailed(e.pid, "does not fit"))
            raise
    m.move(proc, State.WAITING, "planned", "memory")
    m.save(proc)
    for guest in m.guests_of(proc.pid) if proc.role is Role.ENGINE else ():
        m.save(guest)
    admission.wait_for_memory(m, proc)


def plan_failed(m: Machine, e: PlanFailed) -> None:
    """A process that cannot be planned never was, nor were the guests that wait for it."""
    proc = m.procs[e.pid]
    gone = [proc, *(m.guests_of(e.pid) if proc.role is Role.ENGINE else ())]
    for p in gone:
        m.leave_engine(p)
        del m.procs[p.pid]
        m.waiting.pop(p.pid)
        m.early_input.pop(p.pid, None)
        m.out.append(Forget(p.pid))


# ---- workers come, work and go ----


def worker_up(m: Machine, e: WorkerUp) -> None:
    worker = m.workers[e.worker_id]
    worker.os_pid, worker.up = e.os_pid, True
    worker.loaded = worker.load_sent = e.loaded
    proc = m.procs[worker.pid]
    if len(worker.devices) > 1:
        m.gangs[worker.worker_id] = None
    for device in worker.devices:
        outgrown.set_walls(m, device)
    if worker.kill_signal:
        # It was asked for before there was an OS process to take it.
        m.out.append(Signal(worker.worker_id, worker.kill_signal))
        return
    if e.away:
        moving.was_away(m, proc, worker, e.left_bytes)
        return
    if proc.state is State.PAUSED:
        return
    if proc.role is Role.SERVICE:
        return  # the supervisor has it load at once: it wants no device
    if not proc.needs_device:
        _begin(m, proc, worker)
        return
    if proc.state is State.STARTING:
        m.move(proc, State.READY, "its worker is up")
    if proc.role is Role.ENGINE:
        for guest in m.guests_of(proc.pid):
            join_engine(m, guest)
        if not turns.runnable_guests(m, proc.pid) and not turns.to_be_loaded(proc, worker):
            rest_engine(m, worker)  # those that it was made for have been killed or paused
    turns.update(m, worker)


def _begin(m: Machine, proc: Process, worker: Worker) -> None:
    """A worker that needs no device waits for no turn."""
    if proc.state is State.STARTING:
        m.move(proc, State.RUNNING, "its worker is up; it needs no device")
    if not worker.load_sent:
        worker.load_sent = True
        m.out.append(Load(worker.worker_id, worker.pid))


def alive(m: Machine, e: Alive) -> None:
    watch.alive(m, m.workers[e.worker_id])


def misspoke(m: Machine, e: Misspoke) -> None:
    worker = m.workers[e.worker_id]
    if not worker.ending:
        watch.fail(m, worker, f"said what makes no sense: {e.what}")


def loaded(m: Machine, e: Loaded) -> None:
    worker = m.workers[e.worker_id]
    worker.loaded = True
    watch.alive(m, worker)
    proc = m.procs[worker.pid]
    turns.begin_steps(m, worker)
    if proc.started_at is None:
        proc.started_at = m.now
    if proc.role is Role.SERVICE:
        m.move(proc, State.RUNNING, "serves")
    if proc.role is Role.ENGINE:
        # Loading is charged to those who caused it.
        turns.split(m, worker, {g.pid: 1.0 for g in turns.runnable_guests(m, proc.pid)})
    proc.tell(m.now, "loaded", "the program is on its device")
    m.record("loaded", proc.pid)


def reported(m: Machine, e: Reported) -> None:
    worker = m.workers[e.worker_id]
    worker.reports += 1
    proc = m.procs[worker.pid]
    if proc.role is Role.ENGINE:
        turns.split(m, worker, e.shares)
        for pid, share in e.shares.items():
            guest = m.procs.get(pid)
            if guest is not None and guest.live:
                step = int(guest.progress.get("step", 0) + share)
                guest.progress = {"step": step, "total": None, "metrics": {}, "at": m.now}
                guest.started_at = guest.started_at or m.now
            elif guest is not None:
                m.save(guest)  # it ended with this step, which was charged to it just now
    proc.progress = {"step": e.step, "total": e.total, "metrics": e.metrics, "at": m.now}
    turns.stepped(m, worker, e.step, e.total)
    worker.heard_s = worker.leased_s


def can_checkpoint(m: Machine, e: CanCheckpoint) -> None:
    proc = m.procs[m.workers[e.worker_id].pid]
    if not proc.has_checkpoint:
        proc.has_checkpoint = True
        proc.tell(m.now, "checkpoints", "the program says that it can write them")
        m.save(proc)


def checkpointed(m: Machine, e: Checkpointed) -> None:
    worker = m.workers[e.worker_id]
    proc = m.procs[worker.pid]
    worker.saved_for_stop = worker.stop_sent
    proc.checkpoint = {"folder": e.folder, "step": e.step, "at": m.now}
    proc.tell(m.now, "checkpoint", f"step {e.step}")
    m.record("checkpoint", proc.pid, f"step {e.step}")
    m.save(proc)
    m.out.append(Changed(proc.pid))


def process_done(m: Machine, e: ProcessDone) -> None:
    worker = m.workers[e.worker_id]
    proc = m.procs.get(e.pid)
    if proc is None or not proc.live:
        return
    proc.result = e.result
    if proc.role is Role.GUEST:
        worker.admitted.discard(proc.pid)
        end(m, proc, e.status, e.reason or "done")
        turns.update(m, worker)
        return
    # The memory is free only when the worker is gone: until then the process lives. It may have
    # been stopped in the moment after it said so, and must run to exit.
    worker.done = (e.status, e.reason or "done")
    m.out.append(Grant(worker.worker_id))
    turns.update(m, worker)
    m.wake_at(m.now + LINGERS_S, pid=proc.pid)


def lingers(m: Machine, proc: Process, worker: Worker) -> None:
    """It has ended and is still there: its last words wait for room on the disk. They need no
    device."""
    if not m.leases(worker):
        return
    turns.off(m, worker)
    if proc.state is State.RUNNING:
        m.move(proc, State.STOPPING, "it has ended; its last words wait for the disk", "disk")


def worker_held(m: Machine, e: WorkerHeld) -> None:
    worker = m.workers[e.worker_id]
    if not worker.devices:
        return
    turns.held(m, worker)
    proc = m.procs[worker.pid]
    if proc.role is Role.ENGINE and not turns.runnable_guests(m, proc.pid):
        rest_engine(m, worker)


def worker_idle(m: Machine, e: WorkerIdle) -> None:
    worker = m.workers[e.worker_id]
    has_read(worker, e.seen)
    if e.seen < worker.admits_sent or not worker.devices:
        return  # it had not read the newest messages when it said so
    turns.split(m, worker, {})
    turns.off(m, worker)
    # Held, or it would begin with the next message it reads, while another has the device.
    m.out.append(Hold(worker.worker_id))
    proc = m.procs[worker.pid]
    if proc.state is State.RUNNING:
        m.move(proc, State.READY, "no guest to serve", "idle")
    for guest in m.guests_of(proc.pid):
        if guest.state is State.RUNNING:
            m.move(guest, State.READY, "the engine's turn is over", "device")
    if not turns.runnable_guests(m, proc.pid):
        rest_engine(m, worker)
    turns.update(m, worker)
