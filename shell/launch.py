"""Start a kernel in the background and see it end. Knows its command line, not its inside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llmos.kernel.errors import Busy, LlmosError, NoKernel, TimedOut
from llmos.shell.client import Client, Record
from llmos.shell.home import Home, prepare

# A kernel answers after 0.3 s; on a machine that is overloaded it may take a while.
BOOT_S = 30.0
_POLL_S = 0.005

# Kernels that this process started and that may still run: they are its children until it ends,
# and a child that has ended must be reaped to be gone (the interactive shell lives for days).
_started: list[subprocess.Popen[bytes]] = []


def kernel_command(
    home: Home,
    devices: Sequence[str],
    policy: str,
    batch_share: float | None = None,
    group: str = "",
) -> list[str]:
    """The command line of a kernel. -P: a file in the user's folder must not shadow a module."""
    command = [sys.executable, "-P", "-m", "llmos.kernel.main", "--home", os.fspath(home.path)]
    for device in devices:
        command += ["--device", device]
    if policy:
        command += ["--policy", policy]
    if batch_share is not None:
        command += ["--batch-share", str(batch_share)]
    if group:
        command += ["--group", group]
    return command


class Launch:
    """A kernel that is being started: begin, do something else, wait until it answers."""

    def __init__(
        self,
        home: Home,
        devices: Sequence[str] = (),
        policy: str = "",
        batch_share: float | None = None,
        group: str = "",
    ) -> None:
        self._home = home
        self.changed = prepare(home, group)
        self._log_start = home.log.stat().st_size if home.log.exists() else 0
        with home.log.open("ab") as log:
            self._process = subprocess.Popen(
                kernel_command(home, devices, policy, batch_share, group),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home.path,
                start_new_session=True,  # Ctrl-C and a closed terminal are not for the kernel
            )
        _started.append(self._process)

    def wait(self, timeout_s: float = BOOT_S) -> Record:
        """The status of the kernel once it answers. Raises Busy, LlmosError, TimedOut."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self._process.poll()
            status = running(self._home)
            if status is not None and status["kernel"]["os_pid"] == self._process.pid:
                return status
            if ended is not None:
                raise self._failure(status, ended)
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"the kernel did not answer within {timeout_s:.0f} s",
                    f"it is process {self._process.pid}; its log is {self._home.log}",
                )
            time.sleep(_POLL_S)

    def _failure(self, other: Record | None, ended: int) -> LlmosError:
        if other is not None:
            return already_running(self._home, other)
        said, hint = self._last_words()
        why = said or f"it ended with status {ended} and said nothing"
        return LlmosError(
            f"the kernel did not start: {why}", hint or f"its log is {self._home.log}"
        )

    def _last_words(self) -> tuple[str, str]:
        """The error that this kernel wrote, and its hint. Warnings and older boots are left out."""
        text = _tail(self._home.log, self._log_start)
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        marked = [i for i, line in enumerate(lines) if line.startswith("llmos")]
        if not marked:
            return (lines[-1].strip() if lines else ""), ""
        last = marked[-1]
        hint = lines[last + 1].strip() if last + 1 < len(lines) else ""
        return lines[last].partition(": ")[2] or lines[last], hint


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as f:
        f.seek(start)
        return f.read(64 * 1024).decode(errors="replace")


def running(home: Home) -> Record | None:
    """The status of the kernel that serves this home; None when there is none."""
    try:
        with Client(home.path, auto_boot=False) as client:
            return client.status()
    except NoKernel:
        return None


def already_running(home: Home, status: Record) -> Busy:
    return Busy(
        f"a kernel runs already for {home.path} (pid {status['kernel']['os_pid']})",
        "`llmos status` shows it, `llmos shutdown` ends it",
    )


def boot(home: Home, devices: Sequence[str] = (), policy: str = "") -> Record:
    """Start a kernel and wait until it answers. Raises Busy when one runs already."""
    found = running(home)
    if found is not None:
        raise already_running(home, found)
    return Launch(home, devices, policy).wait()


def wait_gone(os_pid: int, timeout_s: float) -> None:
    """Return when the OS process has ended. Raises TimedOut."""
    deadline = time.monotonic() + timeout_s
    while alive(os_pid):
        if time.monotonic() > deadline:
            raise TimedOut(f"the kernel (pid {os_pid}) is still there after {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def alive(os_pid: int) -> bool:
    """Is there such a process? One that has ended and waits for its parent does not count, but
    one of which a thread is left does: it still has its files, and its socket."""
    _started[:] = [child for child in _started if child.poll() is None]
    try:
        stat = Path(f"/proc/{os_pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat.rpartition(")")[2].split()
    return fields[0] != "Z" or int(fields[17]) > 1
