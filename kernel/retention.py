"""Who is forgotten: ended processes are kept for a while, or so many; then all of them goes.

Kept all the same: who is waited for or read at this moment, the parents of living processes, and
whose folder a living one works with (its checkpoint as a model, its data).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llmos.kernel.events import Expired, Forget
from llmos.kernel.machine import Machine
from llmos.kernel.process import Process

# Ended processes are kept this long, or this many, whichever is more forgetful.
KEEP_S = 30 * 24 * 3600.0
KEEP_ROWS = 10_000

# How often it is looked who may go.
EVERY_S = 60.0

_FOLDER = re.compile(r"/procs/(\d+)(?:/|$)")


def choose(
    m: Machine, now: float, held: set[int], keep_s: float = KEEP_S, keep_rows: int = KEEP_ROWS
) -> list[int]:
    """The pids of those that may be forgotten, the oldest first. `held`: who is waited for."""
    ended = [p for p in m.procs.values() if not p.live]
    ended.sort(key=lambda p: (p.ended_at or 0.0, p.pid))
    surplus = len(ended) - keep_rows
    old = [p for n, p in enumerate(ended) if n < surplus or (p.ended_at or 0.0) < now - keep_s]
    if not old:
        return []
    used = held | used_by_the_living(m)
    return [p.pid for p in old if p.pid not in used]


def used_by_the_living(m: Machine) -> set[int]:
    """Pids that a living process refers to."""
    found: set[int] = set()
    for proc in m.procs.values():
        if not proc.live:
            continue
        found |= {proc.ppid, proc.engine_pid}
        for text in _texts([proc.args, proc.cwd, proc.env]):
            found |= {int(pid) for pid in _FOLDER.findall(text)}
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def expired(m: Machine, e: Expired) -> None:
    """They never come back: out of the table, and (by the order) off the disk."""
    for pid in e.pids:
        proc: Process | None = m.procs.get(pid)
        if proc is None or proc.live:
            continue
        # What it was charged stays in the sum that the devices' busy time is compared with.
        m.earlier_s -= proc.device_seconds
        del m.procs[pid]
        m.out.append(Forget(pid))
