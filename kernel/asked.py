"""What people ask of processes: kill, pause, resume, renice, restart, checkpoint, input."""

from __future__ import annotations

import signal as signals

from llmos.kernel import admission, turns
from llmos.kernel.errors import BadArgument, IllegalMove
from llmos.kernel.events import (
    AskCheckpoint,
    CheckpointAsked,
    Drop,
    KillAsked,
    PauseAsked,
    Rank,
    ReniceAsked,
    RestartAsked,
    ResumeAsked,
    Signal,
)
from llmos.kernel.guests import join_engine, rest_engine
from llmos.kernel.lifecycle import end, to_waiting
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Role, State

# Signals whose default action ends a process; others would leave `kill` waiting for ever.
ENDING = frozenset({1, 2, 3, 6, 9, 10, 12, 14, 15})


def kill_asked(m: Machine, e: KillAsked) -> None:
    proc = m.find(e.pid)
    if e.signal not in ENDING:
        raise BadArgument(f"signal {e.signal} does not end a process", "TERM, INT and KILL do")
    if not proc.live:
        raise IllegalMove(f"process {e.pid} has ended already (status {proc.exit_status})")
    if proc.role is Role.SERVICE:
        # Trainings that end call it: without it their results would be lost.
        raise IllegalMove(
            f"process {e.pid} is the service {proc.name!r}; others need it",
            f"`llmos service restart {proc.name}` makes it anew",
        )
    worker = m.worker_of(proc)
    if proc.role is Role.GUEST:
        engine = m.engine_of(proc)
        worker = m.worker_of(engine) if engine else None
        end(m, proc, 128 + e.signal, f"killed by {signals.Signals(e.signal).name}")
        if engine is not None and worker is not None:
            drop_guest(m, worker, proc.pid)
            turns.update(m, worker)
            lease = m.devices[worker.device].lease
            off = lease is None or lease.worker_id != worker.worker_id
            if worker.up and off and not turns.runnable_guests(m, engine.pid):
                rest_engine(m, worker)  # a held engine cannot say that it is idle
    elif worker is None:
        for guest in m.guests_of(proc.pid) if proc.role is Role.ENGINE else ():
            end(m, guest, 1, f"its engine (process {proc.pid}) was killed")
        end(m, proc, 128 + e.signal, f"killed by {signals.Signals(e.signal).name}")
    else:
        worker.kill_signal, worker.kill_why = e.signal, ""
        m.retire(proc)
        proc.tell(m.now, "kill", f"signal {e.signal}")
        m.out.append(Signal(worker.worker_id, e.signal))
        turns.update(m, worker)


def drop_guest(m: Machine, worker: Worker, pid: int) -> None:
    if pid in worker.admitted:
        worker.admitted.discard(pid)
        worker.admits_sent += 1
        m.out.append(Drop(worker.worker_id, pid))


def pause_asked(m: Machine, e: PauseAsked) -> None:
    proc = m.find(e.pid)
    if proc.role in (Role.ENGINE, Role.SERVICE):
        raise IllegalMove(f"process {e.pid} is {proc.role}; pause the processes that use it")
    if proc.state in (State.EXITED, State.STOPPING, State.NEW, State.PLANNING):
        raise IllegalMove(f"process {e.pid} is {proc.state} and cannot be paused")
    if proc.state is State.PAUSED:
        return
    m.waiting.pop(proc.pid, None)
    m.move(proc, State.PAUSED, "a person paused it", "paused by a person")
    m.save(proc)
    _tell_rank(m, proc)


def resume_asked(m: Machine, e: ResumeAsked) -> None:
    proc = m.find(e.pid)
    if proc.state is not State.PAUSED:
        raise IllegalMove(f"process {e.pid} is {proc.state}, not paused")
    worker = m.worker_of(proc)
    if proc.role is Role.GUEST:
        m.move(
            proc, State.WAITING, "resumed by a person", "input" if proc.awaits_input else "engine"
        )
        join_engine(m, proc)
        _tell_rank(m, proc)
    elif worker is not None:
        m.move(proc, State.READY, "resumed by a person", "device")
        turns.update(m, worker)
    else:
        m.move(proc, State.WAITING, "resumed by a person")
        admission.wait_for_memory(m, proc)
    m.save(proc)


def renice_asked(m: Machine, e: ReniceAsked) -> None:
    proc = m.find(e.pid)
    if not -20 <= e.nice <= 19:
        raise BadArgument(f"nice is -20 to 19, not {e.nice}", "lower is more important")
    if not proc.live:
        raise IllegalMove(f"process {e.pid} has ended already")
    proc.nice = e.nice
    proc.tell(m.now, "renice", str(e.nice))
    m.save(proc)
    _tell_rank(m, proc)


def _tell_rank(m: Machine, proc: Process) -> None:
    """A rank changed: the device's queue or the engine has to know."""
    worker = m.worker_of(proc)
    if proc.role is Role.GUEST:
        engine = m.engine_of(proc)
        worker = m.worker_of(engine) if engine else None
        if worker is not None and proc.pid in worker.admitted:
            m.out.append(Rank(worker.worker_id, proc.pid, proc.state is State.PAUSED))
    if worker is not None:
        turns.update(m, worker)


def restart_asked(m: Machine, e: RestartAsked) -> None:
    proc = m.find(e.pid)
    proc.restarts = 0
    worker = m.worker_of(proc)
    if worker is not None:
        worker.kill_signal, worker.kill_why = 15, "restart"
        m.out.append(Signal(worker.worker_id, 15))
    elif proc.state is State.BACKOFF:
        admission.wait_for_memory(m, to_waiting(m, proc, "restarted by a person"))
    else:
        raise IllegalMove(f"process {e.pid} is {proc.state} and cannot be restarted")


def checkpoint_asked(m: Machine, e: CheckpointAsked) -> None:
    proc = m.find(e.pid)
    worker = m.worker_of(proc)
    if not proc.has_checkpoint:
        raise IllegalMove(f"process {e.pid} ({proc.program}) has no checkpoints")
    if worker is None or not worker.loaded or proc.state is State.PAUSED or worker.done:
        raise IllegalMove(f"process {e.pid} is {proc.state} and cannot checkpoint now")
    m.out.append(AskCheckpoint(worker.worker_id))
