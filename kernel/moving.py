"""Memory that has moved off a device, or has come back to it, or could not."""

from __future__ import annotations

from llmos.kernel import admission, room, turns
from llmos.kernel.endings import to_waiting
from llmos.kernel.events import Changed, MovedIn, MovedOut, MoveFailed, Signal
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Residency, State

# A move that found no room is tried again after so long: others have moved by then, or not.
MOVE_AGAIN_S = 5.0


def was_away(m: Machine, proc: Process, worker: Worker, left_bytes: int) -> None:
    """An adopted worker whose memory an earlier kernel had moved to the host."""
    room.moved_out(m, worker, "host", left_bytes)
    if proc.state is not State.PAUSED:
        admission.wait_for_memory(m, to_waiting(m, proc, "its memory is on the host"))


def moved_out(m: Machine, e: MovedOut) -> None:
    """Its memory is on the host (or on disk); its worker lives on without it."""
    worker = m.workers[e.worker_id]
    proc = m.procs[worker.pid]
    turns.off(m, worker)
    freed = room.moved_out(m, worker, e.where, e.left_bytes)
    proc.move_s = max(proc.move_s, 2 * e.seconds)
    turns.update(m, worker)
    m.record("moved-out", proc.pid, f"{freed / 2**30:.2f} GiB to the {e.where}")
    if m.shutting_down:
        room.stop_away(m, worker)
        return
    if proc.state is State.PAUSED:
        m.out.append(Changed(proc.pid))
    else:
        admission.wait_for_memory(m, to_waiting(m, proc, f"its memory is on the {e.where}"))


def moved_in(m: Machine, e: MovedIn) -> None:
    worker = m.workers[e.worker_id]
    proc = m.procs[worker.pid]
    worker.moving, worker.away = "", False
    proc.move_s = max(proc.move_s, 2 * e.seconds)
    proc.residency = Residency.DEVICE
    if proc.state is State.STARTING:
        m.move(proc, State.READY, "its memory is on the device again", "device")
    turns.update(m, worker)


def move_failed(m: Machine, e: MoveFailed) -> None:
    """There was no room for its memory where it was to go: it stays, and goes on where it is."""
    worker = m.workers[e.worker_id]
    proc = m.procs[worker.pid]
    proc.tell(m.now, "move failed", e.why)
    m.record("move-failed", proc.pid, e.why)
    proc.move_error = e.why
    m.line_dirty = True
    m.out.append(Changed(proc.pid))
    if worker.moving == "in":
        m.ledger.move_out(proc.pid, m.ledger.left_bytes(proc.pid), str(proc.residency))
        worker.moving = ""
        if proc.state is State.STARTING:
            proc.next_start_at = m.now + MOVE_AGAIN_S
            m.move(proc, State.BACKOFF, f"{e.why}; again in {MOVE_AGAIN_S:.0f} s", "memory")
            m.wake_at(proc.next_start_at, pid=proc.pid)
        return
    if m.shutting_down and worker.stop_asked:
        # It goes on from the checkpoint before; waiting for room would keep the kernel.
        worker.kill_signal, worker.kill_why = 15, "there was no room for a checkpoint"
        m.out.append(Signal(worker.worker_id, 15))
        return
    worker.moving, worker.stop_asked, worker.stop_sent, worker.stop_for = "", False, False, 0
    worker.admitted_at = m.now  # not asked again at once
    if proc.state is State.STOPPING:
        m.move(proc, State.READY, "its memory could not be moved out", "device")
    turns.update(m, worker)
