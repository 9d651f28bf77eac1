"""Least attained service in levels: who has had little goes before who has had much.

Nothing is known of a job's length, but most are short: what has run for long will probably run
for long (Nuyens and Wierman 2008; in levels, so that equals do not take turns: Tiresias,
NSDI 2019). A job sinks through geometric levels of device-seconds; within a level the earlier one
goes first. Seconds count less for a job of more weight.
"""

from __future__ import annotations

import bisect
from typing import ClassVar

from llmos.kernel.policies.base import Job, Ordered, Place, Policy, Turns

LEVELS_S = (60.0, 300.0, 1_800.0, 10_800.0, 86_400.0, 864_000.0)
_WEIGHT_0 = 1024.0


class LeastAttained(Policy):
    name: ClassVar[str] = "las"
    in_order: ClassVar[bool] = True

    def turns(self) -> Turns:
        return Ordered(self.place, lambda job: job.request_s)

    def place(self, job: Job) -> Place:
        return (self.level(job), job.submitted_at)

    def level(self, job: Job) -> int:
        return bisect.bisect_right(LEVELS_S, job.attained_s * _WEIGHT_0 / job.weight + 1e-6)

    def displaces(self, waiting: Job, resident: Job) -> bool:
        return self.level(waiting) < self.level(resident)

    def review_s(self, resident: Job) -> float | None:
        level = self.level(resident)
        if level == len(LEVELS_S):
            return None
        left = LEVELS_S[level] * resident.weight / _WEIGHT_0 - resident.attained_s
        return left / resident.devices
