"""The shell against a real kernel with a simulated device: no torch, a command in milliseconds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel.errors import IllegalMove
from llmos.shell.client import Client
from llmos.shell.context import Context
from llmos.shell.home import Home
from llmos.shell.launch import alive, boot, wait_gone
from llmos.shell.main import guarded

DEVICE = "sim0:memory=1GiB"
LIMIT_S = 20.0


@dataclass
class Ran:
    """What a command line did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Site:
    """A home with a kernel that may be booted, killed and booted again."""

    def __init__(self) -> None:
        # Short: sockets lie deep inside, and their paths have a limit.
        self.home = Home(Path(tempfile.mkdtemp(prefix="ls", dir="/tmp")))
        self.os_pid = 0
        toy = self.home.path / "models" / "toy"
        toy.mkdir(parents=True)
        (toy / "config.json").write_text('{"model_type": "llama"}')

    def boot(self) -> None:
        self.os_pid = int(boot(self.home, [DEVICE])["kernel"]["os_pid"])

    def kill(self) -> None:
        """As a power cut for the kernel; the simulated workers lie inside it."""
        os.kill(self.os_pid, signal.SIGKILL)
        wait_gone(self.os_pid, LIMIT_S)

    def end(self) -> None:
        if self.os_pid and alive(self.os_pid):
            with Client(self.home.path) as client:
                client.shutdown()
            wait_gone(self.os_pid, LIMIT_S)
        shutil.rmtree(self.home.path)

    def client(self) -> Client:
        return Client(self.home.path)

    def spin(self, **options: Any) -> int:
        """Submit a `spin` -> its pid; options that are no field of `submit` are its arguments."""
        fields = {k: options.pop(k) for k in ("name", "nice", "cls") if k in options}
        with self.client() as client:
            return client.submit("spin", options, **fields)

    def process(self, pid: int) -> dict[str, Any]:
        with self.client() as client:
            return client.process(pid)

    def client_status(self) -> dict[str, Any]:
        with self.client() as client:
            return client.status()

    def clean(self) -> None:
        """No process of a user lives."""
        if self.os_pid and alive(self.os_pid):
            with self.client() as client:
                # Guests first: with their engine they would be gone before their turn.
                for p in sorted(client.ps(), key=lambda p: p["role"] != "guest"):
                    if p["role"] != "service":
                        with contextlib.suppress(IllegalMove):  # it has ended by itself
                            client.kill(p["pid"], 9)


class Shell:
    """Runs command lines in this process, as the console script would."""

    def __init__(self, home: Home, capture: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self._capture = capture

    def __call__(self, *words: str) -> Ran:
        self._capture.readouterr()
        status = guarded(list(words), Context(self.home))
        out, err = self._capture.readouterr()
        return Ran(status, out, err)

    def ok(self, *words: str) -> str:
        ran = self(*words)
        assert ran.status == 0, ran
        return ran.out


def until(true: Callable[[], Any], within_s: float = LIMIT_S) -> Any:
    """Look often, give up late -> what was true."""
    deadline = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)
    return found


def plain(text: str) -> str:
    """Without a terminal's escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
