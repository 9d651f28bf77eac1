"""The kernel's log: its stderr, which `llmos boot` sends to kernel.log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

# Who else is told of each text: the structured log, while there is a kernel.
listeners: list[Callable[[str], None]] = []


def log(text: str) -> None:
    """A line in kernel.log (the kernel's stderr), and in what `llmos dmesg` shows."""
    for listener in listeners:
        listener(text)
    with contextlib.suppress(OSError, ValueError):  # on a full disk this line is lost, no more
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        sys.stderr.flush()
