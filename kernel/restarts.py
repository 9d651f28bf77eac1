"""Restart policies: whether a process whose worker has ended is started again, and when.

`no`, `on-failure`, `on-failure:N` (at most N times in a row) or `always`, as elsewhere. The pause
doubles with each failure in a row and is spread, so that what fell together does not come back
together; who has worked long enough begins to count anew.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from llmos.kernel.errors import BadArgument
from llmos.kernel.machine import Machine, Worker
from llmos.kernel.process import Process, Role, State

# The pause before the first restart doubles up to the longest. An engine has somebody waiting.
FIRST_S, FIRST_ENGINE_S, LONGEST_S = 1.0, 0.1, 60.0
SPREAD = 0.25  # up to so much is added to a pause

# Without a number of its own `on-failure` gives up after so many failures in a row: what fails at
# once will fail again. `always` never does.
LIMIT = 10
# An engine that dies with every attempt is killed by what it serves.
ENGINE_LIMIT = 3

# Who worked for so long before it failed has not failed in a row.
STABLE_S = 600.0

_WORDS = re.compile(r"(no|on-failure|always)(?::([0-9]{1,6}))?")


@dataclass(frozen=True, slots=True)
class Restart:
    when: str  # no, on-failure, always
    limit: int | None  # failures in a row; None: any number

    def wants(self, status: int | None) -> bool:
        """Is a process that ended with `status` (None: nobody knows) to be started again?"""
        return self.when == "always" or (self.when == "on-failure" and status != 0)


def parse(text: str) -> Restart:
    """What stands after --restart. Raises BadArgument."""
    found = _WORDS.fullmatch(text)
    if found is None or (found[2] is not None and found[1] != "on-failure") or found[2] == "0":
        raise BadArgument(
            f"restart is no, on-failure, on-failure:N or always, not {text!r}",
            "on-failure:3 gives up after three failures in a row",
        )
    limit = int(found[2]) if found[2] else LIMIT
    return Restart(found[1], limit if found[1] == "on-failure" else None)


def policy_of(proc: Process) -> Restart:
    """An engine is started again as long as somebody is in it."""
    if proc.role is Role.ENGINE:
        return Restart("on-failure", ENGINE_LIMIT)
    return parse(proc.restart)


def pause_s(proc: Process) -> float:
    """How long it waits before it is started again, after `proc.failures` in a row."""
    first = FIRST_ENGINE_S if proc.role is Role.ENGINE else FIRST_S
    doubled = min(LONGEST_S, first * 2.0 ** min(proc.failures - 1, 30))
    # Spread by what it is, not by chance: the same events give the same orders.
    spread = zlib.crc32(f"{proc.pid} {proc.restarts}".encode()) / 2**32
    return float(doubled * (1 + SPREAD * spread))


def failed(m: Machine, proc: Process, worker: Worker, status: int | None, how: str) -> str:
    """Count a failure -> why it is not started again; empty: it is, and is in BACKOFF now."""
    policy = policy_of(proc)
    if not policy.wants(status) or m.shutting_down:
        return how
    if m.now - worker.admitted_at >= STABLE_S:
        proc.failures = 0
    proc.failures = proc.failures + 1 if status != 0 else 1  # `always` starts again what ended well
    if policy.limit is not None and proc.failures > policy.limit:
        times = f"{policy.limit} restart{'s' if policy.limit > 1 else ''} in a row"
        return f"{how}; given up after {times}"
    proc.restarts += 1
    delay = pause_s(proc)
    proc.next_start_at = m.now + delay
    m.move(proc, State.BACKOFF, f"{how}; again in {delay:.1f} s", "backoff")
    m.record("backoff", proc.pid, f"{how}; again in {delay:.1f} s")
    m.wake_at(proc.next_start_at, pid=proc.pid)
    m.save(proc)
    return ""
