"""Gangs: one worker on several devices, which it gets all at once or not at all.

A gang stands in the queue of each of its devices. Its turn comes when no queue speaks against it
(no more urgent class waits there, it has had no more than its share there) and one of them picks
it. Then the other devices are taken from whoever has them and kept for it until all are free; on
a device that can be held in milliseconds that costs milliseconds. Until its turn comes its devices
serve whoever is next: nothing is idle for it. Waiting, it is owed more and more of each of its
devices, so its turn does come.
"""

from __future__ import annotations

from llmos.kernel.events import Hold
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.sched import DeviceQueue


def waiting_on(m: Machine, queue: DeviceQueue) -> list[Worker]:
    """The gangs that want this device and do not have it."""
    return [
        w for g in m.gangs
        if g in queue and g not in queue.leases and (w := m.workers[g]) is not None
    ]  # fmt: skip


def blocked(m: Machine, gang: Worker) -> bool:
    """Whether one of its devices speaks against its turn now."""
    queues = [m.devices[d] for d in gang.devices]
    return not all(
        q.may_run(gang.worker_id) and q.reserved_for in ("", gang.worker_id) for q in queues
    )


def take(m: Machine, gang: Worker) -> bool:
    """Its turn has come: keep its devices for it, and take those that others have.

    -> True when all of them are free: it can be granted.
    """
    free = True
    for device in gang.devices:
        queue = m.devices[device]
        queue.reserved_for = gang.worker_id
        for lease in queue.leases.values():
            free = False
            if not lease.holding and lease.leaves != "leaving":
                begin_hold(m, m.workers[lease.worker_id], "gang", gang.pid)
    return free


def begin_hold(m: Machine, worker: Worker, why: str, by: int) -> None:
    """Begin to take all of its devices from a worker, for process `by` (0: nobody's)."""
    for device in worker.devices:
        lease = m.devices[device].leases[worker.worker_id]
        lease.holding, lease.taken_by = why, by
    m.out.append(Hold(worker.worker_id))


def give_up(m: Machine, gang: Worker) -> None:
    """Something more urgent came before its devices were together: it waits on."""
    for device in gang.devices:
        if m.devices[device].reserved_for == gang.worker_id:
            m.devices[device].reserved_for = ""
            m.dirty[device] = None
