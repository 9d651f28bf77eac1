"""The host of one service: an OS process that serves the service's calls to the kernel.

    python -P -m llmos.services.host FD HOME NAME MODULE:CLASS MEMORY_BYTES

FD is one end of a socket pair whose other end is the kernel's; when the kernel goes, so does the
host, whatever it is doing (services keep what they know on disk). One call at a time: the kernel
sends the next when this one is answered. A SIGTERM lets a call that is being served end first;
whoever sent it kills the host when that takes too long.

On a machine of several users a service with `as_caller` serves each call of another user in a child
that has become that user. The line stays with the host, which passes the child's calls and its
answer on: what the child could do with it, its user could.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import itertools
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from llmos.kernel.drop import become
from llmos.kernel.errors import (
    BadArgument,
    LlmosError,
    NotAllowed,
    ProtocolError,
    ServiceFailed,
    from_wire,
)
from llmos.kernel.wire import MAX_FRAME_BYTES, Unpacker, pack
from llmos.services.base import Service, invoke
from llmos.services.isolated import end_with_parent

MIB = 1024**2

# The limit in force counts memory that is reserved, too: stacks of threads, arenas of malloc. The
# kernel looks at what is really used, about every second.
RESERVED_BYTES = 256 * MIB

EXIT_FAILED = 1

TOLD_CHARS = 2000  # of a message that a plugin made


class Ended(BaseException):
    """Somebody asked this process to end before it could serve."""


class Line:
    """The connection to the kernel."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unpacker = Unpacker()
        self._messages: deque[dict[str, Any]] = deque()
        self._numbers = itertools.count(1)
        self._thread = threading.get_ident()
        self._writing = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        self.send_packed(pack(message))

    def close(self) -> None:
        self._connection.close()

    def send_packed(self, frame: bytes) -> None:
        with self._writing:  # a thread of the service's may say something, too
            self._connection.sendall(frame)

    def next(self) -> dict[str, Any] | None:
        """The next message; None when the kernel is gone."""
        while not self._messages:
            data = self._connection.recv(1 << 16)
            if not data:
                return None
            self._messages.extend(self._unpacker.feed(data))
        return self._messages.popleft()

    def wait(self, woken: int) -> bool:
        """Wait for a message or for the descriptor `woken` -> is there a message to read?"""
        if self._messages:
            return True
        line = self._connection.fileno()
        ready, _, _ = select.select([line, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
        return line in ready

    def call(self, method: str, arguments: dict[str, Any], limit_s: float | None) -> Any:
        """Call another service and wait for its answer (llmos.services.base.Caller)."""
        if threading.get_ident() != self._thread:
            raise ServiceFailed(f"{method} was called from another thread than the service's own")
        try:
            answer = self.pass_on(method, arguments, limit_s)
        except TypeError as exc:
            raise BadArgument(f"{method}: an argument cannot be sent: {exc}") from None
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer.get("ok")

    def pass_on(
        self, method: str, arguments: dict[str, Any], limit_s: float | None
    ) -> dict[str, Any]:
        """A call of ours, or of a child of ours -> the message that answers it."""
        number = next(self._numbers)
        message = {"k": "call", "id": number, "method": method, "args": arguments}
        self.send(message if limit_s is None else {**message, "limit_s": float(limit_s)})
        while (answer := self.next()) is not None:
            if answer["k"] == "answer" and answer["id"] == number:
                return answer  # in a constructor the kernel's hello comes first
        raise ServiceFailed(f"the kernel has gone while {method} was called")


class Host:
    """Serves one service until the kernel is gone or somebody wants it to end."""

    def __init__(self, line: Line, name: str, memory_bytes: int) -> None:
        self._line = line
        self._name = name
        self._memory_bytes = memory_bytes
        self._started = self._ending = False
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGTERM, self._asked_to_end)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def _asked_to_end(self, number: int, frame: FrameType | None) -> None:
        self._ending = True
        if not self._started:
            raise Ended

    def start(self, home: Path, entry: str) -> Service:
        """Import and make the service; what goes wrong is the last word of this process."""
        try:
            module, _, attribute = entry.partition(":")
            cls = getattr(importlib.import_module(module), attribute)
            service: Service = cls(home)
            keep_within(self._memory_bytes)
            return service
        except LlmosError as exc:
            self.give_up(f"cannot start: {exc.message}" + (f" ({exc.hint})" if exc.hint else ""))
        except (Exception, SystemExit) as exc:  # noqa: BLE001  whatever a plugin raises
            traceback.print_exc()
            self.give_up(f"cannot start: {told(exc)}")

    def serve(self, service: Service) -> None:
        """A call that crossed the wish to end is served, too."""
        self._started = True
        while True:
            if not self._line.wait(self._woken):
                if self._ending:
                    return
                continue  # a signal of the plugin's own
            message = self._line.next()
            if message is None:
                return
            if message["k"] == "call":
                self._line.send_packed(self.answer_to(service, message))
            if self._ending:
                return

    def answer_to(self, service: Service, message: dict[str, Any]) -> bytes:
        """The frame for whoever calls; `user` is set when that is not who runs the kernel."""
        user = message.get("user")
        if user is None or not service.as_caller:
            return self.answer(service, message)
        ours, theirs = socket.socketpair()
        sys.stdout.flush()  # or the child would say it again
        parent, child = os.getpid(), os.fork()
        if child == 0:
            ours.close()
            self._line.close()
            self._line = Line(theirs)
            self._serve_as(user, parent, service, message)
        theirs.close()
        line = Line(ours)
        try:
            return self._answer_of(child, line, message)
        finally:
            line.close()

    def _serve_as(
        self, user: dict[str, Any], parent: int, service: Service, message: dict[str, Any]
    ) -> NoReturn:
        """In the child: become the caller, then answer this one call."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            become(user)
            end_with_parent()  # becoming somebody else undoes it
            if os.getppid() == parent:
                Service.caller = self._line.call
                frame = self.answer(service, message)
                sys.stdout.flush()
                self._line.send_packed(frame)
            os._exit(0)
        except BaseException:  # noqa: BLE001  nothing of it may go on as a second host
            traceback.print_exc()
        finally:
            os._exit(EXIT_FAILED)

    def _answer_of(self, child: int, line: Line, message: dict[str, Any]) -> bytes:
        """Pass on what the child calls, until it answers or ends. It is its user's: what it says
        is looked at, and nothing of it but an answer to this call goes to the kernel."""
        number, why = message["id"], ""
        try:
            while (said := line.next()) is not None and said["k"] == "call":
                answer = self._line.pass_on(said["method"], said["args"], said.get("limit_s"))
                line.send({**answer, "id": said["id"]})
            if said is not None and said["k"] == "answer":
                kind = "error" if "error" in said else "ok"
                return pack({"k": "answer", "id": number, kind: said[kind]})
            why = "" if said is None else str(said.get("reason", ""))[:TOLD_CHARS]
        except (KeyError, TypeError, ValueError, LlmosError, OSError) as exc:
            why = f"said what makes no sense: {told(exc)}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        error = ServiceFailed(
            f"the child of service {self._name} that served {message['method']} {why or killed}",
            f"`llmos service logs {self._name}` has the whole story",
        )
        return pack({"k": "answer", "id": number, "error": error.to_wire()})

    def answer(self, service: Service, message: dict[str, Any]) -> bytes:
        """One call -> the frame that answers it; what cannot be packed is an error too."""
        name, number = f"{self._name}.{message['method']}", message["id"]
        try:
            value = invoke(service, message["method"], message["args"])
            return packed(name, number, value)
        except LlmosError as exc:
            error = exc
        except PermissionError as exc:
            what = f"{name}: {exc.filename or 'this'}: {exc.strerror or 'not permitted'}"
            error = NotAllowed(what, "each changes what is his own")
        except (Exception, SystemExit) as exc:  # noqa: BLE001  that is its caller's answer
            traceback.print_exc()
            why = f"raised {told(exc)}"
            if isinstance(exc, MemoryError):
                limit = f"{self._memory_bytes // MIB} MiB of memory"
                if self._is_full():
                    self.give_up(f"outgrew its limit of {limit}")
                why += f" (the service may have {limit})"
            hint = f"`llmos service logs {self._name}` has the whole story"
            error = ServiceFailed(f"{name} {why}", hint)
        wire = {key: str(value)[:TOLD_CHARS] for key, value in error.to_wire().items()}
        return pack({"k": "answer", "id": number, "error": wire})

    def about(self, text: str) -> None:
        """Tell what the service is at (llmos.services.base.Teller)."""
        with contextlib.suppress(OSError):  # the kernel has gone: so will this process
            self._line.send({"k": "about", "text": text})

    def give_up(self, why: str) -> NoReturn:
        """End at once, and say why: the kernel tells the callers, and starts another."""
        with contextlib.suppress(OSError):
            self._line.send({"k": "done", "status": EXIT_FAILED, "reason": why, "result": {}})
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILED)

    def _is_full(self) -> bool:
        """Is it memory that it holds, or was it one request out of all proportion?"""
        return resident_bytes() > self._memory_bytes // 2


def packed(name: str, number: int, value: Any) -> bytes:
    """The frame of an answer. Raises ServiceFailed where there can be none."""
    try:
        return pack({"k": "answer", "id": number, "ok": value})
    except ProtocolError:
        why = f"more than {MAX_FRAME_BYTES // MIB} MiB"
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        why = f"what cannot be sent ({told(exc)})"
    raise ServiceFailed(
        f"{name} returned {why}",
        "plain values can be sent: map, list, text, bytes, number, true, false, None",
    )


def told(exc: BaseException) -> str:
    """An exception in one line."""
    try:
        text = f"{type(exc).__name__}: {exc}"
    except Exception:  # noqa: BLE001  its own __str__ is the plugin's code, too
        text = type(exc).__name__
    return text.strip().splitlines()[0].removesuffix(":")[:300]


def keep_within(memory_bytes: int) -> None:
    """From now on an allocation above the limit raises MemoryError; children inherit that."""
    data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = max(data, memory_bytes) + RESERVED_BYTES
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def resident_bytes() -> int:
    """Private memory in use: resident pages that no file backs."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()


def main() -> int:
    number, home, name, entry, memory_bytes = sys.argv[1:6]
    # A plugin's children must not hold the line open, nor its `print` write to it.
    os.set_inheritable(int(number), False)
    end_with_parent()
    faulthandler.enable()  # who crashes, or is aborted because it hangs, leaves a traceback
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    line = Line(socket.socket(fileno=int(number)))
    host = Host(line, name, int(memory_bytes))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # it is a log
    Service.caller, Service.teller = line.call, host
    hello = {"k": "hello", "proto": 1, "worker_id": name, "os_pid": os.getpid(), "loaded": True}
    line.send(hello)
    try:
        service = host.start(Path(home), entry)
        try:
            line.send({"k": "loaded"})
            host.serve(service)
        finally:
            service.close()
    except Ended:
        return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
