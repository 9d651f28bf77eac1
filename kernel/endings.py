"""How processes and their workers end, and what goes on.

Whatever ends a worker comes here: its memory is free, its guests go back, and the restart policy of
its process decides.
"""

from __future__ import annotations

import signal as signals

from llmos.kernel import admission, outgrown, restarts, standing, turns
from llmos.kernel.events import Changed, Learned, StartFailed, WorkerGone
from llmos.kernel.guests import leave_unread, rests, unload
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Residency, Role, State

# An engine whose worker did so many steps has not failed in starting.
WORKED_STEPS = 10


def worker_gone(m: Machine, e: WorkerGone) -> None:
    worker = m.workers.get(e.worker_id)
    if worker is None:
        return
    proc = m.procs[worker.pid]
    if proc.role is Role.ENGINE:
        turns.split(m, worker, {})
    turns.off(m, worker)
    peak, promised = m.ledger.peak(proc.pid), m.ledger.private(proc.pid)
    if outgrown.has_settled(m, worker) and peak:
        m.out.append(Learned(proc.pid, peak))
    _forget_worker(m, worker)
    proc.worker_id = ""
    m.waiting.pop(proc.pid)  # its memory was out, and it waited for it to come back
    proc.residency = Residency.DISK if proc.checkpoint else Residency.NONE
    admission.show_promise(m, proc)
    # It went while there was no kernel, and left no word: the machine went down.
    vanished = e.status is None and not worker.up
    if proc.role is Role.ENGINE:
        _put_guests_back(m, proc, worker, e.status)
    if not proc.live:
        return
    if _ran_out(m, proc, worker, promised, peak):
        to_be_continued(m, proc, "ran out of memory; goes on with a larger promise")
    elif worker.done is not None:
        status, reason = worker.done
        if worker.kill_signal:
            end(m, proc, status, reason)
        else:
            died(m, proc, worker, status, reason)
    elif worker.kill_signal and not worker.kill_why:
        _killed(m, proc, worker)  # a person's kill counts, even one that met it on its way out
    elif worker.stop_sent and (e.status == 0 or worker.saved_for_stop):
        proc.move_s = max(proc.move_s, m.now - worker.stop_since)
        to_be_continued(m, proc, "stopped at a safepoint")
    elif vanished and proc.role is Role.ENGINE and not m.guests_of(proc.pid):
        end(m, proc, 0, "its worker went with an earlier kernel")
    elif vanished:
        to_be_continued(m, proc, "its worker is gone since an earlier kernel")
    elif worker.kill_signal:
        _killed(m, proc, worker)
    elif m.shutting_down and proc.role is Role.PROCESS:
        # Killed because it took too long, or with the whole machine: not a failure of its own.
        to_be_continued(m, proc, "ended with the kernel; goes on from its last checkpoint")
    elif worker.failed and worker.stop_sent and proc.role is Role.PROCESS:
        to_be_continued(m, proc, f"{worker.failed}: ended, and goes on from its last checkpoint")
    elif worker.failed:
        died(m, proc, worker, e.status or 1, f"its worker {worker.failed}")
    else:
        died(m, proc, worker, e.status, f"its worker {describe_status(e.status)}")


def start_failed(m: Machine, e: StartFailed) -> None:
    """Its folder could not be made: it waits, as if nobody had tried."""
    worker = m.workers.get(e.worker_id)
    if worker is None:
        return
    proc = m.procs[worker.pid]
    turns.off(m, worker)
    _forget_worker(m, worker)
    proc.worker_id = ""
    proc.residency = Residency.DISK if proc.checkpoint else Residency.NONE
    admission.show_promise(m, proc)
    if not proc.live:
        return
    if worker.kill_signal and not worker.kill_why:
        _killed(m, proc, worker)
    elif proc.role is Role.SERVICE:
        died(m, proc, worker, 71, f"it could not be started: {e.why}")
    else:
        to_be_continued(m, proc, f"it could not be started: {e.why}")


def _forget_worker(m: Machine, worker: Worker) -> None:
    """It is off its devices, and its memory is free."""
    for device in worker.devices:
        m.devices[device].forget(worker.worker_id)
        m.on_device[device].pop(worker.worker_id, None)
        m.dirty[device] = None
    m.gangs.pop(worker.worker_id, None)
    del m.workers[worker.worker_id]
    m.ledger.release(worker.pid)
    m.line_dirty = True


def _ran_out(m: Machine, proc: Process, worker: Worker, promised: int, peak: int) -> bool:
    """Whether a worker ended for want of memory, and its process gets another chance."""
    error = proc.result.get("error")
    ran_out = worker.done is not None and isinstance(error, dict)
    if not ran_out or error.get("code") != "out-of-memory" or proc.role is not Role.PROCESS:  # type: ignore[union-attr]
        return False
    memory = proc.result.get("memory", {})
    peak = max(peak, int(memory.get("peak_bytes", 0)))
    wanted = int(memory.get("wanted_bytes", 0))
    if m.shutting_down or worker.kill_signal:
        return False
    if not outgrown.out_of_memory(m, proc, promised, peak, wanted):
        return False
    proc.result = {}
    return True


def _killed(m: Machine, proc: Process, worker: Worker) -> None:
    """A worker ended because somebody had asked for it; `kill_why` is empty for a person."""
    n, why = worker.kill_signal, worker.kill_why
    if not why:
        end(m, proc, 128 + n, f"killed by {signals.Signals(n).name}")
    elif why == "restart":
        admission.wait_for_memory(m, to_waiting(m, proc, "restarted by a person"))
    elif proc.role is Role.PROCESS:
        to_be_continued(m, proc, "ended before it had loaded" if proc.needs_device else why)
    elif m.shutting_down or not m.guests_of(proc.pid) or not unload(m, proc, why):
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
    m.out.append(Changed(proc.pid))  # who released a paused one waits for its memory


def died(m: Machine, proc: Process, worker: Worker, status: int | None, how: str) -> None:
    """The worker ended and nobody had asked for it: the restart policy decides."""
    if proc.role is Role.ENGINE:
        if not m.guests_of(proc.pid):
            end(m, proc, 1 if status is None else status, how)
            return
        status = status or 1  # it has left somebody behind
        if worker.reports >= WORKED_STEPS:
            proc.failures = 0
    why = restarts.failed(m, proc, worker, status, how)
    if not why:
        return
    for guest in m.guests_of(proc.pid) if proc.role is Role.ENGINE else ():
        end(m, guest, 1, f"its engine (process {proc.pid}): {why}")
    end(m, proc, 1 if status is None else status, why)


def end_unneeded(m: Machine, engine: Process) -> None:
    """An engine without a worker is started again for its guests only."""
    idle = engine.state in (State.BACKOFF, State.WAITING) and not engine.worker_id
    if idle and not m.guests_of(engine.pid):
        end(m, engine, 0, "nobody needs it any more")


def describe_status(status: int | None) -> str:
    if status is None:
        return "ended, nobody knows how"
    if status > 128 and status - 128 in set(signals.Signals):
        return f"was killed by {signals.Signals(status - 128).name}"
    return f"ended with exit status {status}"


def end(m: Machine, proc: Process, status: int, reason: str) -> None:
    """A process exits. Its row stays."""
    proc.exit_status, proc.ended_at = status, m.now
    if proc.role is Role.PROCESS and proc.device_seconds:
        standing.moved(m, m.policy.ended(m.job_of(proc)))
    proc.residency = Residency.NONE if proc.checkpoint is None else Residency.DISK
    m.waiting.pop(proc.pid)
    m.early_input.pop(proc.pid, None)
    m.leave_engine(proc)
    m.move(proc, State.EXITED, f"exit status {status}: {reason}", reason)
    m.record("exited", proc.pid, f"status {status}: {reason}")
    m.save(proc)


def _put_guests_back(m: Machine, engine: Process, worker: Worker, status: int | None) -> None:
    """Their engine's worker is gone. What a person or a shutdown has ended is over; others wait
    for the next worker, which goes on after what they have been given already."""
    by_person = worker.kill_signal and not worker.kill_why
    leave_unread(m, worker)
    for guest in m.guests_of(engine.pid):
        if m.shutting_down and guest.attached:
            end(m, guest, 128 + 15, "the kernel shut down")
        elif by_person:
            how = describe_status(status)
            end(m, guest, 1, f"the worker of its engine (process {engine.pid}) {how}")
        elif worker.kill_why and rests(guest) and not m.shutting_down:
            m.save(guest)  # it needs no engine until its next turn
        else:
            guest.awaits_input = False
            if guest.state is not State.PAUSED:
                why = "the kernel shuts down" if m.shutting_down else "its engine starts again"
                m.move(guest, State.WAITING, why, "engine")
            m.save(guest)
