"""Round robin: everybody gets a slice in turn, whatever its weight.

In the line for memory whoever came last is last; a resident goes out for a waiting one when it
has had its stay (the kernel keeps a minimum residency against thrashing).
"""

from __future__ import annotations

import itertools
from typing import ClassVar

from llmos.kernel.policies.base import Job, Ordered, Place, Policy, Turns


class RoundRobin(Policy):
    name: ClassVar[str] = "rr"
    in_order: ClassVar[bool] = True

    def turns(self) -> Turns:
        turn = itertools.count()
        return Ordered(lambda job: (float(next(turn)),), lambda job: job.request_s)

    def place(self, job: Job) -> Place:
        return (job.entered_at,)

    def displaces(self, waiting: Job, resident: Job) -> bool:
        return waiting.entered_at < resident.entered_at or resident.attained_s > 0

    def review_s(self, resident: Job) -> float | None:
        return self.slice_s
