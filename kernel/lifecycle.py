"""The life of a process: from submit to exit, and what each worker's fate means for it."""

from __future__ import annotations

import signal as signals

from llmos.kernel import admission, outgrown, restarts, room, standing, turns, watch
from llmos.kernel.errors import NoMemory
from llmos.kernel.events import (
    Alive,
    CanCheckpoint,
    Changed,
    Checkpointed,
    Forget,
    Grant,
    Hold,
    Learned,
    Load,
    Loaded,
    Misspoke,
    MovedIn,
    MovedOut,
    MoveFailed,
    PlanFailed,
    Planned,
    ProcessDone,
    Reported,
    Signal,
    StartFailed,
    Submitted,
    WorkerGone,
    WorkerHeld,
    WorkerIdle,
    WorkerUp,
)
from llmos.kernel.guests import (
    has_read,
    join_engine,
    keep_longer,
    leave_unread,
    rest_engine,
    rests,
    unload,
    want,
)
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Residency, Role, State

# An engine whose worker did so many steps has not failed in starting.
WORKED_STEPS = 10

# Who has said that it is done is gone within this, or waits for something.
LINGERS_S = 2.0

# A move that found no room is tried again after so long: others have moved by then, or not.
MOVE_AGAIN_S = 5.0


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
        _was_away(m, proc, worker, e.left_bytes)
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


def _was_away(m: Machine, proc: Process, worker: Worker, left_bytes: int) -> None:
    """An adopted worker whose memory an earlier kernel had moved to the host."""
    room.moved_out(m, worker, "host", left_bytes)
    if proc.state is not State.PAUSED:
        admission.wait_for_memory(m, to_waiting(m, proc, "its memory is on the host"))


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
