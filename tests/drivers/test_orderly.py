"""Who is asked to end does so, whichever of its threads takes the signal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from llmos.drivers.cpu import procfs

WAITS = """
import os, queue, sys, threading
from llmos.drivers.worker.orderly import on_term
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
asked = queue.SimpleQueue()
on_term(lambda: asked.put("stop"))
child = os.fork()
if not child:
    threading.Event().wait()
print("up", child, flush=True)
asked.get()
print("asked", flush=True)
sys.stdin.read()
print(os.waitpid(child, 0)[1])
"""

LIMIT_S = 20.0


class Waits:
    """The process of WAITS, and its child."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WAITS], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        word, child = self.line().split()
        assert word == "up"
        self.child = int(child)

    def line(self) -> str:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], LIMIT_S)
        assert readable, "it says nothing"
        return self.process.stdout.readline().rstrip("\n")

    def signal(self, *numbers: int) -> None:
        for number in numbers:
            os.killpg(self.process.pid, number)


@pytest.fixture
def waits() -> Iterator[Waits]:
    made = Waits()
    with made.process:
        yield made
        with contextlib.suppress(ProcessLookupError):
            made.signal(signal.SIGKILL)


@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.slow
def test_one_that_is_stopped_hears_it_when_it_goes_on(waits: Waits, attempt: int) -> None:
    waits.signal(signal.SIGSTOP)
    deadline = time.monotonic() + LIMIT_S
    while not procfs.is_stopped(waits.process.pid):
        assert time.monotonic() < deadline
    waits.signal(signal.SIGTERM, signal.SIGCONT)  # to its child, too: whose end asks nobody
    assert waits.line() == "asked"
    said, _ = waits.process.communicate("", LIMIT_S)
    assert (waits.process.returncode, said) == (0, f"{int(signal.SIGTERM)}\n")


@pytest.mark.slow
def test_who_is_asked_twice_ends_at_once(waits: Waits) -> None:
    os.kill(waits.process.pid, signal.SIGTERM)
    assert waits.line() == "asked"
    os.kill(waits.process.pid, signal.SIGTERM)
    assert waits.process.wait(LIMIT_S) == -signal.SIGKILL
