"""A hold stops a whole tree: threads, children, and children that left for another session."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from llmos.drivers.cpu import procfs
from llmos.drivers.cpu.tree import Stop, send
from llmos.drivers.worker.reap import reap
from support.children import child, until

# Forks all the time, with a second thread beside; three children at most are there at once.
FORKING = """
import os, threading, time
def burn():
    while True: sum(range(1000))
threading.Thread(target=burn, daemon=True).start()
print('up', flush=True)
there = []
while True:
    there.append(os.fork())
    if not there[-1]:
        end = time.monotonic() + 0.005
        while time.monotonic() < end: pass
        os._exit(0)
    if len(there) == 3:
        os.waitpid(there.pop(0), 0)
"""

# A child in the group, one in a session of its own, and a child of that one.
SESSIONS = """
import os, time
def burn():
    while True: sum(range(1000))
for own in (False, True):
    if not os.fork():
        if own:
            os.setsid()
            if not os.fork(): burn()
        burn()
print('up', flush=True)
burn()
"""


def stop(leader: int) -> Stop:
    made = Stop(leader)
    made.begin()
    until(made.is_over, "everybody has stopped")
    return made


def ticks(os_pids: list[int]) -> list[str]:
    """The processor time that each has used."""
    found = [procfs.stat(p) for p in os_pids]
    return [" ".join(f[11:13]) for f in found if f is not None]


def tree_of(made: subprocess.Popen[bytes], size: int) -> list[int]:
    until(lambda: len(procfs.children(made.pid)) == size, f"{size} processes")
    return procfs.children(made.pid)


@pytest.mark.slow
def test_a_worker_that_forks_all_the_time_is_stopped_whole() -> None:
    with child(FORKING, session=True) as made:
        for _ in range(30):
            held = stop(made.pid)
            tree = procfs.children(made.pid)
            assert set(tree) <= held.seen, "somebody was born after the hold was over"
            assert all(procfs.is_stopped(p) for p in tree)
            held.end()
            until(lambda: not procfs.is_stopped(made.pid), "it goes on")


def test_a_child_in_a_session_of_its_own_is_stopped_and_goes_on_with_the_rest() -> None:
    with child(SESSIONS, session=True) as made:
        tree = tree_of(made, 4)
        until(lambda: len({procfs.group(p) for p in tree}) == 2, "one has left")
        held = stop(made.pid)
        assert len(held.strays) == 2
        assert all(procfs.is_stopped(p) for p in tree)
        before = ticks(tree)
        assert ticks(tree) == before
        held.end()
        until(lambda: not any(procfs.is_stopped(p) for p in tree), "all go on")
        send(made.pid, signal.SIGKILL)
        until(lambda: all(procfs.started(p) < 0 for p in tree), "all have ended")


def test_the_signal_that_ends_a_stopped_tree_reaches_all_of_it() -> None:
    with child(SESSIONS, session=True) as made:
        tree = tree_of(made, 4)
        stop(made.pid)
        send(made.pid, signal.SIGTERM, signal.SIGCONT)
        until(lambda: all(procfs.started(p) < 0 for p in tree), "all have ended")


def test_what_a_dead_worker_leaves_in_its_group_is_ended() -> None:
    with child(SESSIONS, session=True) as made:
        tree = tree_of(made, 4)
        mine = [p for p in tree[1:] if procfs.group(p) == made.pid]
        assert mine
        os.kill(made.pid, signal.SIGKILL)
        os.waitid(os.P_PID, made.pid, os.WEXITED | os.WNOWAIT)
        assert any(procfs.started(p) > 0 for p in mine)
        assert reap(made.pid, Path("/nowhere")) == 128 + signal.SIGKILL
        until(lambda: all(procfs.started(p) < 0 for p in mine), "the group has ended")
        for stray in set(tree) - set(mine) - {made.pid}:
            os.kill(stray, signal.SIGKILL)


def test_nobody_is_signalled_for_a_worker_that_was_not_forked_yet() -> None:
    """0 would be our own group: this test would be the one to stop."""
    Stop(0).begin()
    send(0, signal.SIGKILL)
    assert Path("/proc/self").exists()


def test_who_is_gone_is_stopped() -> None:
    with child("print('up', flush=True); input()", session=True) as made:
        made.kill()
        made.wait()
        assert stop(made.pid).strays == []
