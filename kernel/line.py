"""The line for memory: who is tried first, and who need not be tried at all.

Waiting processes are ordered by class, then by the policy's place. Those that need the same
(bytes, segments, devices) stand in one bucket: when its head does not fit, nobody behind it does.
Buckets that differ in nothing but bytes are sorted by them, so a pass over the line costs as much
as there are different needs that could be met now; of the others it sees only those that have
waited too long to be passed (they close devices to who comes behind them).

Knows no memory, no policy and no clock: places, needs, bounds and moments are passed in.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from llmos.kernel.policies.base import Place

Rank = tuple[float, ...]  # class, then place, then pid


class Need(NamedTuple):
    """What a process waits for, on each of `gang` devices."""

    nbytes: int
    gang: int = 1
    more: tuple[object, ...] = ()  # what else makes a difference: then no bound tells if it fits


Key = tuple[int, Need]  # of a bucket: class and need
Kind = tuple[int, int]  # class and gang: of buckets that differ in their bytes only

# The most bytes that could be given now on each of so many devices, if all in the line were of a
# class: who makes room for a more urgent one makes some for who comes after it.
Bound = Callable[[int, int], int]


@dataclass(slots=True)
class _Bucket:
    key: Key
    ranks: list[Rank] = field(default_factory=list)  # a heap; some have left or moved since
    count: int = 0


@dataclass(slots=True)
class _Waiting:
    rank: Rank
    bucket: _Bucket
    late_at: float  # from then on nobody of its class should pass it


class Line:
    def __init__(self) -> None:
        self._waiting: dict[int, _Waiting] = {}
        self._buckets: dict[Key, _Bucket] = {}
        self._others: dict[Key, _Bucket] = {}  # that no bound tells anything about
        self._sizes: dict[Kind, list[tuple[int, _Bucket]]] = {}  # all the rest, sorted by bytes
        self._due: list[tuple[float, int]] = []  # who will be late; some have left since
        self._late: dict[Key, _Bucket] = {}  # in which somebody is, or was

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, pid: int) -> bool:
        return pid in self._waiting

    def __iter__(self) -> Iterator[int]:
        """Everybody, in order."""
        return iter(sorted(self._waiting, key=lambda pid: self._waiting[pid].rank))

    def add(self, pid: int, cls: int, place: Place, need: Need, late_at: float = math.inf) -> None:
        """Come into the line, or to another place in it."""
        rank, now = (float(cls), *place, float(pid)), self._waiting.get(pid)
        if now is not None and now.bucket.key == (cls, need):
            late, moved = now.late_at != late_at, now.rank != rank
            now.rank, now.late_at = rank, late_at
            if moved:
                self._stand(now)
        else:
            self.pop(pid)
            late, now = True, _Waiting(rank, self._bucket((cls, need)), late_at)
            self._waiting[pid] = now
            now.bucket.count += 1
            self._stand(now)
        if late and late_at < math.inf:
            heappush(self._due, (late_at, pid))

    def pop(self, pid: int) -> None:
        """Leave the line. Twice is harmless."""
        gone = self._waiting.pop(pid, None)
        if gone is not None:
            gone.bucket.count -= 1
            self._tidy(gone.bucket)

    def clear(self) -> None:
        for pid in list(self._waiting):
            self.pop(pid)

    def need(self, pid: int) -> Need:
        return self._waiting[pid].bucket.key[1]

    def place(self, pid: int) -> Place:
        return self._waiting[pid].rank[1:-1]

    def before(self, pid: int) -> int:
        """How many stand before `pid`."""
        rank = self._waiting[pid].rank
        return sum(w.rank < rank for w in self._waiting.values())

    def heads(
        self, now: float = math.inf, bound: Bound | None = None, closed: Set[int] = frozenset()
    ) -> Iterator[int]:
        """The first of each bucket, by rank; when one leaves the line meanwhile, the next of its
        bucket follows in its place.

        Left out are those above the `bound` that are not late, and, once their class is in
        `closed`, all that a bound tells of. Of each kind one is there even so: the policy is asked
        about those who hold the memory, and learns how far they have come.
        """
        heads = [(bucket.ranks[0], bucket) for bucket in self._to_try(now, bound)]
        heapify(heads)
        seen = 0
        while heads:
            if len(closed) > seen:
                seen = len(closed)
                heads = [h for h in heads if h[1].key[1].more or h[1].key[0] not in closed]
                heapify(heads)
                continue
            rank, bucket = heappop(heads)
            if bucket.count and bucket.ranks[0] == rank:
                yield int(rank[-1])
            if bucket.count and bucket.ranks[0] != rank:
                heappush(heads, (bucket.ranks[0], bucket))

    def _to_try(self, now: float, bound: Bound | None) -> list[_Bucket]:
        while self._due and self._due[0][0] <= now:
            _, pid = heappop(self._due)
            waiting = self._waiting.get(pid)
            if waiting is not None and waiting.late_at <= now:
                self._late[waiting.bucket.key] = waiting.bucket
        if bound is None or not self._buckets:
            return list(self._buckets.values())
        found = {**self._others, **self._late}
        urgent = min(cls for cls, _ in (*self._others, *self._sizes))
        for (_, gang), sizes in self._sizes.items():
            fit = bisect_left(sizes, (bound(urgent, gang) + 1,))
            for _, bucket in (*sizes[:fit], sizes[-1]):
                found[bucket.key] = bucket
        return list(found.values())

    def rebuild(self, place: dict[int, Place]) -> None:
        """Order everybody anew, after places have changed."""
        for bucket in self._buckets.values():
            bucket.ranks.clear()
        for pid, w in self._waiting.items():
            if pid in place:
                w.rank = (w.rank[0], *place[pid], w.rank[-1])
            w.bucket.ranks.append(w.rank)
        for bucket in self._buckets.values():
            heapify(bucket.ranks)

    def check(self) -> None:
        """The invariants, for tests."""
        for pid, w in self._waiting.items():
            assert self._buckets[w.bucket.key] is w.bucket, pid
            assert w.rank in w.bucket.ranks, pid
            due = w.bucket.key in self._late or (w.late_at, pid) in self._due
            assert due or w.late_at == math.inf, pid
        for key, bucket in self._buckets.items():
            mine = [w.rank for w in self._waiting.values() if w.bucket is bucket]
            assert (bucket.count, bucket.ranks[0]) == (len(mine), min(mine)), key
        for (cls, gang), sizes in self._sizes.items():
            alike = [n for c, (n, g, more) in self._buckets if (c, g, more) == (cls, gang, ())]
            assert [n for n, _ in sizes] == sorted(alike)

    def _bucket(self, key: Key) -> _Bucket:
        """The bucket of a need, made if need be."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(key)
            cls, need = key
            if need.more:
                self._others[key] = bucket
            else:
                insort(self._sizes.setdefault((cls, need.gang), []), (need.nbytes, bucket))
        return bucket

    def _stand(self, waiting: _Waiting) -> None:
        """Take the place that `rank` says, in its bucket."""
        bucket = waiting.bucket
        if len(bucket.ranks) > 64 + 4 * bucket.count:
            bucket.ranks = [r for r in set(bucket.ranks) if self._holds(bucket, r)]
            heapify(bucket.ranks)
        heappush(bucket.ranks, waiting.rank)
        self._tidy(bucket)

    def _holds(self, bucket: _Bucket, rank: Rank) -> bool:
        """Is this the place of somebody who waits in this bucket?"""
        waiting = self._waiting.get(int(rank[-1]))
        return waiting is not None and waiting.rank == rank and waiting.bucket is bucket

    def _tidy(self, bucket: _Bucket) -> None:
        """The head of a bucket is always somebody who waits; an empty one is none."""
        if bucket.count:
            while not self._holds(bucket, bucket.ranks[0]):
                heappop(bucket.ranks)
            return
        cls, need = bucket.key
        del self._buckets[bucket.key]
        self._others.pop(bucket.key, None)
        self._late.pop(bucket.key, None)
        if not need.more:
            sizes = self._sizes[cls, need.gang]
            del sizes[bisect_left(sizes, (need.nbytes,))]
            if not sizes:
                del self._sizes[cls, need.gang]
