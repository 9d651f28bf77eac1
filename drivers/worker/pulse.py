"""Signs of life: does the main thread of this worker move?

A thread looks every few seconds where the main thread is. Another place than the last time is a
sign of life, which the kernel is told; the same place again and again is none, and neither is a
thread that a library keeps from looking because it holds the interpreter. One that waits for the
disk (state D) is alive; so is one that computes in a single call (a backward pass of minutes on a
CPU), but not for ever: half an hour of its own time.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections.abc import Callable
from pathlib import Path

LOOK_S = 3.0
BUSY_S = 1800.0

Place = tuple[tuple[int, int], ...]


class Pulse:
    """Calls `tell` about once in LOOK_S while the thread that made this moves."""

    def __init__(self, tell: Callable[[], None], look_s: float = LOOK_S) -> None:
        self._tell = tell
        self._look_s = look_s
        self._watched = threading.get_ident()
        self._stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")
        self._last: Place = ()
        self._worked, self._busy_s = -1, 0.0  # ticks of CPU, and how long in one place with them
        self._ended = threading.Event()
        # What ends a worker that hangs (SIGABRT) leaves in its log where it was.
        faulthandler.enable()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(self._look_s):
            here, (state, worked) = self._place(), self._stat_of()
            moved, works = here != self._last, worked != self._worked
            self._last, self._worked = here, worked
            self._busy_s = 0.0 if moved else self._busy_s + self._look_s
            if moved or state == "D" or (works and self._busy_s <= BUSY_S):
                self._tell()

    def _place(self) -> Place:
        """The calls on the main thread's stack, and how far each of them is."""
        frame = sys._current_frames().get(self._watched)
        found = []
        while frame is not None:
            found.append((id(frame), frame.f_lasti))
            frame = frame.f_back
        return tuple(found)

    def _stat_of(self) -> tuple[str, int]:
        """The state of the main thread, and how many ticks of CPU it has had."""
        try:
            fields = self._stat.read_text().rpartition(")")[2].split()
            return fields[0], int(fields[11]) + int(fields[12])
        except (OSError, IndexError, ValueError):
            return "", 0
