"""Who stands where in the line for memory: deadlines and age first, then the policy's order."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmos.kernel import deadlines
from llmos.kernel.line import Need
from llmos.kernel.machine import Machine
from llmos.kernel.policies.base import Place
from llmos.kernel.process import Process


def moved(m: Machine, keys: Iterable[str]) -> None:
    """The policy sees some processes with other eyes: those that wait take their new places."""
    for key in keys:
        if int(key) in m.waiting:
            stand(m, m.procs[int(key)])
    m.line_dirty = True


def place(m: Machine, proc: Process) -> Place:
    """The place that its deadline, its age and the policy give a process in its class."""
    if deadlines.urgent(m, proc):
        return (-math.inf, proc.deadline_at or 0.0)
    if m.now - proc.waiting_since >= m.settings.aging_s - 1e-6:
        return (-1e300, proc.waiting_since)
    return m.policy.place(m.job_of(proc))


def stand(m: Machine, proc: Process) -> None:
    """Take its place among those that wait for memory."""
    m.waiting.add(proc.pid, int(proc.cls), place(m, proc), need_of(m, proc), late_at(m, proc))
    m.line_dirty = True


def need_of(m: Machine, proc: Process) -> Need:
    """What it waits for, and what else decides whether it can have it."""
    if m.worker_of(proc) is not None:
        return Need(0, proc.gang, ("away", proc.pid))
    shared = tuple(sorted(s["shared"] for s in proc.segments if s.get("shared")))
    more: tuple[object, ...] = (shared, proc.device_wanted) if shared or proc.device_wanted else ()
    if m.settings.user_memory < 1 or m.settings.user_device_s:
        more += (proc.uid,)  # what stops one user stops nobody else
    return Need(proc.segments_bytes, proc.gang, more)


def late_at(m: Machine, proc: Process) -> float:
    """When a process has waited too long to be passed by others of its class."""
    return proc.waiting_since + m.settings.passing_s - 1e-6


def look_when_late(m: Machine, proc: Process) -> None:
    """Look at one in the line again when it will not be passed any more, or has aged."""
    since = proc.waiting_since
    moments = (since + m.settings.passing_s, since + m.settings.aging_s)
    at = min((at for at in moments if at > m.now + 1e-9), default=None)
    if at is not None:
        m.wake_at(at, pid=proc.pid)
