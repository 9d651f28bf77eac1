"""A command as a child of this process: its output as it comes, its end, and the end of its tree.

Whatever the command leaves behind is re-parented to this process (a subreaper), so that its tree is
known to the last leaf, daemons included. Knows nothing of llmos.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)

# One read of a pipe: half of what the system lets lie in it.
PIECE_BYTES = 32 * 1024

# How much of the end of stderr is kept, for the reason of a failure.
TAIL_BYTES = 4096


class Child:
    """Raises OSError when the command cannot be started."""

    def __init__(self, file: str, argv: list[str], cwd: str, env: dict[str, str]) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._process = subprocess.Popen(
            argv, executable=file, cwd=cwd, env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.os_pid = self._process.pid
        self.pidfd = os.pidfd_open(self.os_pid)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.pipes = {self._process.stdout.fileno(): 1, self._process.stderr.fileno(): 2}
        for fd in self.pipes:
            os.set_blocking(fd, False)
        self.error_tail = b""

    def read(self) -> Iterator[tuple[int, bytes]]:
        """What has been printed, at most one piece of each: (1 or 2, bytes)."""
        for fd, number in list(self.pipes.items()):
            try:
                data = os.read(fd, PIECE_BYTES)
            except BlockingIOError:
                continue
            if not data:
                del self.pipes[fd]  # closed at the other end: it would show as readable for ever
                continue
            if number == 2:
                self.error_tail = (self.error_tail + data)[-TAIL_BYTES:]
            yield number, data

    def status(self) -> int | None:
        """The exit status, 128 + n for signal n; None while it runs. Buries orphans, too."""
        self._bury_orphans()
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def _bury_orphans(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid == self.os_pid:
                return
            with contextlib.suppress(ChildProcessError):
                os.waitpid(found.si_pid, 0)

    def signal_tree(self, number: int) -> None:
        """Send a signal to the command and to all that it has started."""
        import psutil  # only when there is somebody to end

        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill_tree(self) -> None:
        """SIGKILL to all, until nobody is left: what is starting others is stopped first."""
        while self.has_children():
            self.signal_tree(signal.SIGSTOP)
            self.signal_tree(signal.SIGKILL)
            self._wait_for_one()

    def has_children(self) -> bool:
        """Is anybody left of the tree, the dead ones that nobody buried yet included?"""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def _wait_for_one(self) -> None:
        """Bury one of the dead."""
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            if found is not None and found.si_pid == self.os_pid:
                self._process.wait()
            elif found is not None:
                os.waitpid(found.si_pid, 0)

    def close(self) -> None:
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        os.close(self.pidfd)
