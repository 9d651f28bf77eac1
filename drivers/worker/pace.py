"""Little work in flight: a device's queue is never longer than a hold may take.

Work for a device is queued, and what is queued cannot be taken back: a worker that stops queueing
is off the device only when the queue is empty. So the queue is kept short, measured in seconds of
the device: a mark is set at boundaries (between layers, say), the time between two marks is
measured, and before more is queued the oldest is waited for until what is left is within the
budget. A device whose queue never runs dry loses nothing by that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

# What may be queued. A hold waits for it and for the segment that is being queued, so with
# segments of up to 10 ms it takes less than 25 ms; launching a layer takes 0.1 to 0.5 ms, so a
# queue of this length does not run dry.
IN_FLIGHT_S = 0.012

# A mark costs about 10 us (an event, its wait, its reading). Segments are made about this long by
# leaving boundaries out, so that marks cost half a percent.
SEGMENT_S = 0.002
MOST_BOUNDARIES = 64

# How fast an expectation falls when a segment was shorter. It rises at once.
FORGET = 0.2


class Streams(Protocol):
    """The queue of one device, as the pacer sees it. A mark is a place in the queue."""

    def mark(self) -> Any:
        """Put a mark behind everything that was queued so far."""
        ...

    def wait(self, mark: Any) -> None:
        """Until the device has passed the mark."""
        ...

    def elapsed_s(self, earlier: Any, later: Any) -> float:
        """Device time between two marks that it has passed."""
        ...

    def forget(self, mark: Any) -> None:
        """The mark is not asked for again."""
        ...

    def synchronize(self) -> None:
        """Until the device has done everything that was queued."""
        ...


@dataclass(slots=True)
class _Segment:
    name: str
    begins: Any
    expected_s: float
    ends: Any = None


class Pacer:
    """Keeps at most `budget_s` of expected work in the queue; learns what to expect by name."""

    def __init__(self, streams: Streams, budget_s: float = IN_FLIGHT_S) -> None:
        self._streams, self._budget_s = streams, budget_s
        self._queue: deque[_Segment] = deque()
        self._queued_s = 0.0
        self._open: _Segment | None = None
        self._left = 0  # boundaries that the open segment still covers
        self._expected: dict[str, float] = {}
        self._covers: dict[str, int] = {}

    @property
    def longest_s(self) -> float:
        """The longest segment that is to be expected: what a hold may have to wait for."""
        return max(self._expected.values(), default=0.0)

    def boundary(self, name: str) -> None:
        """Work called `name` begins here. May wait for the device."""
        self._left -= 1
        if self._left > 0:
            return
        mark = self._streams.mark()
        if self._open is not None:
            self._close(self._open, mark)
        # An unknown segment counts for half the budget: two of them may be queued.
        expected_s = self._expected.get(name, self._budget_s / 2)
        self._open = _Segment(name, mark, expected_s)
        self._left = self._covers.get(name, 1)
        while self._queue and self._queued_s > self._budget_s:
            self._wait_for_oldest()

    def empty(self) -> None:
        """Wait for everything; what follows is a new beginning (after a pause of any length)."""
        self._streams.synchronize()
        while self._queue:
            self._wait_for_oldest()
        if self._open is not None:
            self._streams.forget(self._open.begins)
        self._open, self._queued_s, self._left = None, 0.0, 0

    def _close(self, segment: _Segment, mark: Any) -> None:
        segment.ends = mark
        self._queue.append(segment)
        self._queued_s += segment.expected_s

    def _wait_for_oldest(self) -> None:
        segment = self._queue.popleft()
        self._queued_s -= segment.expected_s
        self._streams.wait(segment.ends)
        took_s = self._streams.elapsed_s(segment.begins, segment.ends)
        self._streams.forget(segment.begins)  # its end is the begin of the next
        self._learn(segment.name, took_s)

    def _learn(self, name: str, took_s: float) -> None:
        before_s = self._expected.get(name, took_s)
        self._expected[name] = max(took_s, before_s + FORGET * (took_s - before_s))
        covers = self._covers.get(name, 1)
        if took_s < SEGMENT_S / 2:
            self._covers[name] = min(2 * covers, MOST_BOUNDARIES)
        elif took_s > 2 * SEGMENT_S and covers > 1:
            self._covers[name] = covers // 2
            del self._expected[name]  # it was that of a longer one
