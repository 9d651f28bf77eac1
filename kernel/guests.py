"""Guests: processes that execute in the worker of an engine, and what that means for both."""

from __future__ import annotations

from typing import Any

from llmos.kernel import admission, quota, turns
from llmos.kernel.errors import Busy, IllegalMove
from llmos.kernel.events import (
    GuestIdle,
    InputGiven,
    KeepAsked,
)
from llmos.kernel.machine import Input, Machine, Worker
from llmos.kernel.process import Process, Residency, Role, State
from llmos.kernel.wire import pack

MIB = 1024**2

# What may wait for one guest. Each input is a turn that a person or a program waits for: who is a
# thousand ahead does not read the answers. The bytes are those of one message at most, so that the
# guest's row, which has them all, stays far below what a database takes.
MOST_INPUTS, MOST_INPUT_BYTES = 1_000, 16 * MIB


def join_engine(m: Machine, guest: Process) -> None:
    """A guest waits for its engine; once the engine is up it is runnable."""
    engine = m.engine_of(guest)
    worker = m.worker_of(engine) if engine else None
    if engine is None or worker is None or not worker.up:
        return
    guest.devices = engine.devices
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
    if e.seen is not None:
        has_read(worker, e.seen)
    if e.seen is not None and e.seen < worker.inputs_sent.get(e.pid, 0):
        return  # it had not read the newest input when it said so
    guest.awaits_input = True
    m.input_bytes.pop(e.pid, None)
    if guest.inputs:
        guest.inputs.clear()  # all of them are answered
        m.save(guest)
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
    _check_room(m, proc, e)
    m.inputs += 1
    given = Input(e.key or f"{m.started_at:.6f}/{m.inputs}", e.message)
    if _is_unread(m, worker, e.pid, given.key):
        return  # sent once more by a client that did not hear of it
    m.input_bytes[e.pid][given.key] = _size(e.message)
    if not proc.attached and not any(held["key"] == given.key for held in proc.inputs):
        proc.inputs.append({"key": given.key, "message": given.message})
        m.save(proc)
    if worker is None or e.pid not in worker.admitted:
        # The engine does not know it yet: it gets the input right after the guest.
        m.early_input.setdefault(e.pid, []).append(given)
        proc.awaits_input = False
        if proc.state is State.WAITING and proc.reason == "input":
            m.move(proc, State.WAITING, "has input", "engine")
            join_engine(m, proc)
            want(m, engine)
        return
    turns.forward(m, worker, e.pid, given)
    proc.awaits_input = False
    if proc.state is State.WAITING and proc.reason == "input":
        m.move(proc, State.READY, "has input", "device")
    if engine is not None and engine.state is State.WAITING:
        m.move(engine, State.READY, "a guest has input", "device")
    turns.update(m, worker)


def _check_room(m: Machine, guest: Process, e: InputGiven) -> None:
    """Raise Busy when too much waits for this guest already."""
    if e.pid not in m.input_bytes:  # it comes from an earlier kernel, or nothing waits
        m.input_bytes[e.pid] = {held["key"]: _size(held["message"]) for held in guest.inputs}
    waiting = m.input_bytes[e.pid]
    if e.key in waiting:
        return
    if len(waiting) >= MOST_INPUTS or sum(waiting.values()) + _size(e.message) > MOST_INPUT_BYTES:
        raise Busy(
            f"{len(waiting):,} inputs ({sum(waiting.values()) / MIB:.1f} MiB) wait for process "
            f"{e.pid}; at most {MOST_INPUTS:,} and {MOST_INPUT_BYTES / MIB:.0f} MiB may",
            "send the next one when some are answered",
        )


def _size(message: dict[str, Any]) -> int:
    return len(pack(message))


def _is_unread(m: Machine, worker: Worker | None, pid: int, key: str) -> bool:
    """Whether an input waits here, or on its way to the engine, already."""
    unread = worker.unread if worker is not None else ()
    return any(given.key == key for given in m.early_input.get(pid, ())) or any(
        to == pid and given.key == key for _, to, given in unread
    )


def has_read(worker: Worker, seen: int) -> None:
    """An engine has read the first `seen` messages about guests."""
    worker.unread = [u for u in worker.unread if u[0] > seen]


def leave_unread(m: Machine, worker: Worker) -> None:
    """A worker is gone: what it may not have read goes to the next one, which knows what it has."""
    for _, pid, given in reversed(worker.unread):
        if pid in m.procs and m.procs[pid].live:
            m.early_input.setdefault(pid, []).insert(0, given)
    worker.unread.clear()


def keep_longer(m: Machine, guest: Process) -> None:
    """A guest may want its model kept for longer than those before it: the longest counts."""
    engine = m.engine_of(guest)
    if engine is not None and "keep_alive_s" in guest.args:
        wanted, now = _keep_s(guest), _keep_s(engine)
        if now >= 0 and (wanted < 0 or wanted > now):
            engine.args = {**engine.args, "keep_alive_s": wanted}


def keep_asked(m: Machine, e: KeepAsked) -> None:
    """A person says how long an engine keeps its model, from now on."""
    engine = m.find(e.pid)
    engine.args = {**engine.args, "keep_alive_s": e.seconds}
    m.save(engine)
    worker = m.worker_of(engine)
    if worker is not None and worker.idle_since is not None:
        _keep(m, engine, worker)


def _keep_s(proc: Process) -> float:
    return float(proc.args.get("keep_alive_s", 300.0))


def _keep(m: Machine, engine: Process, worker: Worker) -> None:
    """From now on it counts how long nobody uses it."""
    worker.idle_since = m.now
    keep_s = _keep_s(engine)
    if keep_s >= 0:
        m.wake_at(m.now + keep_s, pid=engine.pid)


def rest_engine(m: Machine, worker: Worker) -> None:
    """An engine without a runnable guest keeps its model for a while, then leaves. With guests that
    rest (a chat between turns, a paused one) it comes back for the next turn."""
    proc = m.procs[worker.pid]
    if proc.state in (State.READY, State.RUNNING, State.PREEMPTED):
        m.move(proc, State.WAITING, "idle: keeps the model loaded", "idle")
    if not all(rests(guest) for guest in m.guests_of(proc.pid)):
        return  # one that is over its quota has a turn later
    _keep(m, proc, worker)
    m.line_dirty = True  # somebody may have waited for just that


def unload(m: Machine, engine: Process, why: str) -> bool:
    """Its worker is gone, and its guests rest: it is started again when one of them wants it
    -> False when they have moved to another engine of the same model, and this one can end."""
    guests = m.guests_of(engine.pid)
    now = m.return_engine(engine)
    if now is engine:
        m.move(engine, State.WAITING, f"{why}; its guests rest", "unloaded")
        engine.residency = Residency.NONE
        m.save(engine)
    for guest in guests:
        if not rests(guest):
            join_engine(m, guest)
            if not quota.is_over(m, guest):  # else when its quota is open again
                want(m, now)
    return now is engine


def quota_opened(m: Machine, guest: Process) -> None:
    """The quota of a guest's user is open again: its engine may have gone meanwhile."""
    if guest.role is Role.GUEST and not rests(guest):
        want(m, m.engine_of(guest))


def rests(guest: Process) -> bool:
    """A chat between two turns, or a process that a person has paused."""
    return guest.awaits_input or guest.state is State.PAUSED


def want(m: Machine, engine: Process | None) -> None:
    """Somebody needs an engine: one that was unloaded stands in line for memory."""
    if engine is not None and engine.state is State.WAITING and engine.reason == "unloaded":
        admission.wait_for_memory(m, engine)
