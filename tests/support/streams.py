"""A device that exists only as a clock: its queue takes simulated time, and so does waiting."""

from __future__ import annotations


class FakeStreams:
    """Work is queued with `launch`; `now_s` is the time of the thread that queues it.

    `waits` counts how often that thread had to wait, `idle_s` how long the device had nothing.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.free_at_s = 0.0  # when the device has done all that was queued
        self.idle_s = 0.0
        self.waits = 0
        self.alive: set[int] = set()  # marks that were made and not forgotten
        self._made = 0
        self._at: dict[int, float] = {}

    def launch(self, device_s: float, launch_s: float = 0.0) -> None:
        """Queue work that takes the device so long; queueing it takes the thread `launch_s`."""
        self.now_s += launch_s
        self.idle_s += max(0.0, self.now_s - self.free_at_s)
        self.free_at_s = max(self.free_at_s, self.now_s) + device_s

    @property
    def queued_s(self) -> float:
        return max(0.0, self.free_at_s - self.now_s)

    # ---- as drivers.worker.pace.Streams ----

    def mark(self) -> int:
        self._made += 1
        self._at[self._made] = max(self.free_at_s, self.now_s)
        self.alive.add(self._made)
        return self._made

    def wait(self, mark: int) -> None:
        assert mark in self.alive
        if self._at[mark] > self.now_s:
            self.waits += 1
            self.now_s = self._at[mark]

    def elapsed_s(self, earlier: int, later: int) -> float:
        assert {earlier, later} <= self.alive
        assert self._at[later] <= self.now_s, "asked before the device had passed it"
        return self._at[later] - self._at[earlier]

    def forget(self, mark: int) -> None:
        self.alive.remove(mark)

    def synchronize(self) -> None:
        self.now_s = max(self.now_s, self.free_at_s)
