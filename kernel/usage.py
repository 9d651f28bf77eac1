"""Device-seconds by user over a window that moves. Knows no clock: time is passed in."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

# A window is kept in so many pieces: what was used in one of them is forgotten all at once.
PIECES = 24


class Usage:
    """Device-seconds by user over the last window: of at least 23/24 of it."""

    def __init__(self, window_s: float) -> None:
        self._window_s, self._piece_s = window_s, window_s / PIECES
        self._pieces: dict[int, deque[tuple[float, float]]] = {}  # uid -> (began, seconds)
        self._sums: dict[int, float] = {}

    def add(self, uid: int, seconds: float, now: float) -> None:
        began = math.floor(now / self._piece_s) * self._piece_s
        pieces = self._pieces.setdefault(uid, deque())
        if pieces and pieces[-1][0] == began:
            pieces[-1] = (began, pieces[-1][1] + seconds)
        else:
            pieces.append((began, seconds))
        self._sums[uid] = self._sums.get(uid, 0.0) + seconds

    def used(self, uid: int, now: float) -> float:
        pieces = self._pieces.get(uid)
        while pieces and pieces[0][0] + self._window_s <= now:
            self._sums[uid] -= pieces.popleft()[1]
        if not pieces:
            self._pieces.pop(uid, None)
            self._sums.pop(uid, None)
        return self._sums.get(uid, 0.0)

    def below_at(self, uid: int, allowed_s: float, now: float) -> float:
        """When less than `allowed_s` will be left in the window, if nothing is added."""
        left = self.used(uid, now)
        for began, seconds in self._pieces.get(uid, ()):
            if left < allowed_s:
                break
            left -= seconds
            now = began + self._window_s
        return now

    def users(self) -> list[int]:
        return list(self._pieces)

    def to_wire(self) -> dict[str, list[list[float]]]:
        return {str(uid): [list(p) for p in pieces] for uid, pieces in self._pieces.items()}

    def restore(self, rows: dict[str, Any]) -> None:
        """What an earlier kernel saw. Raises ValueError, TypeError, AttributeError on nonsense."""
        for uid, pieces in rows.items():
            for began, seconds in pieces:
                self.add(int(uid), float(seconds), float(began))
