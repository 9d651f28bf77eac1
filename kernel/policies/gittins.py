"""Gittins indices from counts in doubling buckets, and the neighbours that the counts come from."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

BUCKETS = 26  # [0, 1) s, [1, 2), [2, 4) ... 2^25 s is more than a year
EDGES = [0.0, *(2.0**i for i in range(BUCKETS))]
WIDTH = [b - a for a, b in itertools.pairwise(EDGES)]
WINDOW = 16  # siblings to each side, weighted by 1 / distance


def bucket_of(seconds: float) -> int:
    return 0 if seconds < 1 else min(BUCKETS - 1, math.frexp(seconds)[1])


@dataclass(slots=True)
class Member:
    """A job as its siblings see it."""

    key: str
    family: str
    at: int  # its place among the arrivals of the family
    ran_s: float = 0.0
    over: bool = False
    bucket: int = 0  # up to here it is in the table of all jobs
    ranks: list[float] | None = None  # by bucket; None when there is more to make them of
    ranks_of: int = -1  # how much had been learned when they were made


@dataclass(slots=True)
class Family:
    members: list[Member] = field(default_factory=list)
    first: int = 0  # the place of members[0]

    def near(self, at: int) -> list[Member]:
        low = max(0, at - WINDOW - self.first)
        return self.members[low : max(0, at + WINDOW + 1 - self.first)]

    def forget(self) -> list[Member]:
        """Drop the oldest, as long as nobody who lives looks at it."""
        gone = 0
        while len(self.members) - gone > 4 * WINDOW:
            if not all(m.over for m in self.members[gone : gone + WINDOW + 1]):
                break
            gone += 1
        dropped, self.members = self.members[:gone], self.members[gone:]
        self.first += gone
        return dropped


def indices(chances: list[float], seconds: list[float]) -> list[float]:
    """1 / Gittins index for a job at the start of each bucket: seconds per expected end.

    The index is the best ratio of chances to seconds over all buckets that one might go on for;
    from the right, neighbours are merged as long as that makes the ratio better.
    """
    out, blocks = [0.0] * len(chances), list[tuple[float, float]]()
    for i in reversed(range(len(chances))):
        chance, time = chances[i], seconds[i]
        while blocks and blocks[-1][0] * time >= chance * blocks[-1][1]:
            more_chance, more_time = blocks.pop()
            chance, time = chance + more_chance, time + more_time
        blocks.append((chance, time))
        out[i] = time / chance if chance else math.inf
    return out
