"""Shortest job first, by prediction: what is nearest to its end goes first.

Where nothing is known of a job's end it goes behind those of which something is, in the order of
arrival. A resident is moved out for one that needs less than half of what it still needs: at a
smaller gain the two moves cost more than they bring.
"""

from __future__ import annotations

import math
from typing import ClassVar

from llmos.kernel.policies.base import Job, Ordered, Place, Policy, Turns

# A prediction is rarely better than this, and a move costs time.
WORTH_A_MOVE = 0.5


class ShortestFirst(Policy):
    name: ClassVar[str] = "sjf"
    in_order: ClassVar[bool] = True

    def turns(self) -> Turns:
        return Ordered(self.place, lambda job: job.request_s)

    def place(self, job: Job) -> Place:
        return (math.inf if job.predicted_s is None else job.predicted_s, job.submitted_at)

    def displaces(self, waiting: Job, resident: Job) -> bool:
        if waiting.predicted_s is None:
            return False
        left = math.inf if resident.predicted_s is None else resident.predicted_s
        return waiting.predicted_s < WORTH_A_MOVE * left
