"""A kernel in an OS process of its own, with real workers: what the fault tests kill.

Everything it starts carries LLMOS_TEST_MARK in its environment, so that what is left at the end
can be found whoever its parent is by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmos.kernel import protocol as p
from llmos.kernel.errors import from_wire
from llmos.kernel.wire import Unpacker, pack
from support.live import short_home

# A zygote imports torch and transformers first: 5 s alone, several times that in company.
LIMIT_S = 120.0


def wait_until(true: Callable[[], Any], what: str, within_s: float = LIMIT_S) -> Any:
    """Look often, give up late. Returns what `true` gave."""
    deadline = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited {within_s:.0f} s for: {what}"
        time.sleep(0.01)
    return found


class Machine:
    """A home and the kernel that serves it. `boot` may be called again after a kill."""

    def __init__(self, *arguments: str) -> None:
        self.home = short_home()
        self.arguments = arguments
        self.python = sys.executable
        self.mark = secrets.token_hex(8)
        self.process: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        with (self.home / "kernel.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-P", "-m", "llmos.kernel.main", "--home", str(self.home),
                 *self.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "LLMOS_TEST_MARK": self.mark},
            )  # fmt: skip
        wait_until(self.answers, f"the kernel to answer; its log: {self.log()}")

    def log(self) -> str:
        return (self.home / "kernel.log").read_text()

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the kernel ended: {self.log()}"
        try:
            self.ask(p.Ping())
        except OSError:
            return False
        return True

    def ask(self, request: p.Request) -> Any:
        return self.collect(request)[1]

    def collect(self, request: p.Request) -> tuple[list[Any], Any]:
        """The items of a call, and its answer; raises the error that came instead."""
        items: list[Any] = []
        unpacker = Unpacker()
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(LIMIT_S)
            line.connect(str(self.home / "kernel.sock"))
            line.sendall(pack(p.encode(request, 1)))
            while data := line.recv(1 << 16):
                for message in unpacker.feed(data):
                    if "error" in message:
                        raise from_wire(message["error"])
                    if "ok" in message:
                        return items, message["ok"]
                    items.append(message["item"])
        raise ConnectionError("the kernel hung up")

    def submit(self, program: str = "spin", **args: Any) -> int:
        options = {
            k: args.pop(k) for k in ("restart", "cls", "attached", "env", "cwd") if k in args
        }
        return int(self.ask(p.Submit(program, args, **options))["pid"])

    def row(self, pid: int) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(p.Ps(pid=pid))[0]
        return found

    def step(self, pid: int) -> int:
        return int(self.row(pid)["progress"].get("step", 0))

    def until_step(self, pid: int, step: int) -> None:
        wait_until(lambda: self.step(pid) >= step, f"step {step} of process {pid}")

    def until_state(self, pid: int, *states: str) -> dict[str, Any]:
        wait_until(lambda: self.row(pid)["state"] in states, f"process {pid} to be {states}")
        return self.row(pid)

    def end_of(self, pid: int) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask(p.Wait(pid, LIMIT_S))
        return answer

    def records(self, pid: int, kind: str = "progress") -> list[dict[str, Any]]:
        items, _ = self.collect(p.Attach(pid, follow=False))
        return [i["record"] for i in items if i["record"]["kind"] == kind]

    def worker_of(self, pid: int) -> int:
        """The OS pid of a process's worker, from the system itself."""
        worker_id = self.row(pid)["worker_id"]
        for os_pid in self.os_pids():
            if has_socket(os_pid, self.home / "w" / worker_id / "sock"):
                return os_pid
        raise AssertionError(f"process {pid} has no worker")

    @property
    def zygote(self) -> int:
        return int(self.ask(p.Status())["zygote"]["os_pid"])

    def zygote_is_ready(self) -> bool:
        return bool(self.ask(p.Status())["zygote"]["state"] == "ready")

    def kill_kernel(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def shutdown(self) -> None:
        self.ask(p.Shutdown())
        assert self.process is not None
        assert self.process.wait(LIMIT_S) == 0
        self.process = None

    def os_pids(self) -> list[int]:
        """Every OS process that this machine started, the kernel included."""
        mark = f"LLMOS_TEST_MARK={self.mark}".encode()
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
        return found

    def check_nobody_is_left(self) -> None:
        wait_until(lambda: not self.os_pids(), f"nobody to be left of {self._who()}", 15.0)

    def _who(self) -> dict[int, str]:
        who = {}
        for os_pid in self.os_pids():
            with contextlib.suppress(OSError):
                who[os_pid] = Path(f"/proc/{os_pid}/cmdline").read_text().replace("\0", " ")
        return who

    def dispose(self) -> None:
        """End what is left by force, and take the home away."""
        for os_pid in self.os_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(os_pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)


@contextlib.contextmanager
def machine(*arguments: str, config: str = "") -> Iterator[Machine]:
    """A booted machine, which is shut down at the end and must leave nobody behind."""
    made = Machine(*arguments)
    try:
        if config:
            (made.home / "config.toml").write_text(config)
        made.boot()
        yield made
        if made.process is not None:
            made.shutdown()
        made.check_nobody_is_left()
    finally:
        made.dispose()


def has_socket(os_pid: int, path: Path) -> bool:
    """Does a process listen on this unix socket? By inode, as the system lists them."""
    inodes = {
        line.split()[6]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if line.endswith(f" {path}")
    }
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{os_pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{os_pid}/fd/{number}")
                if target.startswith("socket:[") and target[8:-1] in inodes:
                    return True
    return False


def is_stopped(os_pid: int) -> bool:
    text = Path(f"/proc/{os_pid}/stat").read_text()
    return text[text.rindex(")") + 2] in "Tt"


def last_words(home: Path, pid: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "procs" / str(pid) / "result.json").read_text())
    return found
