"""Bury a dead worker, and end what it has left behind.

Used by whoever is its parent: the zygote, or the kernel's driver when the zygote is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

# In the environment of a worker and of what it starts: the worker's folder.
WORKER_VARIABLE = "LLMOS_WORKER"


def reap(os_pid: int, folder: Path) -> int | None:
    """-> the exit status of a worker that has ended, 128 + n for signal n; None while it lives.

    Raises ChildProcessError when it is not our child. As long as it is not buried its number is
    nobody else's, so that its process group can be signalled without a doubt.
    """
    found = os.waitid(os.P_PID, os_pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os_pid, signal.SIGKILL)
    if found.si_code != os.CLD_EXITED:
        # Who has left its process group is in nobody's tree any more.
        signal_marked(folder, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(os_pid, 0)[1])
    return code if code >= 0 else 128 - code


def let_go(leader: int, folder: Path) -> None:
    """A worker that was held, its ranks and all that it has started go on."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGCONT)
    signal_marked(folder, signal.SIGCONT)


def signal_marked(folder: Path, number: int) -> None:
    """A signal to what a worker has started (not forked), by the mark in the environment."""
    mark = f"{WORKER_VARIABLE}={folder}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                os.kill(int(name), number)
