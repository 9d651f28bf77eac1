"""The line for memory: who is tried first, and who need not be tried at all.

Waiting processes are ordered by class, then by the policy's place. Those that need the same
(bytes, segments, devices) stand in one bucket: when its head does not fit, nobody behind it does,
so a pass over the line costs as much as there are different needs, not as there are processes.
Knows no memory and no policy: places and needs are passed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from llmos.kernel.policies.base import Place

Rank = tuple[float, ...]  # class, then place, then pid
Need = tuple[object, ...]


@dataclass(slots=True)
class _Waiting:
    rank: Rank
    need: Need
    bucket: list[Rank]


class Line:
    def __init__(self) -> None:
        self._waiting: dict[int, _Waiting] = {}
        self._buckets: dict[Need, list[Rank]] = {}  # heaps; the last number of a rank is its pid

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, pid: int) -> bool:
        return pid in self._waiting

    def __iter__(self) -> Iterator[int]:
        """Everybody, in order."""
        return iter(sorted(self._waiting, key=lambda pid: self._waiting[pid].rank))

    def add(self, pid: int, cls: int, place: Place, need: Need) -> None:
        """Come into the line, or to another place in it."""
        rank = (float(cls), *place, float(pid))
        need = (cls, *need)
        now = self._waiting.get(pid)
        if now is not None and (now.rank, now.need) == (rank, need):
            return
        self.pop(pid)
        bucket = self._buckets.setdefault(need, [])
        self._waiting[pid] = _Waiting(rank, need, bucket)
        heappush(bucket, rank)

    def pop(self, pid: int) -> None:
        """Leave the line. Twice is harmless."""
        gone = self._waiting.pop(pid, None)
        if gone is not None:
            self._tidy(gone.need)

    def clear(self) -> None:
        self._waiting.clear()
        self._buckets.clear()

    def before(self, pid: int) -> int:
        """How many stand before `pid`."""
        rank = self._waiting[pid].rank
        return sum(w.rank < rank for w in self._waiting.values())

    def heads(self) -> Iterator[int]:
        """The first of each bucket, by rank; when one leaves the line meanwhile, the next of its
        bucket follows in its place."""
        heads = [(bucket[0], need) for need, bucket in self._buckets.items()]
        heapify(heads)
        while heads:
            _, need = heappop(heads)
            bucket = self._buckets.get(need)
            if not bucket:
                continue
            rank = bucket[0]
            yield int(rank[-1])
            bucket = self._buckets.get(need)
            if bucket and bucket[0] != rank:
                heappush(heads, (bucket[0], need))

    def rebuild(self, place: dict[int, Place]) -> None:
        """Order everybody anew, after places have changed."""
        for bucket in self._buckets.values():
            bucket.clear()
        for pid, w in self._waiting.items():
            new = place.get(pid)
            if new is not None:
                w.rank = (w.rank[0], *new, w.rank[-1])
            w.bucket.append(w.rank)
        for bucket in self._buckets.values():
            heapify(bucket)

    def check(self) -> None:
        """The invariants, for tests."""
        for pid, w in self._waiting.items():
            assert w.rank in self._buckets[w.need], pid
        for need, bucket in self._buckets.items():
            assert bucket, need
            assert self._waiting[int(bucket[0][-1])].rank == bucket[0], need

    def _tidy(self, need: Need) -> None:
        """The head of a bucket is always somebody who waits."""
        bucket = self._buckets.get(need, [])
        while bucket:
            waiting = self._waiting.get(int(bucket[0][-1]))
            if waiting is not None and waiting.rank == bucket[0] and waiting.need == need:
                return
            heappop(bucket)
        self._buckets.pop(need, None)
