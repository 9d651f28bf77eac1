"""Deadlines: when a process cannot wait any more, and who hears of it.

A deadline changes nothing while there is time. From the moment on at which a process has to run
without a break to be done in time, it goes before the others of its class and user: on its devices
and in the line for memory. It takes nothing from other users.
"""

from __future__ import annotations

from llmos.kernel.machine import Machine
from llmos.kernel.process import Process

# What a prediction of the time that is left may be wrong by, and what a worker's start takes.
LATE_SHARE, LATE_S = 1.1, 30.0


def latest_start(proc: Process) -> float | None:
    """When a process has to go on without a break to meet its deadline; None: it has none.

    Where nobody knows how long it takes there is no moment that is early enough: 0.
    """
    if proc.deadline_at is None:
        return None
    if proc.predicted_s is None:
        return 0.0
    return proc.deadline_at - proc.predicted_s / proc.gang * LATE_SHARE - LATE_S


def urgent(m: Machine, proc: Process) -> bool:
    due = latest_start(proc)
    return due is not None and m.now >= due - 1e-6


def watch(m: Machine, proc: Process) -> None:
    """Tell the queues of a process whether it can wait, and look again when it cannot."""
    due = latest_start(proc)
    worker = m.worker_of(proc)
    if worker is not None and worker.devices:
        for device in worker.devices:
            at = proc.deadline_at if urgent(m, proc) else None
            m.devices[device].hurry(worker.worker_id, at)
        m.touch(worker)
    if due is None or due <= m.now:
        return
    # The prediction moves a little with every step: one alarm is enough, a little early.
    if proc.watched_at <= m.now or due < proc.watched_at:
        proc.watched_at = due
        m.wake_at(due, pid=proc.pid)
