"""Attached processes end with their client, unless it comes back for them in time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from llmos.kernel import events as ev

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

# A client whose kernel has died comes back within this, or what was attached to it ends; one whose
# connection broke while it and the kernel live comes back at once.
OWNER_S, DROPPED_S = 60.0, 10.0


class Owners:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        # Attached pids whose clients have yet to come back, and until when.
        self.missing: dict[int, asyncio.TimerHandle] = {}
        self._closed = False

    def close(self) -> None:
        """The kernel ends: nobody is given up any more."""
        self._closed = True
        for timer in self.missing.values():
            timer.cancel()

    def dropped(self, pid: int) -> None:
        """The connection to an attached process's client broke, and the client is still there."""
        self.wait_for(pid, DROPPED_S)

    def hang_up(self, pid: int) -> None:
        """The client that an attached process belonged to is gone."""
        proc = self._k.core.m.procs.get(pid)
        if proc is not None and proc.live and not self._k.core.m.shutting_down:
            with self._k.dmesg.because(self._k.dmesg.cause("hang-up", "its client has gone", pid)):
                self._k.post(ev.KillAsked(pid, 1))

    def wait_for(self, pid: int, at_most_s: float = OWNER_S) -> None:
        """An attached process without a connection ends, unless its client comes back for it."""
        self.back(pid)
        self.missing[pid] = asyncio.get_running_loop().call_later(at_most_s, self._give_up, pid)

    def back(self, pid: int) -> None:
        """Its client has come back for it."""
        timer = self.missing.pop(pid, None)
        if timer is not None:
            timer.cancel()

    def _give_up(self, pid: int) -> None:
        del self.missing[pid]
        if not self._closed:
            self.hang_up(pid)
