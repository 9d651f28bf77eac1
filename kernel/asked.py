"""What people ask of processes: kill, pause, resume, renice, restart, checkpoint, input; and the
kernel itself, when it must give one up."""

from __future__ import annotations

import signal as signals

from llmos.kernel import admission, deadlines, room, standing, turns, watch
from llmos.kernel.endings import end, end_unneeded, to_waiting
from llmos.kernel.errors import BadArgument, IllegalMove
from llmos.kernel.events import (
    AskCheckpoint,
    CheckpointAsked,
    Drop,
    GivenUp,
    KillAsked,
    PauseAsked,
    Rank,
    ReniceAsked,
    RestartAsked,
    ResumeAsked,
    StopAsked,
)
from llmos.kernel.guests import join_engine, rest_engine, want
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import CLASSES, Process, Role, State

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
            f"process {e.pid} is the service {proc.name!r}",
            f"`llmos service restart {proc.name}` makes it anew, `llmos service stop` ends it",
        )
    worker = m.worker_of(proc)
    if proc.role is Role.GUEST:
        _end_guest(m, proc, 128 + e.signal, f"killed by {signals.Signals(e.signal).name}")
    elif worker is None:
        for guest in m.guests_of(proc.pid) if proc.role is Role.ENGINE else ():
            end(m, guest, 1, f"its engine (process {proc.pid}) was killed")
        end(m, proc, 128 + e.signal, f"killed by {signals.Signals(e.signal).name}")
    else:
        proc.tell(m.now, "kill", f"signal {e.signal}")
        watch.end(m, worker, e.signal)


def given_up(m: Machine, e: GivenUp) -> None:
    proc = m.procs.get(e.pid)
    if proc is None or not proc.live:
        return
    if proc.role is Role.GUEST:
        _end_guest(m, proc, 1, e.why)
        return
    for guest in m.guests_of(proc.pid) if proc.role is Role.ENGINE else ():
        end(m, guest, 1, f"its engine (process {proc.pid}): {e.why}")
    worker = m.worker_of(proc)
    if worker is None:
        end(m, proc, 1, e.why)
    else:
        worker.done = (1, e.why)  # the reason that is told when it is gone
        watch.end(m, worker, signals.SIGKILL)


def _end_guest(m: Machine, guest: Process, status: int, reason: str) -> None:
    engine = m.engine_of(guest)
    worker = m.worker_of(engine) if engine else None
    end(m, guest, status, reason)
    if engine is not None and worker is not None:
        drop_guest(m, worker, guest.pid)
        turns.update(m, worker)
        if worker.up and not m.leases(worker) and not turns.runnable_guests(m, engine.pid):
            rest_engine(m, worker)  # a held engine cannot say that it is idle
    elif engine is not None:
        end_unneeded(m, engine)


def drop_guest(m: Machine, worker: Worker, pid: int) -> None:
    if pid in worker.admitted:
        worker.admitted.discard(pid)
        worker.admits_sent += 1
        m.out.append(Drop(worker.worker_id, pid))


def pause_asked(m: Machine, e: PauseAsked) -> None:
    proc = m.find(e.pid)
    worker = m.worker_of(proc)
    if proc.role is Role.ENGINE and e.release and worker and not m.guests_of(proc.pid):
        room.end_engine(m, worker, "a person wanted its memory")
        return
    if proc.role in (Role.ENGINE, Role.SERVICE):
        kind = "an engine" if proc.role is Role.ENGINE else "a service"
        raise IllegalMove(f"process {e.pid} is {kind}", "pause the processes that use it")
    if proc.state in (State.EXITED, State.STOPPING, State.NEW, State.PLANNING):
        raise IllegalMove(f"process {e.pid} is {proc.state} and cannot be paused")
    proc.move_error = ""
    if not proc.needs_device:
        _pause_without_device(m, proc, worker)
        return
    if e.release:
        _check_release(m, proc)
    if proc.state is not State.PAUSED:
        m.waiting.pop(proc.pid)
        m.move(proc, State.PAUSED, "a person paused it", "paused by a person")
        m.save(proc)
        _tell_rank(m, proc)
    if e.release and worker is not None and not worker.leaving and not worker.away:
        if worker.loaded:
            room.release(m, worker)
        else:
            # There is nothing in it yet that could be lost.
            watch.end(m, worker, 15, "released before it had loaded")


def _pause_without_device(m: Machine, proc: Process, worker: Worker | None) -> None:
    """There is no device to be taken from it: it ends, and `resume` starts it again."""
    if proc.state is not State.PAUSED:
        m.move(proc, State.PAUSED, "a person paused it", "paused by a person")
        m.save(proc)
    if worker is not None and not worker.ending:
        watch.end(m, worker, 15, "paused by a person")


def _check_release(m: Machine, proc: Process) -> None:
    worker = m.worker_of(proc)
    if worker is not None and worker.moving == "in":
        raise IllegalMove(
            f"the memory of process {proc.pid} is on its way back to the device",
            "ask again in a moment",
        )
    if proc.role is Role.GUEST:
        raise IllegalMove(
            f"process {proc.pid} has no memory of its own but in its engine",
            "`llmos pause` without --release holds it; `llmos kill` ends it",
        )
    if not room.movable(m, proc) and worker is not None:
        raise IllegalMove(
            f"process {proc.pid} ({proc.program}) writes no checkpoints: its work would be lost",
            "`llmos pause` without --release keeps its memory",
        )


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
        if not proc.awaits_input:
            want(m, m.engine_of(proc))
        _tell_rank(m, proc)
    elif worker is not None and worker.moving == "in":
        m.move(proc, State.STARTING, "resumed by a person; its memory is on its way back")
    elif worker is not None and not worker.away and not worker.leaving:
        m.move(proc, State.READY, "resumed by a person", "device")
        turns.update(m, worker)
    elif worker is not None and worker.leaving:
        # Its memory is being given back at this moment; it comes again right after.
        m.move(proc, State.STOPPING, "resumed by a person", "its memory was being released")
    else:
        m.move(proc, State.WAITING, "resumed by a person")
        admission.wait_for_memory(m, proc)
    m.save(proc)


def renice_asked(m: Machine, e: ReniceAsked) -> None:
    proc = m.find(e.pid)
    if e.nice is not None and not -20 <= e.nice <= 19:
        raise BadArgument(f"nice is -20 to 19, not {e.nice}", "lower is more important")
    if e.cls is not None and e.cls not in CLASSES:
        raise BadArgument(f"class is one of {', '.join(CLASSES)}, not {e.cls!r}")
    if not proc.live:
        raise IllegalMove(f"process {e.pid} has ended already")
    if not proc.needs_device:
        raise IllegalMove(f"process {e.pid} ({proc.name}) needs no device: it is in nobody's way")
    proc.nice = proc.nice if e.nice is None else e.nice
    proc.cls = proc.cls if e.cls is None else CLASSES[e.cls]
    if e.deadline_at is not None:
        proc.deadline_at = e.deadline_at or None
    proc.tell(m.now, "renice", f"nice {proc.nice}, {proc.cls.word}")
    m.save(proc)
    if proc.pid in m.waiting:
        standing.stand(m, proc)
    _tell_rank(m, proc)
    deadlines.watch(m, proc)


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
    proc.restarts = proc.failures = 0
    worker = m.worker_of(proc)
    if worker is not None:
        watch.end(m, worker, 15, "restart")
    elif proc.state is State.BACKOFF:
        admission.wait_for_memory(m, to_waiting(m, proc, "restarted by a person"))
    else:
        raise IllegalMove(f"process {e.pid} is {proc.state} and cannot be restarted")


def stop_asked(m: Machine, e: StopAsked) -> None:
    proc = m.find(e.pid)
    worker = m.worker_of(proc)
    if worker is not None:
        watch.end(m, worker, 15, "was stopped by a person")
    elif proc.live:
        end(m, proc, 0, "was stopped by a person")


def checkpoint_asked(m: Machine, e: CheckpointAsked) -> None:
    proc = m.find(e.pid)
    worker = m.worker_of(proc)
    if not proc.has_checkpoint:
        raise IllegalMove(f"process {e.pid} ({proc.program}) has no checkpoints")
    if worker is None or not worker.loaded or proc.state is State.PAUSED or worker.done:
        raise IllegalMove(f"process {e.pid} is {proc.state} and cannot checkpoint now")
    m.out.append(AskCheckpoint(worker.worker_id))
