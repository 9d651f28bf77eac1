"""The processes of a worker: it, its ranks, the commands it runs. Signalled and stopped as one.

A worker leads a session and a process group of its own, and most of what it starts stays in
them: one call reaches all. A command may put its children into sessions of their own (torchrun
does); while the worker lives it is the subreaper of its tree, so they are found as descendants.
"""

from __future__ import annotations

import contextlib
import os
import signal as signals
from dataclasses import dataclass, field
from pathlib import Path

from llmos.drivers.cpu import procfs


def send(leader: int, *numbers: int) -> None:
    """Each of the signals to the whole tree. KILL takes those, too, that are just being started."""
    # Listed first: when the leader ends its children become others'.
    strays = _strays(leader)
    if signals.SIGKILL in numbers and strays:
        # What stands still starts nobody. With the worker gone, nobody would know them.
        while True:
            _send_all(leader, strays, signals.SIGSTOP)
            more = _strays(leader)
            if set(more) <= set(strays):
                break
            strays = more
    for number in numbers:
        _send_all(leader, strays, number)


@dataclass(slots=True)
class Stop:
    """A stop of a whole tree that is under way, and who has been stopped by it."""

    leader: int
    seen: set[int] = field(default_factory=set)
    strays: list[int] = field(default_factory=list)

    def begin(self) -> None:
        _send_all(self.leader, [], signals.SIGSTOP)

    def is_over(self) -> bool:
        """Has every thread of every process stopped? Ask until it says so.

        Most workers are alone: then this is a look at the leader's threads, and when they have
        stopped one at their children (0.1 ms each with two threads). Whom the signal reached
        forks no more, so the list is whole but for descendants of those that left the group:
        they are stopped one by one, until nobody new is found.
        """
        if not procfs.is_stopped(self.leader):
            return False
        while True:
            tree = _descendants(self.leader)
            new = {self.leader, *tree} - self.seen
            for os_pid in new:
                if _is_stray(os_pid, self.leader):
                    _signal(os_pid, signals.SIGSTOP)
                    self.strays.append(os_pid)
            self.seen |= new
            if not all(procfs.is_stopped(p) for p in tree):
                return False
            if not new:
                return True

    def end(self) -> None:
        """Everybody goes on."""
        _send_all(self.leader, self.strays, signals.SIGCONT)


def _strays(leader: int) -> list[int]:
    return [p for p in _descendants(leader) if _is_stray(p, leader)]


def _descendants(leader: int) -> list[int]:
    """All of the tree but its root. A worker starts others from its main thread, if at all.

    So one look tells for most workers that there are none: a walk over all threads would cost
    each grant and each hold several times as much.
    """
    try:
        if not Path(f"/proc/{leader}/task/{leader}/children").read_text():
            return []
    except (FileNotFoundError, ProcessLookupError):
        return []
    return procfs.children(leader)[1:]


def _is_stray(os_pid: int, leader: int) -> bool:
    """Has it left the leader's group? Who is gone has not."""
    return procfs.group(os_pid) not in (leader, -1)


def _send_all(leader: int, strays: list[int], number: int) -> None:
    """To the group; a worker that has not made it yet is alone."""
    if leader > 0:  # it is forked
        try:
            os.killpg(leader, number)
        except ProcessLookupError:
            _signal(leader, number)
        except PermissionError:  # somebody in it is another user's (a command may be setuid)
            _signal(leader, number)
    for os_pid in strays:
        _signal(os_pid, number)


def _signal(os_pid: int, number: int) -> None:
    if os_pid <= 0:  # would mean the kernel's own group, or everybody
        return
    # Gone in the meantime, or of another user.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(os_pid, number)
