"""First come, first served: a job keeps its device and its memory until it is done."""

from __future__ import annotations

from typing import ClassVar

from llmos.kernel.policies.base import Job, Ordered, Place, Policy, Turns


class Fifo(Policy):
    name: ClassVar[str] = "fifo"
    displacing: ClassVar[bool] = False

    def turns(self) -> Turns:
        return Ordered(lambda job: (job.submitted_at,))

    def place(self, job: Job) -> Place:
        return (job.submitted_at,)
