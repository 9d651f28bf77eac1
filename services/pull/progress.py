"""How far a pull is. Written by the thread that pulls, read by the one that reports."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

# Between two reports: often enough for a bar that moves.
EVERY_S = 0.25


class Progress:
    """Bytes of one phase after the other. `ring` is called when there is something to report."""

    def __init__(self, ring: Callable[[], None] = lambda: None) -> None:
        self._ring = ring
        self._lock = threading.Lock()
        self._rang_at = 0.0
        self._done, self._total = 0, 0
        self._changed = False
        self._notes: deque[str] = deque()

    def begin(self, what: str, total: int) -> None:
        """A new phase: one line for the user, and so many bytes to come (0: nobody knows)."""
        with self._lock:
            self._notes.append(what)
            self._done, self._total, self._changed = 0, total, False
        self._ring()

    def note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)
        self._ring()

    def add(self, count: int) -> None:
        self.at(self._done + count)

    def at(self, done: int, total: int | None = None) -> None:
        """So many bytes of this phase are there; `total` if more is known of that now."""
        with self._lock:
            self._done = done
            self._total = max(total if total is not None else self._total, done)
            self._changed = True
            now = time.monotonic()
            late = now - self._rang_at >= EVERY_S
            if late:
                self._rang_at = now
        if late:
            self._ring()

    def note_to_tell(self) -> str | None:
        with self._lock:
            return self._notes.popleft() if self._notes else None

    def news(self) -> tuple[int, int] | None:
        """Bytes done and in all, if that has changed since the last call."""
        with self._lock:
            changed, self._changed = self._changed, False
            return (self._done, self._total) if changed else None
