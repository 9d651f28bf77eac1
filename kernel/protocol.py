"""The calls of the kernel: what a client may ask, as frozen dataclasses.

A request on the wire is {"id": n, "call": NAME, "args": {...}}; it is answered by
{"id": n, "ok": VALUE} or {"id": n, "error": {"code", "message", "hint"}}. A call that
streams sends {"id": n, "item": ...} any number of times before that; {"id": n, "cancel": true}
from the client ends it early. Values are plain (dict, list, str, int, float, bool, None).

Rules: names and types never change; a new field has a default; a field that is not known is
refused by name (nothing is dropped silently); old bytes decode for ever.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints

from llmos.kernel.errors import BadArgument, ProtocolError

VERSION = 1

# Nobody nests arguments so deep; what prints, packs or walks them may recurse.
MAX_DEPTH = 32
_PLAIN = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer at once with nothing: measures the round trip."""


@dataclass(frozen=True, slots=True)
class Status:
    """-> {kernel: {os_pid uptime_s version home policy}, devices: [...], zygote: {...}, ...}"""


@dataclass(frozen=True, slots=True)
class Ps:
    """-> [process...]: the live ones, with `all` every one that is kept."""

    all: bool = False
    pid: int = 0  # only this one (ended or not); NoSuchProcess when there is none


@dataclass(frozen=True, slots=True)
class Mem:
    """-> [device...]: the books of memory, one object a device."""


@dataclass(frozen=True, slots=True)
class Explain:
    """-> {process, reason, queue_place, story: [{at what why}...], advice: [...], ...}"""

    pid: int


@dataclass(frozen=True, slots=True)
class Programs:
    """-> the manifest: {programs: {name: schema}, services, sources, optimizers, errors, broken}.

    It may be that of the last boot; with `checked` it is that of what is installed now.
    """

    checked: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a program -> {pid}. With `dry_run` nothing runs -> {footprint, device, ...}."""

    program: str
    args: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    nice: int = 0
    cls: str = ""  # interactive, batch or idle; empty: the program's own
    device: str = ""  # empty: the kernel chooses
    cwd: str = ""
    env: dict[str, str] = field(default_factory=dict)
    attached: bool = False  # kill the process when the client's connection goes
    restart: str = "no"  # no, on-failure, on-failure:N or always
    hang_s: float | None = None  # without a sign of life it hangs after so long; 0: never
    deadline_s: float = 0.0  # be done in so many seconds from now; 0: whenever
    dry_run: bool = False
    any_size: bool = False  # with dry_run: answer also what no device here could hold
    user: str = ""  # run as this user of the machine; only root's kernel for a group can


@dataclass(frozen=True, slots=True)
class Kill:
    """Send a signal -> {pid, state, exit_status}; answers when it took effect.

    STOP (19) and CONT (18) are `pause` and `resume`; any other signal ends the process with
    exit status 128 + signal.
    """

    pid: int
    signal: int = 15


@dataclass(frozen=True, slots=True)
class Renice:
    """-> {pid, nice, class, deadline_at}. Lower is more important, -20...19.

    What is not given stays. `deadline_s` counts from now; 0 takes a deadline away.
    """

    pid: int
    nice: int | None = None
    cls: str | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Take the device from a process until `resume` -> {pid, state, freed_bytes, seconds}.

    Its memory stays, unless `release`: then it is checkpointed or moved to the host, and the
    answer comes when the device reports the memory free.
    """

    pid: int
    release: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    pid: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Have a training write a checkpoint now -> {pid, folder, step}."""

    pid: int


@dataclass(frozen=True, slots=True)
class Wait:
    """-> {pid, exit_status, reason, result} when the process has ended."""

    pid: int
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Attach:
    """Stream the records of a process from `offset` (bytes) -> items {offset, record}.

    Each item's `offset` is where the next record begins: a client that comes back gives it
    and misses nothing. With `follow` it goes on until the process has ended and answers
    what Wait does; without, it stops at the last record and answers {offset}. With `own` the
    process ends with this connection: who submitted it as attached comes back for it so. With
    `at_end` nothing is sent before the process has ended, and then all: for who needs it whole.
    """

    pid: int
    offset: int = 0
    follow: bool = True
    own: bool = False
    at_end: bool = False


@dataclass(frozen=True, slots=True)
class Logs:
    """Stream what the process printed -> items {offset, data: bytes}. As Attach."""

    pid: int
    offset: int = 0
    tail: int = -1  # with n >= 0 begin at the last n lines
    follow: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Give input to a process that waits for it (the next turn of a chat) -> {pid}.

    What is given twice with the same `key` is taken once: a client whose kernel died before it
    answered may ask again.
    """

    pid: int
    message: dict[str, Any]
    key: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """Call a service ("models.ls") -> what it returns."""

    method: str
    args: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Services:
    """`ls` -> [{name state about why next_start_at pid os_pid restarts since memory_bytes ...}].

    `start`, `stop`, `restart`, `enable` (start it at boot, too), `disable` NAME -> {name}, when it
    took effect. `reload` looks for what was installed, removed or changed, and starts, stops and
    restarts services accordingly -> {added, removed, changed, broken}.
    """

    action: str = "ls"
    name: str = ""


@dataclass(frozen=True, slots=True)
class Events:
    """The kernel's own record of decisions -> [{seq at what pid why ...}], after `since`.

    `what` is one of granted, preempted, slice-ended, held, started, ready, exited, checkpoint, ...
    """

    since: int = 0


@dataclass(frozen=True, slots=True)
class Dmesg:
    """Stream the kernel's own log -> items {offset, line}, oldest first.

    A line has seq, at, level (debug, info, warning, error), what, pid, why, by and cause: the
    number that it has in common with all that the same thing set off. `since` is a line's number,
    `tail` (0 and more) how many of the last to begin with.
    """

    since: int = 0
    pid: int = 0
    cause: int = 0
    level: str = "info"
    tail: int = -1
    follow: bool = False


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Checkpoint and stop every worker, then end -> {stopped: n, checkpoints: n}."""


Request = (
    Ping | Status | Ps | Mem | Explain | Programs | Submit | Kill | Renice | Pause | Resume
    | Checkpoint | Wait | Attach | Logs | Send | Call | Services | Events | Dmesg | Shutdown
)  # fmt: skip

REQUESTS: dict[str, type[Any]] = {cls.__name__.lower(): cls for cls in get_args(Request)}
STREAMING = frozenset({"attach", "logs", "dmesg"})


def encode(request: Request, request_id: int) -> dict[str, Any]:
    """The wire form of a request; fields that have their default value are left out."""
    args = {
        f.name: getattr(request, f.name)
        for f in dataclasses.fields(request)
        if getattr(request, f.name) != _default(f)
    }
    return {"id": request_id, "call": type(request).__name__.lower(), "args": args}


def decode(message: Any) -> tuple[int, Request]:
    """Check a request and build it. ProtocolError: not a request; BadArgument: a wrong field."""
    if not isinstance(message, dict) or not isinstance(message.get("id"), int):
        raise ProtocolError("a request is a map with an integer `id`")
    if not _is_plain(message):
        raise ProtocolError(f"a request is plain maps, lists, texts and numbers, {MAX_DEPTH} deep")
    name, args = message.get("call"), message.get("args", {})
    cls = REQUESTS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise BadArgument(f"there is no call {name!r}", f"calls: {', '.join(sorted(REQUESTS))}")
    if not isinstance(args, dict):
        raise ProtocolError("`args` of a request is a map")
    checks = _CHECKS[cls]
    for key, value in args.items():
        if key not in checks:
            raise BadArgument(
                f"{name} has no field {key!r}", f"it has {', '.join(checks) or 'none'}"
            )
        if not _is(value, checks[key]):
            raise BadArgument(f"{name}: {key} is {_show(checks[key])}, not {value!r}"[:500])
    try:
        return message["id"], cls(**args)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in args and _required(f)]
        raise BadArgument(f"{name} needs {', '.join(missing)}") from None


def _is_plain(value: Any) -> bool:
    """Only what MessagePack has without extensions, and not nested too deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if not all(isinstance(key, _PLAIN) for key in item):
                    return False
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif not isinstance(item, _PLAIN):
                return False
        if not inner:
            return True
        level = inner
    return False


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _required(f: dataclasses.Field[Any]) -> bool:
    return _default(f) is dataclasses.MISSING


def _is(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, h) for h in get_args(hint))
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(k, str) for k in value)
    if hint is float:
        # NaN compares with nothing: in a heap of timers it would hide the others.
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if hint is int:  # as wide as a file offset
        return isinstance(value, int) and not isinstance(value, bool) and -_WIDE <= value < _WIDE
    return isinstance(value, hint)


def _show(hint: Any) -> str:
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("nothing" if h is type(None) else _show(h) for h in get_args(hint))
    return names.get(hint, "a map" if get_origin(hint) is dict else str(hint))


_WIDE = 1 << 63
_CHECKS: dict[type[Any], dict[str, Any]] = {cls: get_type_hints(cls) for cls in REQUESTS.values()}
