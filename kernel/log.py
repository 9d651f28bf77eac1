"""The kernel's log: its stderr, which `llmos boot` sends to kernel.log."""

from __future__ import annotations

import sys
import time


def log(text: str) -> None:
    """A line in kernel.log (the kernel's stderr)."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    sys.stderr.flush()
