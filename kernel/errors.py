"""Errors of llmos: whose fault it is, and what to do now.

LlmosError
├── BadRequest            the caller asked for something that makes no sense
│   ├── BadArgument       a flag or a field of a request is wrong
│   ├── BadInput          a file, a folder or a model cannot be used
│   ├── NoSuchProcess     no process has this pid
│   ├── NoSuchThing       no program, model, service or device has this name
│   ├── NotAllowed        the caller may not do this
│   └── IllegalMove       a process cannot go from its state to the one asked for
├── NoMemory              no device can ever hold what was asked for
├── OutOfMemory           a process wanted more than it was promised, and there was no more
├── Busy                  a limit is reached; later it may work
├── TimedOut              nobody answered in time
├── WorkerLost            a worker died: the cause lies outside the kernel
├── ServiceFailed         a service raised, hung or died while it was called
├── NoKernel              no kernel serves this home
├── HomeUnusable          the home folder cannot be used
├── ProtocolError         the bytes on a socket are not the protocol
└── KernelBug             an invariant does not hold: please report it

`code` goes over the wire; `hint` is the line the shell prints under the message.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LlmosError(Exception):
    """Base of all errors that are shown to a person: one line, and what to do."""

    code: ClassVar[str] = "error"
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


class BadRequest(LlmosError):
    code = "bad-request"


class BadArgument(BadRequest):
    code = "bad-argument"


class BadInput(BadRequest):
    code = "bad-input"


class NoSuchProcess(BadRequest):
    code = "no-such-process"
    default_hint = "`llmos ps -a` lists the processes that are known"


class NoSuchThing(BadRequest):
    code = "no-such-thing"


class NotAllowed(BadRequest):
    code = "not-allowed"


class IllegalMove(BadRequest):
    code = "illegal-move"


class NoMemory(LlmosError):
    code = "no-memory"
    default_hint = "`llmos mem` shows who holds the device"


class OutOfMemory(LlmosError):
    code = "out-of-memory"
    default_hint = "make it smaller (batch, context, width, dtype), or give it more to begin with"


class Busy(LlmosError):
    code = "busy"
    default_hint = "try again in a moment"


class TimedOut(LlmosError):
    code = "timed-out"


class WorkerLost(LlmosError):
    code = "worker-lost"


class ServiceFailed(LlmosError):
    code = "service-failed"
    default_hint = "`llmos service logs NAME` shows what it printed"


class NoKernel(LlmosError):
    code = "no-kernel"
    default_hint = "start one with `llmos boot`"


class HomeUnusable(LlmosError):
    code = "home-unusable"
    default_hint = "choose another folder with LLMOS_HOME"


class ProtocolError(LlmosError):
    code = "protocol-error"
    default_hint = "are both sides of the same version? `llmos status` shows the kernel's"


class KernelBug(LlmosError):
    code = "kernel-bug"
    default_hint = "please report it with the kernel's log (`$LLMOS_HOME/kernel.log`)"


def _tree(base: type[LlmosError]) -> list[type[LlmosError]]:
    return [base, *(c for sub in base.__subclasses__() for c in _tree(sub))]


BY_CODE: dict[str, type[LlmosError]] = {cls.code: cls for cls in _tree(LlmosError)}


def from_wire(error: dict[str, Any]) -> LlmosError:
    """The exception that `to_wire` came from; an unknown code gives the base class."""
    cls = BY_CODE.get(str(error.get("code")), LlmosError)
    return cls(str(error.get("message", "unknown error")), str(error.get("hint", "")))
