"""EEVDF: who gets the device next, in a queue of weighted shares. The algorithm alone.

Earliest eligible virtual deadline first (Stoica, Abdel-Wahab 1995; Linux since 6.6). Each
entity i has a weight w and asks for requests of r device-seconds. Virtual time V advances by
dt/W while the device works for dt seconds (W: sum of the weights in the queue). An entity is
eligible when it has had no more than its share, ve <= V; among the eligible the earliest
deadline vd = ve + r/w runs. Lag, w * (V - ve), is the service it is owed in seconds: the sum
over the queue is zero, and no lag exceeds the longest request as long as every run ends with
its request. So a turn is what is left of the request (`left_s`), and a run that is cut short
goes on with the rest; what a run takes beyond its request is added to the bound.

V is kept explicitly and moved when an entity with a lag joins or leaves, as the paper does, so
nothing is ever summed over the queue; two heaps with lazy deletion make a pick O(log n).

Knows no clock, no device and no class: seconds are passed in.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

# Rounding in V and ve over billions of charges; far below any request.
_EPSILON = 1e-9


@dataclass(slots=True)
class _Entity:
    weight: float
    request_s: float
    eligible: float  # ve: its virtual service so far
    deadline: float  # vd
    left_s: float  # of the current request
    next_request_s: float  # a better prediction counts from the next request on
    version: int = 0  # heap entries of an older version are dead


class RunQueue:
    """The runnable entities of one class on one device, by key."""

    def __init__(self) -> None:
        self._entities: dict[str, _Entity] = {}
        self._future: list[tuple[float, int, str]] = []  # by ve
        self._eligible: list[tuple[float, int, str]] = []  # by vd
        self._weight = 0.0
        self._versions = 0
        self.virtual_time = 0.0

    def __len__(self) -> int:
        return len(self._entities)

    def __contains__(self, key: str) -> bool:
        return key in self._entities

    def add(self, key: str, weight: float, request_s: float, lag_s: float = 0.0) -> None:
        """A process becomes runnable; `lag_s` is what `remove` gave when it left.

        The lag is clamped to one request, so that nobody saves up a burst while asleep, and
        dropped when the queue was empty, where there is nobody to owe it.
        """
        lag_s = max(-request_s, min(request_s, lag_s)) if self._entities else 0.0
        if self._weight:
            self.virtual_time -= lag_s / self._weight
        eligible = self.virtual_time - lag_s / weight
        deadline = eligible + request_s / weight
        entity = _Entity(weight, request_s, eligible, deadline, request_s, request_s)
        self._entities[key] = entity
        self._weight += weight
        self._push(key, entity)

    def remove(self, key: str) -> float:
        """A process is not runnable any more -> its lag in seconds."""
        entity = self._entities.pop(key)
        lag_s = entity.weight * (self.virtual_time - entity.eligible)
        self._weight -= entity.weight
        if self._entities:
            self.virtual_time += lag_s / self._weight
        else:
            self._weight = 0.0
            self._future.clear()
            self._eligible.clear()
        return lag_s

    def charge(self, key: str, used_s: float) -> None:
        """The device worked `used_s` seconds for `key`."""
        entity = self._entities[key]
        self.virtual_time += used_s / self._weight
        entity.eligible += used_s / entity.weight
        entity.left_s -= used_s
        if entity.left_s <= _EPSILON:
            entity.request_s = entity.left_s = entity.next_request_s
            entity.deadline = entity.eligible + entity.request_s / entity.weight
        self._push(key, entity)

    def set_weight(self, key: str, weight: float) -> None:
        """A renice: the lag stays what it is, the rest is rescaled."""
        entity = self._entities[key]
        lag_s = entity.weight * (self.virtual_time - entity.eligible)
        self._weight += weight - entity.weight
        entity.weight = weight
        entity.eligible = self.virtual_time - lag_s / weight
        entity.deadline = entity.eligible + entity.left_s / weight
        self._push(key, entity)

    def set_request(self, key: str, request_s: float) -> None:
        """Requests of this length from the next one on."""
        self._entities[key].next_request_s = request_s

    def left_s(self, key: str) -> float:
        """What is left of the current request: the length of a turn."""
        return self._entities[key].left_s

    def eligible(self, key: str) -> bool:
        """It has had no more than its share."""
        return self._entities[key].eligible <= self.virtual_time + _EPSILON

    def lag_s(self, key: str) -> float:
        """The service `key` is owed, in seconds; negative when it had more than its share."""
        entity = self._entities[key]
        return entity.weight * (self.virtual_time - entity.eligible)

    def pick(self, skip: Container[str] = ()) -> str | None:
        """The eligible entity with the earliest deadline; it stays in the queue.

        Those in `skip` are passed over. When none of the others is eligible, the one that will
        be first is taken: the device does not wait.
        """
        self._promote()
        found, passed = self._first(self._eligible, skip)
        for item in passed:
            heappush(self._eligible, item)
        if found is None:
            found, passed = self._first(self._future, skip)
            for item in passed:
                heappush(self._future, item)
        return found

    def _promote(self) -> None:
        """Move who has become eligible to the heap of deadlines, and back who is not any more."""
        now = self.virtual_time + _EPSILON
        while self._future and (
            self._future[0][0] <= now or not self._alive(*self._future[0][2:0:-1])
        ):
            _, version, key = heappop(self._future)
            if self._alive(key, version):
                heappush(self._eligible, (self._entities[key].deadline, version, key))
        while self._eligible:
            _, version, key = self._eligible[0]
            if self._alive(key, version):
                entity = self._entities[key]
                if entity.eligible <= now:
                    return
                # V went back when somebody joined with a lag: not eligible after all.
                heappush(self._future, (entity.eligible, version, key))
            heappop(self._eligible)

    def _first(
        self, heap: list[tuple[float, int, str]], skip: Container[str]
    ) -> tuple[str | None, list[tuple[float, int, str]]]:
        """The first living key of a heap that is not in `skip`, and the entries popped before."""
        passed: list[tuple[float, int, str]] = []
        while heap:
            _, version, key = heap[0]
            if self._alive(key, version):
                if key not in skip:
                    return key, passed
                passed.append(heap[0])
            heappop(heap)
        return None, passed

    def _alive(self, key: str, version: int) -> bool:
        entity = self._entities.get(key)
        return entity is not None and entity.version == version

    def _push(self, key: str, entity: _Entity) -> None:
        self._versions += 1
        entity.version = self._versions
        heappush(self._future, (entity.eligible, entity.version, key))
        # Dead entries are mostly popped by `pick`; a queue that is charged and never picked
        # from (one process alone) would collect them.
        if len(self._future) + len(self._eligible) > 64 + 4 * len(self._entities):
            self._rebuild()

    def _rebuild(self) -> None:
        self._eligible.clear()
        self._future = [(e.eligible, e.version, k) for k, e in self._entities.items()]
        heapify(self._future)
