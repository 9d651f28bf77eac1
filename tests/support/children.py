"""OS processes that a test starts to look at: a line of Python, up when it says so."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

LIMIT_S = 20.0


@contextlib.contextmanager
def child(code: str, session: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Run `code`, which prints a line when it is ready; its group ends with the block."""
    made = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=session,
    )  # fmt: skip
    try:
        assert made.stdout is not None
        made.said = made.stdout.readline().decode().strip()  # type: ignore[attr-defined]
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(made.pid, 9) if session else made.kill()
        made.communicate()


def until(true: Callable[[], Any], what: str) -> Any:
    """Look often, give up late -> what was true."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s for: {what}"
        time.sleep(0.001)
    return found
