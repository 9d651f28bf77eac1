"""Watching workers: who hangs, who does not come to its safepoint, who does not die.

Everything here is counted in seconds that a worker had its device for: a held one cannot do
anything, and is not to blame. A worker gives a sign of life when its main thread moves (a step, a
word, another line of Python); one that is stuck in C or waits for what never comes gives none.
"""

from __future__ import annotations

from llmos.kernel import turns
from llmos.kernel.events import Signal
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Role

# A worker that was asked to come to a safepoint and to write its checkpoint has at least so long,
# and so many of its steps.
STOP_S, STOP_STEPS = 600.0, 10

# Who was asked to end has so long before it is made to.
END_S = 10.0

ABORT, KILL = 6, 9


def alive(m: Machine, worker: Worker) -> None:
    """It gave a sign of life."""
    for device in worker.devices:
        turns.charge(m, device)
    worker.heard_s = worker.leased_s


def look(m: Machine, worker: Worker) -> None:
    """See whether it hangs, and come again as long as it has its device."""
    if worker.ending:
        _make_it_end(m, worker)
        return
    worker.watched = False
    if not worker.devices or not m.leases(worker):
        return
    for device in worker.devices:
        turns.charge(m, device)
    patience_s = patience(m, worker)
    silent_s = worker.leased_s - worker.heard_s
    if patience_s and silent_s >= patience_s:
        fail(m, worker, f"gave no sign of life for {silent_s:.0f} s of device time")
        return
    if worker.stop_sent:
        bound_s = max(STOP_S, STOP_STEPS * worker.step_s)
        if worker.leased_s - worker.stop_leased_s >= bound_s:
            fail(m, worker, f"came to no safepoint in {bound_s:.0f} s of device time")
            return
    turns.keep_an_eye_on(m, worker)


def patience(m: Machine, worker: Worker) -> float:
    """Seconds of its device without a sign of life after which a worker hangs; 0: for ever."""
    proc = m.procs[worker.pid]
    wanted = m.settings.hang_s if proc.hang_s is None else proc.hang_s
    return wanted and max(wanted, STOP_STEPS * worker.step_s)


def fail(m: Machine, worker: Worker, how: str) -> None:
    """It is of no use any more: end it, by the signal on which it says where it is."""
    worker.failed = how
    m.record("hung", worker.pid, how)
    m.procs[worker.pid].tell(m.now, "hung", how)
    _send(m, worker, ABORT)


def end(m: Machine, worker: Worker, signal: int, why: str = "") -> None:
    """Ask a worker to end, for a person unless `why` says otherwise."""
    worker.kill_signal, worker.kill_why = signal, why
    if m.procs[worker.pid].role is Role.ENGINE:
        m.retire(m.procs[worker.pid])
    _send(m, worker, signal)


def _send(m: Machine, worker: Worker, signal: int) -> None:
    worker.end_at = m.now + END_S
    m.out.append(Signal(worker.worker_id, signal))
    m.wake_at(worker.end_at, pid=worker.pid)
    turns.update(m, worker)


def _make_it_end(m: Machine, worker: Worker) -> None:
    if worker.end_at and m.now >= worker.end_at - 1e-6 and not m.shutting_down:
        worker.end_at = 0.0
        m.record("killed", worker.pid, f"still there {END_S:.0f} s after it was asked to end")
        m.out.append(Signal(worker.worker_id, KILL))
