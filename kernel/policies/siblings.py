"""The default: shares by weight on a device; in the line, what is expected to end soonest.

Nobody knows how long a job runs, but those that were submitted next to it by the same user for the
same program mostly run about as long. From how its siblings ended, and from how far those that
still run have come, each job gets its Gittins index: the best chance of an end per second, over
all the times that one might try (Gittins 1979; for training jobs: Tiresias, NSDI 2019). The lower
the expected time for an end, the sooner its turn. What is in memory counts half of its rank, so
that two that are alike do not push each other out.

The distributions are counts in doubling buckets of the time that a job ran, smoothed with those of
all jobs, which begin with two observations of a Pareto distribution (most jobs are short, some
last for ever). How this was chosen, and what lost: docs/design/0009-order-of-the-line.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from llmos.kernel.policies.base import Job, Place, Policy, Turns
from llmos.kernel.policies.eevdf import Shares
from llmos.kernel.policies.gittins import (
    BUCKETS,
    EDGES,
    WIDTH,
    Family,
    Member,
    bucket_of,
    indices,
)

PRIOR = 0.5  # how much all jobs count against the siblings
STAYS = 0.5  # what is in memory counts so much of its rank
_PRIOR_JOBS, _PRIOR_HAZARD = 2.0, 1 - 2**-0.5  # Pareto with alpha 1/2: the same in each bucket
_WEIGHT_0 = 1024.0


class Siblings(Policy):
    name: ClassVar[str] = "siblings"
    in_order: ClassVar[bool] = True

    def __init__(self, slice_s: float = 0.5) -> None:
        super().__init__(slice_s)
        self._entered = [0.0] * BUCKETS  # of all jobs: left the bucket, by an end or by growing
        self._ended = [0.0] * BUCKETS
        self._spent = [0.0] * BUCKETS  # seconds
        self._families: dict[str, Family] = {}
        self._members: dict[str, Member] = {}
        self._plain: list[float] | None = None  # the ranks of who has no sibling that has run
        self._learned = 0  # counts ends, and jobs that grew into the next bucket

    def turns(self) -> Turns:
        return Shares(self.slice_s)

    def place(self, job: Job) -> Place:
        return (self._rank(job),)

    def displaces(self, waiting: Job, resident: Job) -> bool:
        return self._rank(waiting) < STAYS * self._rank(resident)

    def review_s(self, resident: Job) -> float | None:
        ran_s = resident.attained_s / resident.devices
        return EDGES[min(BUCKETS - 1, bucket_of(ran_s)) + 1] - ran_s

    def arrived(self, job: Job) -> Iterable[str]:
        family = self._families.setdefault(job.family, Family())
        member = Member(job.key, job.family, family.first + len(family.members))
        family.members.append(member)
        self._members[job.key] = member
        return self._stale(member)

    def ended(self, job: Job) -> Iterable[str]:
        member = self._seen(job)
        member.over = True
        self._learn()
        self._entered[member.bucket] += 1
        self._ended[member.bucket] += 1
        self._spent[member.bucket] += member.ran_s - EDGES[member.bucket]
        changed = self._stale(member)
        for old in self._families[member.family].forget():
            self._members.pop(old.key, None)
        return changed

    def _seen(self, job: Job) -> Member:
        """The member that a job is, with how far it has come."""
        if job.key not in self._members:
            self.arrived(job)
        member = self._members[job.key]
        member.ran_s = max(member.ran_s, job.attained_s / job.devices)
        while member.bucket < bucket_of(member.ran_s):
            self._entered[member.bucket] += 1
            self._spent[member.bucket] += WIDTH[member.bucket]
            member.bucket += 1
            self._learn()
        return member

    def _learn(self) -> None:
        """All that ranks are made of changes here: ends and buckets, never an arrival as such."""
        self._plain = None
        self._learned += 1

    def _stale(self, member: Member) -> list[str]:
        """Those near it whose ranks are of before something was learned take new ones. Of a
        thousand that are submitted before the first has run each would get the same again."""
        near = self._families[member.family].near(member.at)
        old = [other for other in near if other.ranks_of != self._learned]
        for other in old:
            other.ranks = None
        return [other.key for other in old if not other.over]

    def _rank(self, job: Job) -> float:
        """Seconds of a device for each end that may be expected of it."""
        member = self._seen(job)
        if member.ranks is None:
            member.ranks, member.ranks_of = self._ranks(member), self._learned
        return member.ranks[member.bucket] * job.devices * _WEIGHT_0 / job.weight

    def _ranks(self, member: Member) -> list[float]:
        if any(other.over or other.ran_s >= 1 for other in self._near(member)):
            return indices(*self._outlook(member))
        if self._plain is None:  # thousands may be submitted before the first has run
            self._plain = indices(*self._outlook(member))
        return self._plain

    def _near(self, member: Member) -> list[Member]:
        near = self._families[member.family].near(member.at)
        return [other for other in near if other is not member]

    def _outlook(self, member: Member) -> tuple[list[float], list[float]]:
        """For each bucket the chance that it ends there, and the seconds it would spend there."""
        grew, ends, spent = ([0.0] * BUCKETS for _ in range(3))
        for other in self._near(member):
            weight, b = 1 / abs(other.at - member.at), bucket_of(other.ran_s)
            for i in range(b):
                grew[i] += weight
            if other.over:
                ends[b] += weight
                spent[b] += weight * (other.ran_s - EDGES[b])
        chances, seconds, alive = [], [], 1.0
        for i in range(BUCKETS):
            all_of_it = self._entered[i] + _PRIOR_JOBS
            hazard_0 = (self._ended[i] + _PRIOR_JOBS * _PRIOR_HAZARD) / all_of_it
            passing = _PRIOR_JOBS * WIDTH[i] * (1 - _PRIOR_HAZARD / 2)
            seconds_0 = (self._spent[i] + passing) / all_of_it
            at_risk = grew[i] + ends[i] + PRIOR
            hazard = (ends[i] + PRIOR * hazard_0) / at_risk
            stays = (spent[i] + grew[i] * WIDTH[i] + PRIOR * seconds_0) / at_risk
            chances.append(alive * hazard)
            seconds.append(alive * stays)
            alive *= 1 - hazard
        return chances, seconds
