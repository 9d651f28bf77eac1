"""When a process wants more memory than it was promised: walls, and the ladder down.

Each worker has a wall that its driver keeps: its promise, and its part of what is free, so that all
of them at their walls still fit on the device. Measured growth raises a promise as long as there is
memory. When there is none, a process is asked to drop its caches, then (only with its user's leave)
to halve its micro-batch, then it is checkpointed and put back in line with the corrected promise.
Who runs into its wall between two measurements gets an error of its own: that is an event with a
culprit, and the process goes by the same last step.
"""

from __future__ import annotations

from llmos.kernel import admission, turns
from llmos.kernel.events import Limit, Measured, Shrink, Shrunk
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Role, State

# A promise is replaced by the measurement after this many steps: the first ones allocate.
SETTLED_STEPS = 2
SETTLED_S = 30.0  # of its device, for a program that reports no steps

# The driver is told of a new wall when it is so much further away or nearer.
WALL_STEP = 0.05
WALL_STEP_BYTES = 16 * 1024 * 1024

# A process that runs out of what it was promised is given more so many times, by this factor at
# least: its own prediction was wrong, not the user.
SECOND_CHANCES = 3
MORE = 1.5


def measured(m: Machine, e: Measured) -> None:
    """One measurement of a device: promises follow it, and who has outgrown its own is seen to."""
    m.ledger.observe(e.device, e.available_bytes, e.foreign_bytes)
    settled = {m.workers[w].pid: has_settled(m, m.workers[w]) for w in m.on_device[e.device]}
    grown = []
    for pid, nbytes in e.by_pid.items():
        if m.ledger.measure(pid, e.device, nbytes, settled.get(pid, False)):
            grown.append(pid)
        if pid in m.procs and m.procs[pid].worker_id:
            admission.show_promise(m, m.procs[pid])
    m.line_dirty = True
    if m.ledger.free(e.device) < 0:
        for pid in grown:
            if pid in m.procs:
                _step_down(m, m.procs[pid])
    set_walls(m, e.device)


def has_settled(m: Machine, worker: Worker) -> bool:
    """Has it shown what it takes? What its user declared stands, until it takes more."""
    if m.procs[worker.pid].declared:
        return False
    done = worker.reports >= SETTLED_STEPS or worker.idle_since is not None
    return worker.loaded and (done or worker.leased_s >= SETTLED_S)


def set_walls(m: Machine, device: str) -> None:
    """Tell the driver how far each worker of a device may go at most."""
    workers = [m.workers[w] for w in m.on_device[device]]
    spare = max(0, m.ledger.free(device)) // (len(workers) + 1)
    for worker in workers:
        if not worker.up or worker.leaving or worker.away or worker.moving:
            continue
        # All that it was promised, what it maps included: mapped copies count at the wall.
        wall = m.ledger.on_one_device(worker.pid) + spare
        if not has_settled(m, worker):
            wall = m.ledger.with_margin(wall)
        if len(worker.devices) > 1 and worker.limit_bytes:
            wall = min(wall, _elsewhere(m, worker, device))
        if abs(wall - worker.limit_bytes) > WALL_STEP * worker.limit_bytes + WALL_STEP_BYTES:
            worker.limit_bytes = wall
            m.out.append(Limit(worker.worker_id, wall))


def _elsewhere(m: Machine, worker: Worker, device: str) -> int:
    """The nearest wall of a gang on its other devices."""
    spare = [
        max(0, m.ledger.free(d)) // (len(m.on_device[d]) + 1) for d in worker.devices if d != device
    ]
    return m.ledger.with_margin(m.ledger.on_one_device(worker.pid)) + min(spare)


def _step_down(m: Machine, proc: Process) -> None:
    """It has outgrown its promise and there is no memory: the next rung of the ladder."""
    worker = m.worker_of(proc)
    if worker is None or worker.leaving or not worker.loaded:
        return
    if not worker.shrink_asked:
        _ask_to_shrink(m, proc, worker, "caches")
    elif worker.shrink_asked == "caches:done" and proc.may_shrink:
        _ask_to_shrink(m, proc, worker, "batch")
    elif worker.shrink_asked.endswith(":done"):
        _put_back(m, proc, worker)


def _ask_to_shrink(m: Machine, proc: Process, worker: Worker, level: str) -> None:
    worker.shrink_asked = level
    proc.tell(m.now, "shrinks", f"outgrew its promise; gives up {level}")
    m.record("shrinks", proc.pid, level)
    m.out.append(Shrink(worker.worker_id, level))


def shrunk(m: Machine, e: Shrunk) -> None:
    worker = m.workers[e.worker_id]
    worker.shrink_asked = f"{e.level}:done"
    proc = m.procs[worker.pid]
    proc.tell(m.now, "shrunk", f"{e.level}: {e.freed_bytes / 2**20:.0f} MiB came free")
    m.ledger.forget_peak(proc.pid)


def _put_back(m: Machine, proc: Process, worker: Worker) -> None:
    """The last rung: to its checkpoint, and in line again with what it really needs."""
    if proc.role is not Role.PROCESS or not proc.has_checkpoint:
        return  # it has nowhere to go; its wall holds it
    correct(proc, m.ledger.private(proc.pid))
    proc.tell(m.now, "outgrown", f"needs {proc.segments_bytes / 2**30:.2f} GiB; goes back in line")
    m.record("outgrown", proc.pid, "no memory for its growth")
    worker.stop_asked = True
    if proc.state is not State.PAUSED:
        m.move(proc, State.STOPPING, "outgrew its promise", "outgrown")
    turns.update(m, worker)
    if m.leases(worker):
        turns.send_stop(m, worker)


def correct(proc: Process, private_bytes: int) -> None:
    """Make the private segments of the next attempt add up to so much; kinds are scaled alike."""
    mine = [s for s in proc.segments if not s.get("shared")]
    before = sum(s["bytes"] for s in mine)
    if not mine or not before:
        proc.segments.append({"kind": "activations", "bytes": private_bytes, "shared": ""})
        return
    for s in mine:
        s["bytes"] = int(s["bytes"] * private_bytes / before)


def out_of_memory(m: Machine, proc: Process, promised: int, peak: int, wanted: int) -> bool:
    """A worker ended at its wall -> whether its process goes back in line with more.

    `promised`, `peak` and `wanted` (what it asked for last) are bytes of one device.
    """
    m.record("out-of-memory", proc.pid, f"had {peak / 2**30:.2f} GiB, promised "
             f"{promised / 2**30:.2f} GiB")  # fmt: skip
    proc.out_of_memory += 1
    again = proc.has_checkpoint and proc.out_of_memory <= SECOND_CHANCES
    more = max(int(promised * MORE), m.ledger.with_margin(peak + wanted))
    shared = sum(s["bytes"] for s in proc.segments if s.get("shared"))
    names = admission.devices_for(m, proc)
    largest = max((m.ledger.capacity(d) for d in names), default=0)
    if not again or more + shared > largest:
        return False
    correct(proc, more)
    proc.tell(m.now, "out-of-memory", f"promised {promised / 2**30:.2f} GiB; goes back in line "
              f"for {more / 2**30:.2f} GiB")  # fmt: skip
    return True
