"""The time of one device: who has it, who is next, and when to ask again.

Three classes in strict order, an EEVDF queue in each; at most one worker holds the device. A
more urgent class takes it at once, an equal one when the slice is used up. Taking is not
instant: a held worker is off the device only when the driver says so, and until then the
device belongs to it and is charged to it.

Device-seconds are accounted here: what each charge returns adds up, with the idle time, to
the uptime of the device. Knows no process, no memory and no clock: time is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmos.kernel.eevdf import RunQueue
from llmos.kernel.process import Class, weight_of

# A switch costs about 1 ms and a cold cache: at half a second that is noise (two trainings
# sliced 1 s / 1 s keep 0.96 of the machine), and a turn still comes soon enough to be watched.
SLICE_S = {Class.INTERACTIVE: 0.1, Class.BATCH: 0.5, Class.IDLE: 0.5}

# The load shown is that of the last seconds.
LOAD_WINDOW_S = 5.0


@dataclass(slots=True)
class Lease:
    """The right of a worker to use the device."""

    worker_id: str
    cls: Class
    granted_at: float
    charged_until: float
    slice_ends_at: float
    holding: str = ""  # why it is being taken away; empty while it is not
    taken_by: int = 0  # the pid it is taken for
    leaves: str = ""  # "yielding": it will say idle by itself; "leaving": it is about to exit


@dataclass(frozen=True, slots=True)
class Charge:
    worker_id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Decision:
    """`grant`, or `hold` with the reason: preempted, slice-ended, or what the caller said."""

    what: str
    worker_id: str
    why: str = ""
    by: str = ""  # who the device is taken for


@dataclass(slots=True)
class _Entry:
    cls: Class
    weight: float


@dataclass
class DeviceQueue:
    device: str
    started_at: float
    lease: Lease | None = None
    busy_s: float = 0.0
    _queues: dict[Class, RunQueue] = field(default_factory=lambda: {c: RunQueue() for c in Class})
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _lags: dict[str, float] = field(default_factory=dict)  # of workers that sleep
    _busy_marks: list[tuple[float, float]] = field(default_factory=list)

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._entries

    def enqueue(self, worker_id: str, cls: Class, nice: int) -> None:
        """A worker wants the device."""
        weight = float(weight_of(nice))
        self._entries[worker_id] = _Entry(cls, weight)
        if self.lease is not None and self.lease.worker_id == worker_id:
            self.lease.leaves = ""
        lag = self._lags.pop(worker_id, 0.0)
        self._queues[cls].add(worker_id, weight, SLICE_S[cls], lag)

    def dequeue(self, worker_id: str, leaves: str = "") -> None:
        """A worker does not want the device any more; if it holds it, it is taken away.

        Not from one that `leaves` by itself: a dying worker must run to die, and an engine
        says in a moment that it is idle.
        """
        if self.lease is not None and self.lease.worker_id == worker_id:
            self.lease.leaves = leaves
        entry = self._entries.pop(worker_id, None)
        if entry is not None:
            self._lags[worker_id] = self._queues[entry.cls].remove(worker_id)

    def forget(self, worker_id: str) -> None:
        """A worker is gone for good."""
        self.dequeue(worker_id)
        self._lags.pop(worker_id, None)

    def rerank(self, worker_id: str, cls: Class, nice: int) -> None:
        """The class or the nice value changed, while it waits or runs."""
        entry = self._entries.get(worker_id)
        if entry is None:
            return
        if self.lease is not None and self.lease.worker_id == worker_id:
            self.lease.cls = cls
        weight = float(weight_of(nice))
        if entry.cls is not cls:
            # What one class owes is nothing to the other: no lag is carried over.
            self._queues[entry.cls].remove(worker_id)
            self._queues[cls].add(worker_id, weight, SLICE_S[cls])
        elif entry.weight != weight:
            self._queues[cls].set_weight(worker_id, weight)
        self._entries[worker_id] = _Entry(cls, weight)

    def charge(self, now: float) -> Charge | None:
        """Account the time since the last charge to who holds the device."""
        if self.lease is None or now <= self.lease.charged_until:
            return None
        seconds = now - self.lease.charged_until
        self.lease.charged_until = now
        self.busy_s += seconds
        entry = self._entries.get(self.lease.worker_id)
        if entry is not None:
            self._queues[entry.cls].charge(self.lease.worker_id, seconds)
        return Charge(self.lease.worker_id, seconds)

    def released(self, worker_id: str) -> None:
        """The driver says the worker is off the device (held, idle or gone)."""
        if self.lease is not None and self.lease.worker_id == worker_id:
            self.lease = None

    def decide(self, now: float) -> Decision | None:
        """What to do now, if anything; `charge` first."""
        best = self._best()
        if self.lease is None:
            return self._grant(best, now) if best is not None else None
        if self.lease.holding:
            return None
        holder = self.lease.worker_id
        entry = self._entries.get(holder)
        if entry is None:
            over = best is not None and now >= self.lease.slice_ends_at
            stays = self.lease.leaves == "leaving" or (self.lease.leaves and not over)
            return None if stays else self._hold("given up", "")
        if best is None or best == holder:
            if now >= self.lease.slice_ends_at:
                self.lease.slice_ends_at = now + SLICE_S[entry.cls]
            return None
        if self._entries[best].cls < entry.cls:
            return self._hold("preempted", best)
        if now >= self.lease.slice_ends_at:
            return self._hold("slice-ended", best)
        return None

    def wake_at(self) -> float | None:
        """When `decide` may answer differently though no event comes."""
        if self.lease is None or self.lease.holding:
            return None
        others = len(self._entries) - (self.lease.worker_id in self._entries)
        if not others or self.lease.leaves == "leaving":
            return None
        return self.lease.slice_ends_at

    def load(self, now: float) -> float:
        """The busy part of the last seconds, 0 to 1. Called about once a second."""
        self._busy_marks = [m for m in self._busy_marks if m[0] > now - LOAD_WINDOW_S]
        self._busy_marks.append((now, self.busy_s))
        since, busy = self._busy_marks[0]
        return min(1.0, (self.busy_s - busy) / (now - since)) if now > since else 0.0

    def waiting_before(self, worker_id: str) -> int:
        """How many workers of the same or a more urgent class want the device too."""
        entry = self._entries.get(worker_id)
        if entry is None:
            return 0
        return sum(len(self._queues[c]) for c in Class if c <= entry.cls) - 1

    def check(self) -> None:
        """The invariants, for tests."""
        for cls in Class:
            queue = self._queues[cls]
            mine = [w for w, e in self._entries.items() if e.cls is cls]
            assert len(queue) == len(mine)
            total = sum(queue.lag_s(w) for w in mine)
            assert abs(total) < 1e-6, f"{self.device}: lags of {cls.word} sum to {total}"

    def _best(self) -> str | None:
        for cls in Class:
            if len(self._queues[cls]):
                return self._queues[cls].pick()
        return None

    def _grant(self, worker_id: str, now: float) -> Decision:
        cls = self._entries[worker_id].cls
        self.lease = Lease(worker_id, cls, now, now, now + SLICE_S[cls])
        return Decision("grant", worker_id)

    def _hold(self, why: str, by: str) -> Decision:
        assert self.lease is not None
        self.lease.holding = why
        return Decision("hold", self.lease.worker_id, why, by)
