"""The Python API, blocking: one socket to the kernel, one method for each call.

    with Client() as llmos:
        for text in llmos.run("my-model", "Once upon a time", max_tokens=50):
            print(text, end="")

Knows no terminal. Not for use by several threads at once: give each thread a client.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from llmos.kernel import protocol as p
from llmos.kernel.errors import LlmosError, NoKernel, TimedOut
from llmos.shell import resolve
from llmos.shell.autoboot import boot_again
from llmos.shell.home import Home, check_socket_path
from llmos.shell.session import Answer, Failure, Item, Result, Session

Record = dict[str, Any]

# A kernel that was restarted is back in a second; a person may take longer to see to it.
RECONNECT_S = 60.0
REDIAL_S = 0.05

# The kernel answers these from its tables, in microseconds: silence means that it hangs.
ANSWER_S = 30.0
_RECEIVE_BYTES = 256 * 1024


class Client:
    """A connection to the kernel of a home. Raises NoKernel when none serves it."""

    def __init__(
        self,
        home: str | os.PathLike[str] | None = None,
        *,
        reconnect_s: float = RECONNECT_S,
        auto_boot: bool = True,
    ) -> None:
        """`reconnect_s`: how long streams wait for a kernel that went away; 0: not at all.

        `auto_boot`: start one that has died again where `llmos boot --auto-boot` said so.
        """
        self.home = Home.find(home)
        self.reconnect_s = reconnect_s
        self.on_lost: Callable[[], None] = lambda: None  # the kernel went, and is waited for
        self.connections = 0
        self._owned: set[int] = set()  # what was submitted as attached, here
        self._manifest: Record | None = None
        self._auto_boot = auto_boot
        check_socket_path(self.home)
        self._connect()

    def _connect(self) -> None:
        self._session = Session()
        self._answers: dict[int, deque[Answer]] = {}
        try:
            self._socket = _dial(self.home)
        except NoKernel:
            if not self._auto_boot or not boot_again(self.home):
                raise
            self._socket = _dial(self.home)
        self.connections += 1

    def reconnect(self, lost: int) -> None:
        """Connect again, unless connection number `lost` is not the last any more.

        Raises NoKernel when no kernel comes in `reconnect_s`.
        """
        if lost != self.connections:
            return
        self._socket.close()
        self.on_lost()
        deadline = time.monotonic() + self.reconnect_s
        while True:
            try:
                self._connect()
                return
            except NoKernel:
                if time.monotonic() > deadline:
                    raise
                time.sleep(REDIAL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; twice is harmless."""
        with contextlib.suppress(OSError):
            self._socket.setblocking(False)
            self._socket.send(self._session.bye())
        self._socket.close()

    # ---- the calls of kernel/protocol.py ----

    def ping(self) -> None:
        self.ask(p.Ping(), ANSWER_S)

    def status(self) -> Record:
        """{kernel: {os_pid uptime_s version ...}, devices: [...], ...}"""
        return dict(self.ask(p.Status(), ANSWER_S))

    def ps(self, all: bool = False) -> list[Record]:
        """The live processes; with `all` every one that is kept."""
        return list(self.ask(p.Ps(all=all), ANSWER_S))

    def process(self, pid: int) -> Record:
        """One process, ended or not. Raises NoSuchProcess."""
        return dict(self.ask(p.Ps(pid=pid), ANSWER_S)[0])

    def mem(self) -> list[Record]:
        """The books of memory, one object a device."""
        return list(self.ask(p.Mem(), ANSWER_S))

    def explain(self, pid: int) -> Record:
        """{process, reason, queue_place, story, advice}"""
        return dict(self.ask(p.Explain(pid), ANSWER_S))

    def programs(self, checked: bool = False) -> Record:
        """The manifest: {programs: {name: schema}, services, sources, optimizers, errors, broken}

        It may be that of the last boot; `checked`: that of what is installed now, asked again.
        """
        if self._manifest is None or checked:
            self._manifest = dict(self.ask(p.Programs(checked), ANSWER_S))
        return self._manifest

    def submit(
        self,
        program: str,
        args: Record | None = None,
        *,
        name: str = "",
        nice: int = 0,
        cls: str = "",
        device: str = "",
        attached: bool = False,
        restart: str = "no",
        deadline_s: float = 0.0,
        hang_s: float | None = None,
        user: str = "",
    ) -> int:
        """Run a program -> its pid. `attached`: it is killed when this connection goes.

        `user`: whose process it is; only root says so, to a kernel that serves a group.
        """
        request = self._submission(
            program, args, name=name, nice=nice, cls=cls, device=device,
            attached=attached, restart=restart, deadline_s=deadline_s, hang_s=hang_s, user=user,
        )  # fmt: skip
        pid = int(self.ask(request)["pid"])
        if attached:
            self._owned.add(pid)
        return pid

    def plan(
        self,
        program: str,
        args: Record | None = None,
        *,
        device: str = "",
        cls: str = "",
        any_size: bool = False,
    ) -> Record:
        """What a program would take -> {footprint, device, ...}; nothing runs.

        What can never fit is refused, unless `any_size` asks for its size all the same.
        """
        request = self._submission(
            program, args, device=device, cls=cls, dry_run=True, any_size=any_size
        )
        return dict(self.ask(request))

    def kill(self, pid: int, signal: int = 15) -> Record:
        """Returns when it took effect -> {pid, state, exit_status}"""
        return dict(self.ask(p.Kill(pid, signal)))

    def renice(
        self,
        pid: int,
        nice: int | None = None,
        *,
        cls: str | None = None,
        deadline_s: float | None = None,
    ) -> Record:
        """nice: -20 ... 19, lower is more important. `deadline_s` is from now, 0: none any more."""
        return dict(self.ask(p.Renice(pid, nice, cls, deadline_s)))

    def pause(self, pid: int, *, release: bool = False) -> Record:
        """-> {pid, state, freed_bytes, seconds}. With `release` its memory is given back."""
        return dict(self.ask(p.Pause(pid, release)))

    def resume(self, pid: int) -> Record:
        return dict(self.ask(p.Resume(pid)))

    def checkpoint(self, pid: int) -> Record:
        """Returns when the checkpoint is on disk -> {pid, folder, step}"""
        return dict(self.ask(p.Checkpoint(pid)))

    def wait(self, pid: int, timeout_s: float | None = None) -> Record:
        """-> {pid, exit_status, reason, result} when the process has ended. Raises TimedOut."""
        return dict(self.ask(p.Wait(pid, timeout_s)))

    def attach(
        self, pid: int, offset: int = 0, follow: bool = True, *, at_end: bool = False
    ) -> Stream:
        """The records of a process, from `offset` on; `at_end`: all, when it has ended."""
        own = pid in self._owned
        return Stream(self, p.Attach(pid, offset, follow, own, at_end), "record")

    def dmesg(
        self,
        since: int = 0,
        *,
        pid: int = 0,
        cause: int = 0,
        level: str = "info",
        tail: int = -1,
        follow: bool = False,
    ) -> Stream:
        """The kernel's own log: {seq at level what pid why by cause}, oldest first."""
        return Stream(self, p.Dmesg(since, pid, cause, level, tail, follow), "line")

    def logs(self, pid: int, offset: int = 0, tail: int = -1, follow: bool = False) -> Stream:
        """What a process printed, as pieces of bytes."""
        return Stream(self, p.Logs(pid, offset, tail, follow), "data")

    def send(self, pid: int, message: Record, key: str = "") -> Record:
        """Give input to a process that waits for it; twice with the same key is once."""
        return dict(self.ask(p.Send(pid, message, key)))

    def call(self, method: str, /, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Call a service: call("models.ls")."""
        return self.ask(p.Call(method, arguments, timeout_s))

    def services(self) -> list[Record]:
        return list(self.ask(p.Services(), ANSWER_S))

    def start_service(self, name: str) -> Record:
        """Returns when it serves -> {name, pid}. Raises ServiceFailed."""
        return dict(self.ask(p.Services("start", name)))

    def stop_service(self, name: str) -> Record:
        """Until `start_service`, or the next boot."""
        return dict(self.ask(p.Services("stop", name)))

    def restart_service(self, name: str) -> Record:
        """Returns when it serves again -> {name, pid}"""
        return dict(self.ask(p.Services("restart", name)))

    def enable_service(self, name: str) -> Record:
        """Start it, now and at each boot."""
        return dict(self.ask(p.Services("enable", name)))

    def disable_service(self, name: str) -> Record:
        """Stop it, and do not start it at boot."""
        return dict(self.ask(p.Services("disable", name)))

    def reload_services(self) -> Record:
        """Look for what was installed, changed or removed -> {added, removed, changed, broken}"""
        return dict(self.ask(p.Services("reload")))

    def events(self, since: int = 0) -> list[Record]:
        """The kernel's record of its decisions after number `since`."""
        return list(self.ask(p.Events(since), ANSWER_S))

    def shutdown(self) -> Record:
        """Checkpoint and stop every worker, then end -> {stopped, checkpoints}"""
        return dict(self.ask(p.Shutdown()))

    # ---- on top of them ----

    def run(self, model: str, prompt: str, **args: Any) -> Iterator[str]:
        """The continuation of `prompt`, piece by piece; leaving the iterator ends the process."""
        pid = self.submit("infer", {"model": model, "prompt": prompt, **args}, attached=True)
        stream = self.attach(pid)
        try:
            for record in stream:
                if record["kind"] == "text":
                    yield record["text"]
        finally:
            stream.close()
            if stream.result is None:
                self.kill(pid)
        check_ended(pid, stream.result)

    def ask(self, request: p.Request, timeout_s: float | None = None) -> Any:
        """Send any request and wait for its answer. Raises the error that the kernel gave."""
        request_id = self.begin(request)
        try:
            answer = self.next_answer(request_id, timeout_s)
        finally:
            self._answers.pop(request_id, None)
        if isinstance(answer, Failure):
            raise answer.error
        return answer.value

    # ---- for streams ----

    def forget(self, request: p.Request) -> None:
        """A process has been read to its end: nobody comes back for it."""
        if isinstance(request, p.Attach):
            self._owned.discard(request.pid)

    def begin(self, request: p.Request) -> int:
        """Send a request -> its id."""
        request_id, data = self._session.send(request)
        self._answers[request_id] = deque()
        try:
            self._socket.sendall(data)
        except OSError as exc:
            raise lost(self.home, exc) from None
        return request_id

    def next_answer(self, request_id: int, timeout_s: float | None = None) -> Answer:
        """The next answer to a request; answers to others wait for their turn."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waiting = self._answers[request_id]
        while not waiting:
            for answered, answer in self._session.receive(self._receive(deadline)):
                if answered in self._answers:
                    self._answers[answered].append(answer)
        answer = waiting.popleft()
        if not isinstance(answer, Item):
            self._answers.pop(request_id)
        return answer

    def cancel(self, request_id: int) -> None:
        """End a stream early; harmless when it has ended."""
        if self._answers.pop(request_id, None) is not None:
            try:
                self._socket.sendall(self._session.cancel(request_id))
            except OSError:
                return  # the connection is gone, and the stream with it

    def _receive(self, deadline: float | None) -> bytes:
        try:
            left = None if deadline is None else max(0.001, deadline - time.monotonic())
            self._socket.settimeout(left)
            data = self._socket.recv(_RECEIVE_BYTES)
        except TimeoutError:
            raise TimedOut(
                f"the kernel of {self.home.path} did not answer in time",
                f"does it hang? its log is {self.home.log}",
            ) from None
        except OSError as exc:
            raise lost(self.home, exc) from None
        if not data:
            raise lost(self.home)
        return data

    def _submission(self, program: str, args: Record | None, **options: Any) -> p.Submit:
        checked = program not in self.programs()["programs"]
        schema = resolve.schema_of(self.programs(checked), program)
        cwd = os.getcwd()
        return p.Submit(
            program=program,
            args=resolve.program_args(schema, args or {}, cwd),
            cwd=cwd,
            env=resolve.environment(schema),
            **options,
        )


def _dial(home: Home) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.connect(os.fspath(home.socket))
    except OSError as exc:
        made.close()
        raise no_kernel(home, exc) from None
    return made


class Stream(Iterator[Any]):
    """The items of a streaming call. `offset` is where the next one begins: give it to
    `attach` or `logs` to go on without a gap. `result` is what the call answered at its end. A
    kernel that goes is waited for, and the next one is asked for what follows.
    """

    def __init__(self, client: Client, request: p.Attach | p.Logs | p.Dmesg, key: str) -> None:
        self.offset = request.since if isinstance(request, p.Dmesg) else request.offset
        self.result: Record | None = None
        self._client = client
        self._key = key
        self._ended = False
        self._request = request
        self._begin()

    def _begin(self) -> None:
        self._connection = self._client.connections
        self._id = self._client.begin(from_offset(self._request, self.offset))

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout_s: float | None = None) -> Any:
        """The next item. Raises TimedOut when none comes in time, StopIteration at the end."""
        if self._ended:
            raise StopIteration
        match self._next_answer(timeout_s):
            case Item(value):
                self.offset = value["offset"]
                return value[self._key]
            case Result(value):
                self._ended = True
                self._client.forget(self._request)
                self.result = dict(value or {})
                self.offset = self.result.get("offset", self.offset)
                raise StopIteration
            case Failure(error):
                self._ended = True
                self._client.forget(self._request)
                raise error

    def _next_answer(self, timeout_s: float | None) -> Answer:
        """Over any number of kernels. Raises NoKernel when none comes back."""
        while True:
            try:
                self.reopen()
                return self._client.next_answer(self._id, timeout_s)
            except NoKernel:
                if not self._client.reconnect_s:
                    raise
                self._client.reconnect(self._connection)

    def reopen(self) -> None:
        """Ask the kernel that the client is connected to now, if that is another one."""
        if not self._ended and self._connection != self._client.connections:
            self._begin()

    def close(self) -> None:
        """Stop listening; the process goes on."""
        self._ended = True
        if self._connection == self._client.connections:
            self._client.cancel(self._id)


def from_offset(request: p.Attach | p.Logs | p.Dmesg, offset: int) -> p.Attach | p.Logs | p.Dmesg:
    """The same request for what comes behind `offset`."""
    if isinstance(request, p.Dmesg):
        return replace(request, since=offset) if offset else request
    return replace(request, offset=offset)


def no_kernel(home: Home, exc: OSError) -> LlmosError:
    """The error for a connection that could not be made."""
    if isinstance(exc, PermissionError):
        return NoKernel(
            f"the kernel of {home.path} belongs to another user",
            "if it serves a group, you are not in it; LLMOS_HOME chooses another home",
        )
    return NoKernel(f"no kernel runs for the home {home.path}")


def lost(home: Home, exc: OSError | None = None) -> NoKernel:
    """The error for a connection that broke."""
    why = f" ({exc.strerror})" if exc and exc.strerror else ""
    return NoKernel(
        f"the kernel of {home.path} closed the connection{why}",
        f"if it has ended, `llmos boot` starts it again; its log is {home.log}",
    )


def check_ended(pid: int, ended: Record | None) -> None:
    """Raise LlmosError when a process did not end well."""
    status = (ended or {}).get("exit_status")
    if ended is not None and status:
        why = ended.get("reason") or f"exit status {status}"
        raise LlmosError(f"process {pid} failed: {why}", f"`llmos logs {pid}` has what it printed")
