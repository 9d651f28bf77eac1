"""The life of a process: from submit to exit, and what each worker's fate means for it."""

from __future__ import annotations

import signal as signals

from llmos.kernel import admission, turns
from llmos.kernel.errors import NoMemory
from llmos.kernel.events import (
    Changed,
    Checkpointed,
    Forget,
    Grant,
    Hold,
    Loaded,
    PlanFailed,
    Planned,
    ProcessDone,
    Reported,
    Signal,
    Submitted,
    WorkerGone,
    WorkerHeld,
    WorkerIdle,
    WorkerUp,
)
from llmos.kernel.guests import join_engine, rest_engine
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Residency, Role, State

# A failed process is started again after 1, 2, 4 ... seconds, at most:
BACKOFF_MAX_S = 30.0

# A promise is replaced by the measurement after this many steps: the first ones allocate.
SETTLED_STEPS = 2


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
        host = m.engine_of(e.process)
        if host is not None and host.state is not State.PLANNING:
            m.save(e.process)  # else it is saved, or forgotten, with its engine
    else:
        m.move(e.process, State.PLANNING, "submitted")


def planned(m: Machine, e: Planned) -> None:
    """The footprint is known. Raises NoMemory, and forgets the process, when it never fits."""
    proc = m.find(e.pid)
    proc.segments = e.segments
    if proc.role is not Role.SERVICE:
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
        m.waiting.pop(p.pid, None)
        m.early_input.pop(p.pid, None)
        m.out.append(Forget(p.pid))


# ---- workers come, work and go ----


def worker_up(m: Machine, e: WorkerUp) -> None:
    worker = m.workers[e.worker_id]
    worker.os_pid, worker.up = e.os_pid, True
    worker.loaded = worker.load_sent = e.loaded
    proc = m.procs[worker.pid]
    if worker.kill_signal:
        # It was asked for before there was an OS process to take it.
        m.out.append(Signal(worker.worker_id, worker.kill_signal))
        return
    if proc.state is State.PAUSED:
        return
    if proc.role is Role.SERVICE:
        return  # the supervisor has it load at once: it wants no device
    if proc.state is State.STARTING:
        m.move(proc, State.READY, "its worker is up")
    if proc.role is Role.ENGINE:
        for guest in m.guests_of(proc.pid):
            join_engine(m, guest)
        if not turns.runnable_guests(m, proc.pid):
            rest_engine(m, worker)  # those that it was made for have been killed or paused
    turns.update(m, worker)


def loaded(m: Machine, e: Loaded) -> None:
    worker = m.workers[e.worker_id]
    worker.loaded = True
    proc = m.procs[worker.pid]
    if proc.started_at is None:
        proc.started_at = m.now
    if proc.role is Role.SERVICE:
        m.move(proc, State.RUNNING, "serves")
        proc.restarts = 0 if m.now - proc.submitted_at < 1 else proc.restarts
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
    m.out.append(Grant(worker.worker_id, worker.device))
    turns.update(m, worker)


def worker_held(m: Machine, e: WorkerHeld) -> None:
    worker = m.workers[e.worker_id]
    if not worker.device:
        return
    turns.held(m, worker)
    proc = m.procs[worker.pid]
    if proc.role is Role.ENGINE and worker.loaded and not turns.runnable_guests(m, proc.pid):
        rest_engine(m, worker)


def worker_idle(m: Machine, e: WorkerIdle) -> None:
    worker = m.workers[e.worker_id]
    if e.seen < worker.admits_sent or not worker.device:
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


def worker_gone(m: Machine, e: WorkerGone) -> None:
    worker = m.workers.get(e.worker_id)
    if worker is None:
        return
    proc = m.procs[worker.pid]
    if proc.role is Role.ENGINE:
        turns.split(m, worker, {})
    turns.off(m, worker)
    if worker.device:
        m.devices[worker.device].forget(worker.worker_id)
    del m.workers[e.worker_id]
    m.ledger.release(proc.pid)
    proc.worker_id = ""
    proc.residency = Residency.DISK if proc.checkpoint else Residency.NONE
    admission.show_promise(m, proc)
    # It went while there was no kernel, and left no word: the machine went down.
    vanished = e.status is None and not worker.up
    if proc.role is Role.ENGINE:
        _end_guests(m, proc, worker, e.status, vanished)
    if not proc.live:
        return
    if worker.done is not None:
        status, reason = worker.done
        again = proc.restart == "always" or (proc.restart == "on-failure" and status != 0)
        if again and not worker.kill_signal and not m.shutting_down:
            died(m, proc, status, reason)
        else:
            end(m, proc, status, reason)
    elif worker.stop_sent and (e.status == 0 or worker.saved_for_stop):
        to_be_continued(m, proc, "stopped at a safepoint")
    elif vanished and proc.role is Role.ENGINE and not m.guests_of(proc.pid):
        end(m, proc, 0, "its worker went with an earlier kernel")
    elif vanished:
        to_be_continued(m, proc, "its worker is gone since an earlier kernel")
    elif worker.kill_signal:
        _killed(m, proc, worker)
    else:
        died(m, proc, e.status, f"its worker {describe_status(e.status)}")


def _killed(m: Machine, proc: Process, worker: Worker) -> None:
    """A worker ended because somebody had asked for it; `kill_why` is empty for a person."""
    n, why = worker.kill_signal, worker.kill_why
    if not why:
        end(m, proc, 128 + n, f"killed by {signals.Signals(n).name}")
    elif why == "restart":
        admission.wait_for_memory(m, to_waiting(m, proc, "restarted by a person"))
    elif proc.role is Role.PROCESS:
        to_be_continued(m, proc, "ended before it had loaded")
    else:
        end(m, proc, 0, why)


def to_waiting(m: Machine, proc: Process, why: str) -> Process:
    m.move(proc, State.WAITING, why)
    return proc


def to_be_continued(m: Machine, proc: Process, why: str) -> None:
    """Its worker is gone, the process is not: it goes on from its checkpoint later."""
    if proc.state is not State.PAUSED:
        m.move(proc, State.WAITING, why, "memory")
    if not m.shutting_down and proc.state is State.WAITING:
        admission.wait_for_memory(m, proc)
    m.save(proc)


def died(m: Machine, proc: Process, status: int | None, how: str) -> None:
    """The worker ended and nobody had asked for it: the restart policy decides."""
    again = proc.restart == "always" or (proc.restart == "on-failure" and status != 0)
    if not again or m.shutting_down:
        end(m, proc, status if status else 1, how)
        return
    delay = min(BACKOFF_MAX_S, 2.0 ** min(proc.restarts, 10))
    proc.restarts += 1
    proc.next_start_at = m.now + delay
    m.move(proc, State.BACKOFF, f"{how}; again in {delay:.0f} s", "backoff")
    m.wake_at(proc.next_start_at)
    m.save(proc)


def describe_status(status: int | None) -> str:
    if status is None:
        return "ended, nobody knows how"
    if status > 128 and status - 128 in set(signals.Signals):
        return f"was killed by {signals.Signals(status - 128).name}"
    return f"ended with exit status {status}"


def end(m: Machine, proc: Process, status: int, reason: str) -> None:
    """A process exits. Its row stays."""
    proc.exit_status, proc.ended_at = status, m.now
    proc.residency = Residency.NONE if proc.checkpoint is None else Residency.DISK
    m.waiting.pop(proc.pid, None)
    m.early_input.pop(proc.pid, None)
    m.leave_engine(proc)
    m.move(proc, State.EXITED, f"exit status {status}: {reason}", reason)
    m.record("exited", proc.pid, f"status {status}: {reason}")
    m.save(proc)


def _end_guests(
    m: Machine, engine: Process, worker: Worker, status: int | None, vanished: bool
) -> None:
    for guest in m.guests_of(engine.pid):
        if (m.shutting_down or vanished) and not guest.attached:
            guest.awaits_input = False
            if guest.state is not State.PAUSED:
                why = "the kernel shuts down" if m.shutting_down else "its engine starts again"
                m.move(guest, State.WAITING, why, "engine")
            m.save(guest)
        elif m.shutting_down:
            end(m, guest, 128 + 15, "the kernel shut down")
        else:
            how = worker.kill_why or describe_status(status)
            end(m, guest, 1, f"the worker of its engine (process {engine.pid}) {how}")
