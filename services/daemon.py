"""A service whose work is done by an OS process of its own, which outlives the kernel.

A service ends with its kernel, and serves one call at a time: right for a registry, wrong for what
has connections of its own to the world. A Daemon is split in two. The service is a small process as
any other: the kernel starts it, restarts it, lists it, stops it. It starts the server, or finds one
that an earlier kernel's service has left, and holds a line to it as long as it lives:

    kernel ── service (host.py) ── HOME/NAME/sock ── server ── the world

When the kernel is killed the service goes with it and the server stays; the service of the next
kernel takes it over, and nobody outside has noticed. A server that no service holds for
`ALONE_S` ends by itself. One that dies takes its service with it, which the kernel starts anew.

The server's side of the line is `services/daemon_post.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from llmos.kernel.errors import LlmosError, ServiceFailed, TimedOut, from_wire
from llmos.services.base import Service

# Before the kernel kills the service itself (5 s after it was asked to end).
END_S = 4.0

ANSWER_S = 10.0


class Daemon(Service):
    """Base of services with a server. `module` is run as `python -P -m MODULE HOME FD`."""

    module: ClassVar[str]
    start_s: ClassVar[float] = 30.0  # the server must serve within this

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.folder = home / self.name
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._stopping = False
        self._asking = threading.Lock()
        self._line: socket.socket | None = None
        atexit.register(self.close)  # also when the service is asked to end while it starts
        self._line = self._find() or self._start()
        self._os_pid = _peer_of(self._line)
        self.about(str(self.ask("hello")["about"]))
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    # ---- what a subclass says ----

    def wanted(self) -> dict[str, Any]:
        """What a running server must be like to be taken over: compared with its `hello`."""
        return {}

    # ---- the line to the server ----

    def ask(self, what: str) -> dict[str, Any]:
        """One question to the server -> its answer. Raises ServiceFailed, TimedOut."""
        assert self._line is not None
        with self._asking:
            return _ask(self._line, what, self.name)

    def close(self) -> None:
        """Stop the server: asked first, killed when that takes too long."""
        if self._line is None or self._stopping:
            return
        self._stopping = True
        _end(self._os_pid)
        self._line.close()

    # ---- inside ----

    def _find(self) -> socket.socket | None:
        """The line to a server that an earlier service has left, if it is as it must be."""
        try:
            line = _dial(self.folder / "sock")
        except OSError:
            return None
        try:
            hello = _ask(line, "hello", self.name)
            if all(hello.get(key) == value for key, value in self.wanted().items()):
                return line
        except LlmosError as exc:
            sys.stdout.write(f"the server that was found is ended: {exc.message}\n")
        _end(_peer_of(line))
        line.close()
        return None

    def _start(self) -> socket.socket:
        """Start a server and wait until it serves. Raises what it could not start for."""
        read, write = os.pipe()
        try:
            server = subprocess.Popen(
                [sys.executable, "-P", "-m", self.module, str(self.home), str(write)],
                pass_fds=(write,),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(write)
        try:
            with open(read, "rb") as told:
                answer = self._first_words(told.fileno(), server)
            if "error" in answer:
                raise from_wire(answer["error"])
            return _dial(self.folder / "sock")
        except BaseException:
            server.kill()
            server.wait()
            raise

    def _first_words(self, pipe: int, server: subprocess.Popen[bytes]) -> dict[str, Any]:
        deadline, said = time.monotonic() + self.start_s, b""
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([pipe], [], [], left)[0]:
                break
            data = os.read(pipe, 1 << 16)
            if not data:
                break
            said += data
        if said:
            answer: dict[str, Any] = json.loads(said)
            return answer
        status = server.poll()
        how = f"took more than {self.start_s:g} s" if status is None else f"ended ({status})"
        raise ServiceFailed(
            f"the server of {self.name} did not start: it {how}",
            f"`llmos service logs {self.name}`",
        )

    def _watch(self) -> None:
        """In a thread: a server that has died takes its service along."""
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(self._os_pid)
            select.select([handle], [], [])
        if not self._stopping:
            self.give_up("lost its server: it died")


def _end(os_pid: int) -> None:
    """End a server; return when it is gone."""
    try:
        handle = os.pidfd_open(os_pid)
    except ProcessLookupError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], END_S)[0]:
                return
    except ProcessLookupError:
        return  # it has ended meanwhile
    finally:
        os.close(handle)


def _dial(path: Path) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.settimeout(ANSWER_S)
        line.connect(os.fspath(path))
    except OSError:
        line.close()
        raise
    return line


def _peer_of(line: socket.socket) -> int:
    raw = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(raw[0:4], sys.byteorder)


def _ask(line: socket.socket, what: str, name: str) -> dict[str, Any]:
    """A question and its answer are a line of JSON each."""
    try:
        line.sendall(json.dumps({"ask": what}).encode() + b"\n")
        said = b""
        while not said.endswith(b"\n"):
            data = line.recv(1 << 16)
            if not data:
                raise ServiceFailed(f"the server of {name} has hung up")
            said += data
        answer: dict[str, Any] = json.loads(said)
    except TimeoutError:
        raise TimedOut(f"the server of {name} did not answer in {ANSWER_S:g} s") from None
    except (OSError, ValueError) as exc:
        raise ServiceFailed(f"the server of {name} cannot be asked: {exc}") from None
    return answer
