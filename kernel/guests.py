"""Guests: processes that execute in the worker of an engine, and what that means for both."""

from __future__ import annotations

from llmos.kernel import turns
from llmos.kernel.errors import IllegalMove
from llmos.kernel.events import (
    GuestIdle,
    InputGiven,
)
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Residency, Role, State


def join_engine(m: Machine, guest: Process) -> None:
    """A guest waits for its engine; once the engine is up it is runnable."""
    engine = m.engine_of(guest)
    worker = m.worker_of(engine) if engine else None
    if engine is None or worker is None or not worker.up:
        return
    guest.device = engine.device
    guest.residency = Residency.DEVICE
    if guest.state is State.WAITING and guest.reason == "engine":
        m.move(guest, State.READY, f"joins engine {engine.pid}", "device")
        if engine.state is State.WAITING:
            m.move(engine, State.READY, "a guest came", "device")
    turns.update(m, worker)


def guest_idle(m: Machine, e: GuestIdle) -> None:
    guest = m.procs.get(e.pid)
    if guest is None:
        return
    worker = m.workers[e.worker_id]
    if e.seen is not None and e.seen < worker.inputs_sent.get(e.pid, 0):
        return  # it had not read the newest input when it said so
    guest.awaits_input = True
    if guest.state not in (State.READY, State.RUNNING, State.PREEMPTED):
        return  # paused in the meantime, or gone
    m.move(guest, State.WAITING, "waits for input", "input")
    turns.update(m, worker)


def input_given(m: Machine, e: InputGiven) -> None:
    proc = m.find(e.pid)
    engine = m.engine_of(proc) if proc.role is Role.GUEST else None
    worker = m.worker_of(engine) if engine else None
    if proc.role is not Role.GUEST or not proc.live:
        raise IllegalMove(f"process {e.pid} takes no input")
    if worker is None or e.pid not in worker.admitted:
        # The engine does not know it yet: it gets the input right after the guest.
        m.early_input.setdefault(e.pid, []).append(e.message)
        return
    turns.forward(m, worker, e.pid, e.message)
    proc.awaits_input = False
    if proc.state is State.WAITING and proc.reason == "input":
        m.move(proc, State.READY, "has input", "device")
    if engine is not None and engine.state is State.WAITING:
        m.move(engine, State.READY, "a guest has input", "device")
    turns.update(m, worker)


def rest_engine(m: Machine, worker: Worker) -> None:
    """An engine without a runnable guest keeps its model for a while, then leaves."""
    proc = m.procs[worker.pid]
    if proc.state in (State.READY, State.RUNNING, State.PREEMPTED):
        m.move(proc, State.WAITING, "idle: keeps the model loaded", "idle")
    if m.guests_of(proc.pid):
        return  # a chat between turns or a paused guest: it stays
    worker.idle_since = m.now
    keep = float(proc.args.get("keep_alive_s", 300.0))
    if keep >= 0:
        m.wake_at(m.now + keep)
