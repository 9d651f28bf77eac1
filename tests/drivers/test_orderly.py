"""Who is asked to end does so, whichever of its threads takes the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llmos.drivers.cpu import procfs

WAITS = """
import queue, sys, threading
from llmos.drivers.worker.orderly import on_term
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
asked = queue.SimpleQueue()
on_term(lambda: asked.put("stop"))
print("up", flush=True)
asked.get()
print("asked", flush=True)
sys.stdin.read()
"""

Process = subprocess.Popen[str]


@pytest.fixture
def waits() -> Iterator[Process]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", WAITS], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    with process:
        yield process
        process.kill()


def line(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.slow
def test_one_that_is_stopped_hears_it_when_it_goes_on(waits: Process, attempt: int) -> None:
    os.kill(waits.pid, signal.SIGSTOP)
    while not procfs.is_stopped(waits.pid):
        pass
    os.kill(waits.pid, signal.SIGTERM)
    os.kill(waits.pid, signal.SIGCONT)
    assert line(waits) == "asked\n"
    waits.communicate("")
    assert waits.returncode == 0


@pytest.mark.slow
def test_who_is_asked_twice_ends_at_once(waits: Process) -> None:
    os.kill(waits.pid, signal.SIGTERM)
    assert line(waits) == "asked\n"
    os.kill(waits.pid, signal.SIGTERM)
    assert waits.wait() == 128 + signal.SIGTERM
