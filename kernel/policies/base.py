"""What a policy is: who of a class goes first, on a device and in the line for memory.

Classes, leases, gangs, guaranteed shares and books are the kernel's; a policy only orders jobs of
one class. It makes `Turns`, a queue of the workers that want one device, and places processes in
the line for memory. It is trusted code of the kernel, found by the entry point group
`llmos.policies` and loaded only when the configuration names it.

    class Oldest(Policy):
        def turns(self) -> Turns:
            return Ordered(lambda job: (job.submitted_at,))

        def place(self, job: Job) -> Place:
            return (job.submitted_at,)

Seconds are passed in: a policy knows no clock. All of its questions are answered in O(log n).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import ClassVar

Place = tuple[float, ...]  # smaller goes first
NOBODY: frozenset[str] = frozenset()


@dataclass(slots=True)
class Job:
    """A worker that wants a device, or a process that waits for memory. Seconds are of a device."""

    key: str
    weight: float = 1024.0  # from nice, as Linux has it
    user: str = ""
    submitted_at: float = 0.0
    entered_at: float = 0.0  # when it began to wait
    request_s: float = 0.5  # of its next turn: whole steps, as far as a slice allows
    attained_s: float = 0.0  # what it had so far, of all its devices
    predicted_s: float | None = None  # what it still needs, where that is known
    devices: int = 1
    family: str = ""  # what runs of the same user and program have in common


class Turns(ABC):
    """The runnable workers of one class on one device, by key."""

    @abstractmethod
    def add(self, job: Job, lag_s: float = 0.0) -> None:
        """A worker wants the device; `lag_s` is what `remove` gave when it left last."""

    @abstractmethod
    def remove(self, key: str) -> float:
        """It does not want the device any more -> seconds that it is owed (0: nothing is kept)."""

    @abstractmethod
    def charge(self, key: str, used_s: float) -> None:
        """The device worked `used_s` seconds for `key`."""

    @abstractmethod
    def pick(self, skip: Container[str] = NOBODY) -> str | None:
        """Who is next, passing over those in `skip`; it stays in the queue."""

    @abstractmethod
    def left_s(self, key: str) -> float:
        """How long the present turn of `key` still is; infinite when it runs to its end."""

    @abstractmethod
    def __len__(self) -> int: ...

    def renice(self, key: str, weight: float) -> None:  # noqa: B027  (most orders know no weights)
        """The weight of a worker changed."""

    def request(self, key: str, request_s: float) -> None:  # noqa: B027
        """The next turns of a worker should be so long."""

    def may_run(self, key: str) -> bool:
        """Whether a gang may take the device now: it has had no more than its share here."""
        return True

    def check(self) -> None:  # noqa: B027
        """The invariants, for tests."""


class Policy(ABC):
    name: ClassVar[str]
    displacing: ClassVar[bool] = True  # False: `displaces` is never asked
    # True: whom a job does not displace, no job of a later place does; so it is asked less often.
    in_order: ClassVar[bool] = False

    def __init__(self, slice_s: float = 0.5) -> None:
        self.slice_s = slice_s

    @abstractmethod
    def turns(self) -> Turns:
        """A new queue, for one class on one device."""

    @abstractmethod
    def place(self, job: Job) -> Place:
        """Its place in the line for memory, among those of its class.

        Fixed while it waits, but for what `arrived` and `ended` name.
        """

    def displaces(self, waiting: Job, resident: Job) -> bool:
        """May `waiting` have `resident` moved out of memory, when nothing else makes room?"""
        return False

    def review_s(self, resident: Job) -> float | None:
        """After how many more seconds of a device `displaces` may answer differently."""
        return None

    def arrived(self, job: Job) -> Iterable[str]:
        """A job comes into the line for the first time -> keys of jobs whose places change."""
        return ()

    def ended(self, job: Job) -> Iterable[str]:
        """A job is done: what there is to learn from it -> keys of jobs whose places change."""
        return ()


@dataclass(slots=True)
class _Entry:
    job: Job
    left_s: float
    version: int


class Ordered(Turns):
    """Turns by a key of each job. `turn_s` says how long a turn is; the key is asked for again
    when a job joins and at the end of each of its turns."""

    def __init__(
        self,
        order: Callable[[Job], Place],
        turn_s: Callable[[Job], float] = lambda job: math.inf,
    ) -> None:
        self._order, self._turn_s = order, turn_s
        self._entries: dict[str, _Entry] = {}
        self._heap: list[tuple[Place, int, str]] = []
        self._versions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, job: Job, lag_s: float = 0.0) -> None:
        self._entries[job.key] = _Entry(job, self._turn_s(job), 0)
        self._push(job.key)

    def remove(self, key: str) -> float:
        del self._entries[key]
        return 0.0

    def charge(self, key: str, used_s: float) -> None:
        entry = self._entries[key]
        job = entry.job
        job.attained_s += used_s * job.devices
        if job.predicted_s is not None:
            job.predicted_s = max(0.0, job.predicted_s - used_s)
        entry.left_s -= used_s
        if entry.left_s <= 1e-9:
            entry.left_s = self._turn_s(job)
            self._push(key)

    def pick(self, skip: Container[str] = NOBODY) -> str | None:
        passed = []
        found = None
        while self._heap:
            _, version, key = self._heap[0]
            entry = self._entries.get(key)
            if entry is not None and entry.version == version:
                if key not in skip:
                    found = key
                    break
                passed.append(self._heap[0])
            heappop(self._heap)
        for item in passed:
            heappush(self._heap, item)
        return found

    def left_s(self, key: str) -> float:
        return self._entries[key].left_s

    def renice(self, key: str, weight: float) -> None:
        self._entries[key].job.weight = weight
        self._push(key)

    def request(self, key: str, request_s: float) -> None:
        self._entries[key].job.request_s = request_s

    def check(self) -> None:
        living = {(v, k) for _, v, k in self._heap}
        assert all((e.version, k) in living for k, e in self._entries.items())

    def _push(self, key: str) -> None:
        """Entries of an older version are dead; they are swept out when they are the most."""
        self._versions += 1
        entry = self._entries[key]
        entry.version = self._versions
        if len(self._heap) > 64 + 4 * len(self._entries):
            self._heap = [
                (self._order(e.job), e.version, k) for k, e in self._entries.items() if k != key
            ]
            heapify(self._heap)
        heappush(self._heap, (self._order(entry.job), entry.version, key))
