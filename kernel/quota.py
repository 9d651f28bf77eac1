"""What one user may have at most: a part of each device's memory, and device-seconds in a window.

Who would have more waits, with the reason `quota`: for memory until others of the same user end,
for device-seconds until the window has moved past what was used. Knows no clock: time is passed in.
"""

from __future__ import annotations

from collections.abc import Callable

from llmos.kernel import turns
from llmos.kernel.errors import NoMemory
from llmos.kernel.events import Changed, Rank
from llmos.kernel.machine import Machine
from llmos.kernel.process import Process, Role, State

# While a user has a device, what is left of the quota is looked at so often at most.
LOOK_S = 0.5

GIB = 1024**3


# ---- device-seconds ----


def pay(m: Machine, proc: Process, seconds: float) -> None:
    """Charge device-seconds to a process, and to its user."""
    proc.device_seconds += seconds
    allowed = m.settings.user_device_s
    if not allowed or proc.role is Role.SERVICE:
        return
    m.usage.add(proc.uid, seconds, m.now)
    left = allowed - m.usage.used(proc.uid, m.now)
    if left <= 0:
        if proc.uid not in m.over_quota:
            m.over_quota[proc.uid] = 0.0
            m.quota_changed[proc.uid] = None
    elif m.quota_looks.get(proc.uid, 0.0) <= m.now:
        at = m.now + max(LOOK_S, left / len(m.devices))
        m.quota_looks[proc.uid] = at
        m.wake_at(at)


def is_over(m: Machine, proc: Process) -> bool:
    """Has its user had all the device-seconds of this window?"""
    return proc.uid in m.over_quota


def look(m: Machine) -> None:
    """Windows have moved, and devices have worked: who is over the quota now, and who no more?"""
    if not m.settings.user_device_s:
        return
    if any(at <= m.now + 1e-9 for at in m.quota_looks.values()):
        m.quota_looks = {u: at for u, at in m.quota_looks.items() if at > m.now + 1e-9}
        for device in m.devices:
            turns.charge(m, device)
    for uid, opens_at in list(m.over_quota.items()):
        if opens_at <= m.now + 1e-9:
            m.quota_changed[uid] = None


def settle(m: Machine, opened: Callable[[Machine, Process], None]) -> None:
    """Take the devices from who has just gone over a quota, give them to whose window has moved,
    for each of whose processes `opened` is called."""
    if not m.settings.user_device_s:
        m.quota_changed.clear()
    while m.quota_changed:
        uid = next(iter(m.quota_changed))
        del m.quota_changed[uid]
        allowed = m.settings.user_device_s
        over = m.usage.used(uid, m.now) >= allowed
        if over:
            m.over_quota[uid] = m.usage.below_at(uid, allowed, m.now)
            m.wake_at(m.over_quota[uid])
        else:
            m.over_quota.pop(uid, None)
        m.line_dirty = True
        for pid in list(m.by_user.get(uid, ())):
            _turn(m, m.procs[pid], over)
            if not over:
                opened(m, m.procs[pid])


def _turn(m: Machine, proc: Process, over: bool) -> None:
    """A process of a user whose quota is used up, or not any more."""
    engine = m.engine_of(proc) if proc.role is Role.GUEST else None
    worker = m.worker_of(engine or proc)
    if worker is None or not worker.devices:
        return
    if over:
        proc.tell(m.now, "quota", why(m, proc.uid))
        m.record("quota", proc.pid, why(m, proc.uid))
    if engine is not None and proc.pid in worker.admitted:
        m.out.append(Rank(worker.worker_id, proc.pid, over or proc.state is State.PAUSED))
    if over and engine is not None and proc.state is State.RUNNING:
        m.move(proc, State.READY, "left out of its engine's steps", "quota")
    elif proc.state in (State.READY, State.PREEMPTED):
        proc.reason = "quota" if over else "device"
        m.out.append(Changed(proc.pid))
    if (
        engine is not None
        and engine.state is State.WAITING
        and turns.runnable_guests(m, engine.pid)
    ):
        m.move(engine, State.READY, "the quota of a guest's user is open again", "device")
    turns.update(m, worker)


def why(m: Machine, uid: int) -> str:
    used, allowed = m.usage.used(uid, m.now), m.settings.user_device_s
    hours = m.settings.user_window_s / 3600
    return (f"its user has had {used:,.0f} of {allowed:,.0f} device-seconds in the last "
            f"{hours:g} h")  # fmt: skip


def opens_in(m: Machine, uid: int) -> float:
    """Seconds until a user's window has moved far enough."""
    return max(0.0, m.over_quota.get(uid, m.now) - m.now)


# ---- memory ----


def allowed_bytes(m: Machine, device: str) -> int:
    """What the processes of one user may be promised of a device."""
    return int(m.settings.user_memory * m.ledger.capacity(device))


def held_bytes(m: Machine, uid: int, device: str) -> int:
    """What the processes of a user are promised of it now."""
    pids = (m.workers[w].pid for w in m.on_device[device])
    return sum(m.ledger.on_one_device(pid) for pid in pids if m.procs[pid].uid == uid)


def full(m: Machine, proc: Process) -> frozenset[str]:
    """Devices of which the user of a process can be promised no more for it."""
    if m.settings.user_memory >= 1:
        return frozenset()
    need = proc.segments_bytes
    return frozenset(
        d for d in m.devices if held_bytes(m, proc.uid, d) + need > allowed_bytes(m, d)
    )


def refuse_what_never_fits(m: Machine, proc: Process, names: list[str]) -> None:
    """Raise NoMemory when its user could never be promised so much."""
    need = proc.segments_bytes
    fits = sum(need <= allowed_bytes(m, d) for d in names)
    if m.settings.user_memory >= 1 or fits >= proc.gang:
        return
    largest = max(names, key=m.ledger.capacity)
    raise NoMemory(
        f"{proc.program} needs {need / GIB:,.1f} GiB; one user may have "
        f"{allowed_bytes(m, largest) / GIB:,.1f} GiB of {largest}",
        "make it smaller (batch, context, width, dtype; `llmos plan` finds what fits); "
        "user_memory in config.toml is the limit",
    )
