"""Import a plugin in a process of its own, to hear what it is.

    python -P -m llmos.services.isolated FD GROUP NAME MODULE:CLASS

writes {"ok": description} or {"error": text} to FD. Whatever the plugin does meanwhile (raise,
print, exit, hang) happens there; `describe` waits a limited time.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

# An import takes milliseconds; one of torch, on a cold disk, seconds.
IMPORT_S = 20.0
MOST_BYTES = 4 * 1024**2  # of a description

_PR_SET_PDEATHSIG = 1


def describe(
    point: importlib.metadata.EntryPoint, limit_s: float = IMPORT_S
) -> tuple[dict[str, Any] | None, str]:
    """-> what `point` is, or why nobody knows."""
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llmos.services.isolated", str(write), point.group,
             point.name, point.value],
            pass_fds=(write,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip
        os.close(write)
        said = _read(read, process, time.monotonic() + limit_s)
        # What it has started, goes with it.
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    finally:
        os.close(read)
    if said is None:
        return None, f"importing it took more than {limit_s:g} s"
    try:
        answer = json.loads(said)
        return answer.get("ok"), str(answer.get("error", ""))
    except (ValueError, AttributeError):
        how = f"was killed by signal {-status}" if status < 0 else f"exit status {status}"
        return None, f"importing it ended the process ({how})"


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
        lines = f"{type(exc).__name__}: {exc}".splitlines()
        text = json.dumps({"error": lines[0][:500]})
    _write(int(number), text.encode() + b"\n")
    os._exit(0)  # a thread of the plugin's, or its exit handlers, must not keep us


def end_with_parent() -> None:
    """Whoever started this process is gone: then so is this process, whatever it is doing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _write(number: int, data: bytes) -> None:
    while data:
        data = data[os.write(number, data) :]


if __name__ == "__main__":
    raise SystemExit(main())
