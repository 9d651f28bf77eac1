"""How much of the heap stays taken: a model of the C library's allocator, for predictions.

A tensor on a CPU lives in glibc's heap, where what is freed between two that live stays resident.
With the tensors' sizes and order known, how much that is can be worked out: this follows glibc
2.36's malloc.c (_int_malloc, _int_memalign, _int_free, sysmalloc) for what matters here. Workers
run without thread caches and fast bins (`drivers/zygote.py`), so freed neighbours are joined at
once. What nobody asked for yet is unsorted; the next request sorts it into bins, takes the best
fit, and gives the rest back. Above a threshold, which grows, memory comes from the system and goes
back to it.

Left out: memory that no tensor shows, small pieces that land in a large hole, and two shortcuts of
malloc.c (it sorts 10,000 holes at most, and splits the last remainder first for small requests).
With another allocator (LD_PRELOAD) or thresholds of one's own it says nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort

PAGE = 4096
# Of every piece: SIZE_SZ, MALLOC_ALIGNMENT and MINSIZE of malloc.c.
HEADER, ALIGNMENT, LEAST = 8, 16, 32
TENSOR_ALIGNMENT = 64  # what torch asks posix_memalign for
TOP_PAD = 128 << 10
FIRST_THRESHOLD, LAST_THRESHOLD = 128 << 10, 32 << 20


class Heap:
    """Blocks by key. `peak` is the most that was ever resident, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._blocks: dict[int, tuple[int, int]] = {}  # key -> (start, or -1 when mapped; size)
        self._bins = _Bins()
        self._ends: dict[int, int] = {}  # of a hole -> its start
        self._top = self._end = self._mapped = 0
        self._map_from, self._trim_from = FIRST_THRESHOLD, FIRST_THRESHOLD

    @property
    def now(self) -> int:
        """What is resident now, in bytes."""
        return self._end + self._mapped

    def take(self, key: int, nbytes: int) -> None:
        """posix_memalign(64, nbytes)."""
        # It asks for as much more as it may have to skip, and gives back what is left on both
        # sides. So the hole that a tensor leaves is a little too small for another of its size.
        size = max(LEAST, _rounded(nbytes + HEADER, ALIGNMENT))
        padded = _rounded(size + TENSOR_ALIGNMENT + LEAST + HEADER, ALIGNMENT)
        found = self._fit(padded)
        if found is None:
            mapped = _rounded(padded + HEADER, PAGE)
            self._mapped += mapped
            self._blocks[key] = -1, mapped
            self._note()
            return
        start, got = found
        skipped = -(start + 2 * HEADER) % TENSOR_ALIGNMENT
        skipped += TENSOR_ALIGNMENT if 0 < skipped < LEAST else 0
        rest = got - skipped - size
        if skipped:
            self._give(start, skipped)
        if rest > LEAST:
            self._give(start + skipped + size, rest)
        else:
            size += rest
        self._blocks[key] = start + skipped, size

    def drop(self, key: int) -> None:
        """free()."""
        start, size = self._blocks.pop(key)
        if start >= 0:
            self._give(start, size)
            return
        self._mapped -= size
        if self._map_from < size <= LAST_THRESHOLD:
            # From now on what is so large comes from the heap, and more of the heap is kept.
            self._map_from, self._trim_from = size, 2 * size

    def _fit(self, size: int) -> tuple[int, int] | None:
        """The smallest hole that is large enough, or the top -> (start, size); None: map it."""
        hole = self._bins.fit(size)
        if hole is not None:
            start, found = hole
            del self._ends[start + found]
            if found - size < LEAST:
                return start, found
            self._open(start + size, found - size)
            return start, size
        if self._end - self._top < size + LEAST and size >= self._map_from:
            return None
        start, self._top = self._top, self._top + size
        if self._top + LEAST > self._end:
            self._end = _rounded(self._top + TOP_PAD, PAGE)
            self._note()
        return start, size

    def _give(self, start: int, size: int) -> None:
        before = self._ends.pop(start, None)
        if before is not None:
            size += self._bins.unlink(before)
            start = before
        if start + size in self._bins:
            after = self._bins.unlink(start + size)
            del self._ends[start + size + after]
            size += after
        if start + size < self._top:
            self._open(start, size)
            return
        self._top = start
        if self._end - start >= self._trim_from:
            self._end = _rounded(start + TOP_PAD, PAGE)

    def _open(self, start: int, size: int) -> None:
        self._bins.add(start, size)
        self._ends[start + size] = start

    def _note(self) -> None:
        self.peak = max(self.peak, self.now)


class _Bins:
    """Holes by start: first unsorted, then by size."""

    def __init__(self) -> None:
        self._size: dict[int, int] = {}
        self._unsorted: dict[int, None] = {}  # oldest first
        self._sizes: list[int] = []  # of those that are sorted, each once
        # By size, in the order of malloc.c's lists: a new one comes second.
        self._alike: dict[int, list[int]] = {}

    def __contains__(self, start: int) -> bool:
        return start in self._size

    def add(self, start: int, size: int) -> None:
        self._size[start] = size
        self._unsorted[start] = None

    def unlink(self, start: int) -> int:
        """Take a hole out -> its size."""
        size = self._size.pop(start)
        if start in self._unsorted:
            del self._unsorted[start]
            return size
        alike = self._alike[size]
        alike.remove(start)
        if not alike:
            del self._alike[size]
            self._sizes.pop(bisect_left(self._sizes, size))
        return size

    def fit(self, size: int) -> tuple[int, int] | None:
        """Take the best hole for `size` out -> (start, its size); None: there is none."""
        while self._unsorted:
            start = next(iter(self._unsorted))
            if self._size[start] == size:
                return start, self.unlink(start)
            del self._unsorted[start]
            self._sort(start)
        at = bisect_left(self._sizes, size)
        if at == len(self._sizes):
            return None
        alike = self._alike[self._sizes[at]]
        same_bin = _bin(self._sizes[at]) == _bin(size)
        start = alike[1] if same_bin and len(alike) > 1 else alike[-1]
        return start, self.unlink(start)

    def _sort(self, start: int) -> None:
        size = self._size[start]
        alike = self._alike.get(size)
        if alike is None:
            self._alike[size] = [start]
            insort(self._sizes, size)
        else:
            alike.insert(1, start)


def _bin(size: int) -> int:
    """malloc.c's largebin_index_64."""
    for shift, most, first in ((6, 48, 48), (9, 20, 91), (12, 10, 110), (15, 4, 119), (18, 2, 124)):
        if size >> shift <= most:
            return first + (size >> shift)
    return 126


def _rounded(n: int, to: int) -> int:
    return -(-n // to) * to
