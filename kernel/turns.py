"""Device time: which workers want a device, what they are charged, and what a turn changes.

An engine ranks as its most urgent runnable guest, and its lease carries a floor: guests of a
less urgent class are left out, so that a batch guest never rides past a waiting training.
"""

from __future__ import annotations

from llmos.kernel import deadlines, gangs, quota
from llmos.kernel.events import Admit, Changed, Forward, Grant, Load, MoveOut, Stop
from llmos.kernel.machine import Input, Machine, Worker
from llmos.kernel.policies.base import NOBODY
from llmos.kernel.process import RUNNABLE, Class, Process, Role, State
from llmos.kernel.sched import Decision, DeviceQueue

# Nothing is looked at again sooner than this: a wrong moment must not keep the kernel busy.
SOONEST_S = 1e-4

# So often who has a device is looked at.
LOOK_S = 5.0

# How much a new step counts in the prediction of the next one.
NEW_STEP = 0.3


def runnable_guests(m: Machine, engine_pid: int) -> list[Process]:
    return [g for g in m.guests_of(engine_pid) if g.state in RUNNABLE and not quota.is_over(m, g)]


def to_be_loaded(engine: Process, worker: Worker) -> bool:
    """Does somebody want this engine in memory, though nobody uses it yet?"""
    return engine.preload and not worker.loaded


def _rank(m: Machine, worker: Worker) -> tuple[Class, int] | None:
    """The class and nice a worker wants the device with; None when it does not want it."""
    proc = m.procs[worker.pid]
    if not worker.devices or not worker.up or worker.ending:
        return None
    if worker.away or worker.moving == "in":
        return None
    if worker.stop_asked:
        return Class.INTERACTIVE, proc.nice  # whoever asked for the stop waits for it
    if proc.role is Role.ENGINE:
        best = min(runnable_guests(m, proc.pid), key=Process.rank, default=None)
        if best is None and to_be_loaded(proc, worker):
            return proc.cls, proc.nice
        return (best.cls, best.nice) if best else None
    runnable = proc.state in RUNNABLE and not quota.is_over(m, proc)
    return (proc.cls, proc.nice) if runnable else None


def update(m: Machine, worker: Worker) -> None:
    """Bring a worker's place in its devices' queues up to date with its process."""
    if not worker.devices:
        return
    rank = _rank(m, worker)
    for device in worker.devices:
        m.dirty[device] = None
        charge(m, device)
        _place(m, worker, m.devices[device], rank)
    if rank is None:
        return
    worker.idle_since = None
    lease = m.devices[worker.device].leases.get(worker.worker_id)
    if lease is not None and not lease.holding:
        if worker.floor != int(rank[0]):
            _grant(m, worker)
        _admit_guests(m, worker)


def _place(m: Machine, worker: Worker, queue: DeviceQueue, rank: tuple[Class, int] | None) -> None:
    proc = m.procs[worker.pid]
    if rank is None:
        engine = proc.role is Role.ENGINE
        queue.dequeue(
            worker.worker_id, "leaving" if worker.ending else "yielding" if engine else ""
        )
    elif worker.worker_id in queue:
        queue.rerank(worker.worker_id, *rank)
    else:
        queue.enqueue(worker.worker_id, *rank, m.job_of(proc, worker.worker_id))
        queue.predict(worker.worker_id, worker.step_s)
        if proc.deadline_at is not None and deadlines.urgent(m, proc):
            queue.hurry(worker.worker_id, proc.deadline_at)


def charge(m: Machine, device: str) -> None:
    """Account the device's time up to now."""
    for paid in m.devices[device].charge(m.now):
        worker = m.workers[paid.worker_id]
        proc = m.procs[worker.pid]
        if device == worker.device:
            worker.leased_s += paid.seconds
        if proc.role is Role.ENGINE:
            worker.unsplit_s += paid.seconds
        elif worker.stop_sent and worker.stop_for in m.procs:
            # Its way to a safepoint is for somebody else, who pays.
            quota.pay(m, m.procs[worker.stop_for], paid.seconds)
        else:
            quota.pay(m, proc, paid.seconds)


def split(m: Machine, worker: Worker, shares: dict[int, float]) -> None:
    """Share an engine's device-seconds among the guests that caused them."""
    for device in worker.devices:
        charge(m, device)
    mine = {pid: s for pid, s in shares.items() if s > 0 and pid in m.procs}
    total = sum(mine.values())
    for pid, share in mine.items():
        quota.pay(m, m.procs[pid], worker.unsplit_s * share / total)
    if not mine:
        quota.pay(m, m.procs[worker.pid], worker.unsplit_s)
    worker.unsplit_s = 0.0


def begin_steps(m: Machine, worker: Worker) -> None:
    """Its program is loaded: steps are timed from here, and counted from its checkpoint."""
    for device in worker.devices:
        charge(m, device)
    worker.settled_s = worker.leased_s
    checkpoint = m.procs[worker.pid].checkpoint
    worker.last_step = int(checkpoint["step"]) if checkpoint else 0


def stepped(m: Machine, worker: Worker, step: int, total: int | None) -> None:
    """A worker reported a step: what the next ones will take, and what the process still needs."""
    for device in worker.devices:
        charge(m, device)
    before = step if worker.last_step is None else worker.last_step
    seconds, steps = worker.leased_s - worker.settled_s, step - before
    worker.settled_s, worker.last_step = worker.leased_s, step
    mixed, worker.mixed = worker.mixed, False
    if steps <= 0 or seconds <= 0:
        return
    proc = m.procs[worker.pid]
    if not mixed:
        _rate(m, worker, proc, steps, seconds)
    if not worker.beside:
        lately = seconds / steps
        known = worker.step_s or lately
        worker.step_s = known + NEW_STEP * (lately - known)
    if total is not None and proc.role is Role.PROCESS:
        proc.predicted_s = max(0, total - step) * worker.step_s * len(worker.devices)
        if proc.deadline_at is not None:
            deadlines.watch(m, proc)
    for device in worker.devices:
        m.devices[device].predict(worker.worker_id, worker.step_s)


def _rate(m: Machine, worker: Worker, proc: Process, steps: int, seconds: float) -> None:
    """Steps per second, alone or beside another: what packing is decided by."""
    if not proc.profile_key or proc.role is not Role.PROCESS:
        return
    if not worker.beside:
        m.packing.worked_alone(proc.profile_key, steps, seconds)
        return
    other = m.procs[m.workers[worker.beside].pid].profile_key
    # Two that share a device are each charged half of its time.
    m.packing.worked_beside(proc.profile_key, other, steps, 2 * seconds)
    total = m.packing.judge(proc.profile_key, other, m.now)
    if total is not None:
        pid = m.workers[worker.beside].pid
        m.record("packed", proc.pid, f"beside process {pid}: {total:.2f} of taking turns", pid)
        m.touch(worker)


def may_pack(m: Machine, device: str, a: str, b: str) -> bool:
    """Whether two workers should have a device at the same time."""
    lanes = m.lanes.get(device, 0)
    procs = [m.procs[m.workers[w].pid] for w in (a, b)]
    for worker, proc in zip((m.workers[a], m.workers[b]), procs, strict=True):
        if proc.role is not Role.PROCESS or len(worker.devices) != 1 or not proc.profile_key:
            return False
        if not worker.loaded or worker.stop_asked or worker.ending:
            return False
        if lanes and not 0 < proc.lanes < lanes:
            return False
    if lanes and sum(p.lanes for p in procs) > lanes:
        return False
    return m.packing.allows(procs[0].profile_key, procs[1].profile_key, m.now)


def decide_all(m: Machine) -> None:
    """Give or take every device about which something has changed."""
    while m.dirty:
        device = next(iter(m.dirty))
        del m.dirty[device]
        decide(m, device)


def decide(m: Machine, device: str) -> None:
    """Give or take the device, as its queue says now."""
    queue = m.devices[device]
    charge(m, device)
    skip = _gangs_first(m, queue) if m.gangs else NOBODY
    if skip is None:
        return
    for decision in queue.decide(m.now, skip):
        _carry_out(m, queue, decision)
    wake = queue.wake_at()
    if wake is not None:
        m.wake_at(max(wake, m.now + SOONEST_S), device=device)


def _gangs_first(m: Machine, queue: DeviceQueue) -> frozenset[str] | None:
    """Those that must wait; None when this device is being kept for, or went to, a gang."""
    waiting = gangs.waiting_on(m, queue)
    skip = frozenset(g.worker_id for g in waiting if gangs.blocked(m, g))
    if queue.reserved_for in skip:
        gangs.give_up(m, m.workers[queue.reserved_for])
    best = queue.reserved_for or queue.best(skip)
    gang = next((g for g in waiting if g.worker_id == best), None)
    if gang is None or (queue.leases and not queue.reserved_for):
        return skip
    if gangs.take(m, gang):
        for device in gang.devices:
            charge(m, device)
            m.devices[device].lend(gang.worker_id, m.now)
        _grant(m, gang)
        for device in gang.devices:
            m.dirty[device] = None
    return None


def _carry_out(m: Machine, queue: DeviceQueue, decision: Decision) -> None:
    worker = m.workers[decision.worker_id]
    if decision.what == "grant":
        _grant(m, worker)
        _pair(m, queue)
        return
    gangs.begin_hold(m, worker, decision.why, m.workers[decision.by].pid if decision.by else 0)
    if decision.why in ("preempted", "batch-share"):
        _note_preemption(m, worker, m.workers[decision.by])


def _pair(m: Machine, queue: DeviceQueue) -> None:
    """Who is beside whom has changed: steps that straddle this moment say nothing."""
    holders = [m.workers[w] for w in queue.leases]
    for worker in holders:
        others = [w.worker_id for w in holders if w is not worker]
        beside = others[0] if others else ""
        worker.mixed = worker.mixed or beside != worker.beside
        worker.beside = beside
    if len(holders) == 2:
        a, b = (m.procs[w.pid].profile_key for w in holders)
        m.packing.begin(a, b, m.now)


def _grant(m: Machine, worker: Worker) -> None:
    """The worker has its devices: load first, then whatever its turn is for."""
    proc = m.procs[worker.pid]
    lease = m.devices[worker.device].leases[worker.worker_id]
    worker.floor = int(lease.cls)
    m.out.append(Grant(worker.worker_id, worker.floor))
    keep_an_eye_on(m, worker)
    if not worker.load_sent:
        worker.load_sent = True
        m.out.append(Load(worker.worker_id, worker.pid))
    if worker.stop_asked:
        send_stop(m, worker)
    if proc.state in (State.READY, State.PREEMPTED):
        told = proc.state is State.PREEMPTED or not worker.turn_over
        m.move(proc, State.RUNNING, f"has {' and '.join(worker.devices)}", told=told)
    if proc.role is Role.ENGINE:
        _admit_guests(m, worker)
        for guest in runnable_guests(m, proc.pid):
            if int(guest.cls) <= worker.floor:
                m.move(guest, State.RUNNING, f"the engine has {worker.device}")
            elif guest.state is State.RUNNING:
                m.move(guest, State.READY, "a more urgent guest is served")
    m.record("granted", worker.pid)


def keep_an_eye_on(m: Machine, worker: Worker) -> None:
    """Who has a device is looked at now and then (kernel/watch.py)."""
    # Also where only this one has a bound of its own.
    if (m.settings.hang_s or m.procs[worker.pid].hang_s) and not worker.watched:
        worker.watched = True
        m.wake_at(m.now + LOOK_S, pid=worker.pid)


def send_stop(m: Machine, worker: Worker) -> None:
    """It has the device and shall leave it at the next safepoint: to disk or to the host."""
    if not worker.stop_sent:
        worker.stop_sent, worker.stop_since = True, m.now
        worker.stop_leased_s = worker.leased_s
        out = MoveOut if worker.moving == "out" else Stop
        m.out.append(out(worker.worker_id))


def _admit_guests(m: Machine, worker: Worker) -> None:
    """Hand the guests that came in the meantime to an engine that has the device."""
    proc = m.procs[worker.pid]
    if proc.role is not Role.ENGINE:
        return
    for guest in runnable_guests(m, proc.pid):
        if guest.pid not in worker.admitted:
            worker.admitted.add(guest.pid)
            worker.admits_sent += 1
            m.out.append(Admit(worker.worker_id, guest.pid))
            for given in m.early_input.pop(guest.pid, ()):
                forward(m, worker, guest.pid, given)
        if guest.state is State.READY and int(guest.cls) <= worker.floor:
            m.move(guest, State.RUNNING, f"the engine has {worker.device}")


def forward(m: Machine, worker: Worker, pid: int, given: Input) -> None:
    """Hand input to the engine that a guest is in, and keep it until the engine has read it."""
    worker.admits_sent += 1
    worker.inputs_sent[pid] = worker.admits_sent
    worker.unread.append((worker.admits_sent, pid, given))
    m.out.append(Forward(worker.worker_id, pid, given.message, given.key))


def _note_preemption(m: Machine, worker: Worker, by: Worker) -> None:
    urgent: Process = m.procs[by.pid]
    if urgent.role is Role.ENGINE:
        urgent = min(runnable_guests(m, by.pid), key=Process.rank, default=urgent)
    for proc in _occupants(m, worker):
        proc.preemptions += 1
        m.record("preempted", proc.pid, f"{urgent.cls.word} process {urgent.pid}", urgent.pid)


def _occupants(m: Machine, worker: Worker) -> list[Process]:
    """Whom a turn of this worker serves: its process, or the running guests of an engine."""
    proc = m.procs[worker.pid]
    if proc.role is not Role.ENGINE:
        return [proc]
    return [g for g in m.guests_of(proc.pid) if g.state is State.RUNNING]


def held(m: Machine, worker: Worker) -> None:
    """The driver says: the worker is off its devices."""
    lease = m.devices[worker.device].leases.get(worker.worker_id)
    why = lease.holding if lease else ""
    by = f", for process {lease.taken_by}" if lease and lease.taken_by else ""
    off(m, worker)
    proc = m.procs[worker.pid]
    worker.turn_over = why == "turn-ended"
    affected = [*_occupants(m, worker), *([proc] if proc.role is Role.ENGINE else [])]
    for p in affected:
        if p.state is State.RUNNING:
            preempted = why in ("preempted", "batch-share")
            to = State.PREEMPTED if preempted else State.READY
            reason = "quota" if quota.is_over(m, p) else "device"
            m.move(p, to, (why or "held") + by, reason, told=not worker.turn_over)
    m.out.append(Changed(worker.pid))  # a pause waits for the device, not for a state
    m.record("held", worker.pid, why)


def off(m: Machine, worker: Worker) -> None:
    """The worker uses its devices no more: it is held, idle, or gone."""
    for device in worker.devices:
        charge(m, device)
        queue = m.devices[device]
        queue.released(worker.worker_id)
        m.dirty[device] = None
        _pair(m, queue)
    worker.beside = ""
