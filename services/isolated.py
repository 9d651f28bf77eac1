"""Import a plugin in a process of its own, to hear what it is.

    python -P -m llmos.services.isolated FD GROUP NAME MODULE:CLASS

writes {"ok": description} or {"error": text} to FD. Whatever the plugin does meanwhile (raise,
print, exit, hang) happens there; `describe` waits a limited time, and keeps the end of what was
printed: of one that raises that is its traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple

# An import takes milliseconds; one of torch, on a cold disk, seconds.
IMPORT_S = 20.0
MOST_BYTES = 4 * 1024**2  # of a description
DRAIN_S = 1.0  # for what it printed last
PRINTED_BYTES = 64 * 1024  # that are kept of what it prints

_PR_SET_PDEATHSIG = 1


class Described(NamedTuple):
    data: dict[str, Any] | None  # what it is; None when nobody knows
    error: str = ""  # why nobody knows, in one line
    printed: str = ""  # the end of what it printed


def describe(point: importlib.metadata.EntryPoint, limit_s: float = IMPORT_S) -> Described:
    """What `point` is, or why nobody knows."""
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llmos.services.isolated", str(write), point.group,
             point.name, point.value],
            pass_fds=(write,), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
        )  # fmt: skip
        os.close(write)
        printed = _Printed(process)
        said = _read(read, process, time.monotonic() + limit_s)
        with contextlib.suppress(ProcessLookupError):  # it may have ended, and left nobody
            os.killpg(process.pid, signal.SIGKILL)  # what it has started goes with it
        status = process.wait()
    finally:
        os.close(read)
    text = printed.end()
    if said is None:
        return Described(None, f"importing it took more than {limit_s:g} s", text)
    try:
        answer = json.loads(said)
        return Described(answer.get("ok"), str(answer.get("error", "")), text)
    except (ValueError, AttributeError):
        how = f"was killed by signal {-status}" if status < 0 else f"exit status {status}"
        return Described(None, f"importing it ended the process ({how})", text)


class _Printed:
    """The end of what a process prints, read as it comes: who prints without end is not held up."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._pipe, self._kept = process.stdout, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self._pipe.fileno(), 1 << 16):
            self._kept = (self._kept + data)[-PRINTED_BYTES:]

    def end(self) -> str:
        """All of it, once its process has ended."""
        self._thread.join(DRAIN_S)
        if not self._thread.is_alive():  # else somebody whom it has started, elsewhere, has it
            self._pipe.close()
        return self._kept.decode(errors="replace")


def _read(pipe: int, process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """What the child says; None when it takes too long.

    A child of the plugin's may hold the pipe open: the end of the process counts, too.
    """
    said = b""
    while (left := deadline - time.monotonic()) > 0 and len(said) < MOST_BYTES:
        ended = process.poll() is not None
        readable, _, _ = select.select([pipe], [], [], 0 if ended else min(left, 0.05))
        data = os.read(pipe, 1 << 16) if readable else b""
        said += data
        if (readable and not data) or (ended and not readable) or said.endswith(b"\n"):
            return said
    return None


def main() -> int:
    number, group, name, value = sys.argv[1:5]
    from llmos.services.manifest import GROUPS

    end_with_parent()
    os.set_inheritable(int(number), False)
    try:
        answer = {"ok": GROUPS[group](importlib.metadata.EntryPoint(name, value, group))}
        text = json.dumps(answer)
    except (Exception, SystemExit) as exc:  # noqa: BLE001  whatever a plugin raises
        _explain(exc)
        lines = f"{type(exc).__name__}: {exc}".splitlines()
        text = json.dumps({"error": lines[0][:500]})
    _write(int(number), text.encode() + b"\n")
    os._exit(0)  # a thread of the plugin's, or its exit handlers, must not keep us


def _explain(exc: BaseException) -> None:
    """Its traceback to whoever reads what is printed, from where the plugin begins."""
    where = exc.__traceback__
    while where is not None and _is_on_the_way(where.tb_frame.f_code.co_filename):
        where = where.tb_next
    shown = traceback.format_exception(type(exc), exc, where)
    with contextlib.suppress(Exception):  # it may have closed or replaced the streams
        sys.stderr.write("".join(shown))
        sys.stderr.flush()


def _is_on_the_way(path: str) -> bool:
    """Is this code what leads to a plugin's?"""
    ours = os.path.dirname(__file__), os.path.dirname(importlib.__file__), "<frozen importlib"
    return path.startswith(ours)


def end_with_parent() -> None:
    """Whoever started this process is gone: then so is this process, whatever it is doing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _write(number: int, data: bytes) -> None:
    while data:
        data = data[os.write(number, data) :]


if __name__ == "__main__":
    raise SystemExit(main())
