"""A program on a terminal of its own, driven as a person does: type, and read what appears."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from support.shell import plain

LIMIT_S = 60.0

# The terminal must be the controlling one, or Ctrl-C is nobody's signal.
_START = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, '-P', '-m', 'llmos.shell', *sys.argv[1:]])"
)


class Terminal:
    """`llmos` with these words, on a terminal of `columns` and 30 lines."""

    def __init__(self, home: Path, *words: str, columns: int = 80, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(columns)
        env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        env |= {"LLMOS_HOME": str(home), "TERM": "xterm", "LANG": "C.UTF-8", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *words],
            stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.output = b""
        self._seen = 0  # up to here the output has been expected

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, text: str) -> str:
        """Wait until this appears behind what was expected before -> what came up to it."""
        deadline = time.monotonic() + LIMIT_S
        while (at := self.shown.find(text, self._seen)) < 0:
            assert self._read(deadline), f"it ended without {text!r}:\n{self.shown}"
        came = self.shown[self._seen : at + len(text)]
        self._seen = at + len(text)
        return came

    def ended(self) -> int:
        """Read to the end -> the exit status."""
        deadline = time.monotonic() + LIMIT_S
        while self._read(deadline):
            pass
        return self.process.wait(LIMIT_S)

    @property
    def shown(self) -> str:
        """All that came, without styles and movements."""
        return plain(self.output.decode(errors="ignore")).replace("\r", "")

    def _read(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([self._ours], [], [], max(0.0, left))
        assert ready, f"nothing came:\n{self.shown}"
        try:
            data = os.read(self._ours, 65536)
        except OSError:
            return False  # the other end is closed
        self.output += data
        # A line editor asks where the cursor is, and waits for the answer.
        for _ in range(data.count(b"\x1b[6n")):
            self.type("\x1b[1;1R")
        return bool(data)
