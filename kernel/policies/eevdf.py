"""EEVDF as a policy: shares by weight, first among users, then among a user's processes.

Turns on a device follow the algorithm in `runqueue`, in two levels: a user's share does not grow
with the number of its processes. In the line for memory the one that has had least for its weight
goes first, and a resident goes out for one that has had less by a whole stay.
"""

from __future__ import annotations

from collections.abc import Container
from typing import ClassVar

from llmos.kernel.policies.base import NOBODY, Job, Place, Policy, Turns
from llmos.kernel.policies.runqueue import RunQueue

USER_WEIGHT = 1024.0


class Shares(Turns):
    """Workers by weighted shares within shares of their users."""

    def __init__(self, slice_s: float) -> None:
        self._slice_s = slice_s
        self._users = RunQueue()
        self._of_user: dict[str, RunQueue] = {}
        self._jobs: dict[str, Job] = {}
        self._user_lags: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job, lag_s: float = 0.0) -> None:
        if job.user not in self._of_user:
            self._of_user[job.user] = RunQueue()
            lag = self._user_lags.pop(job.user, 0.0)
            self._users.add(job.user, USER_WEIGHT, self._slice_s, lag)
        self._of_user[job.user].add(job.key, job.weight, job.request_s, lag_s)
        self._jobs[job.key] = job

    def remove(self, key: str) -> float:
        user = self._jobs.pop(key).user
        lag_s = self._of_user[user].remove(key)
        if not len(self._of_user[user]):
            del self._of_user[user]
            self._user_lags[user] = self._users.remove(user)
        return lag_s

    def charge(self, key: str, used_s: float) -> None:
        job = self._jobs[key]
        job.attained_s += used_s * job.devices
        self._of_user[job.user].charge(key, used_s)
        self._users.charge(job.user, used_s)

    def pick(self, skip: Container[str] = NOBODY) -> str | None:
        passed: set[str] = set()
        while (user := self._users.pick(passed)) is not None:
            key = self._of_user[user].pick(skip)
            if key is not None:
                return key
            passed.add(user)
        return None

    def left_s(self, key: str) -> float:
        return self._of_user[self._jobs[key].user].left_s(key)

    def renice(self, key: str, weight: float) -> None:
        job = self._jobs[key]
        job.weight = weight
        self._of_user[job.user].set_weight(key, weight)

    def request(self, key: str, request_s: float) -> None:
        job = self._jobs[key]
        job.request_s = request_s
        self._of_user[job.user].set_request(key, request_s)

    def may_run(self, key: str) -> bool:
        user = self._jobs[key].user
        return self._of_user[user].eligible(key) and self._users.eligible(user)

    def lag_s(self, key: str) -> float:
        """What a worker is owed of its user's time, in seconds."""
        return self._of_user[self._jobs[key].user].lag_s(key)

    def check(self) -> None:
        for queue in self._of_user.values():
            total = sum(queue.lag_s(k) for k, j in self._jobs.items() if k in queue)
            assert abs(total) < 1e-6, f"lags sum to {total}"


class Eevdf(Policy):
    name: ClassVar[str] = "eevdf"
    in_order: ClassVar[bool] = True

    # A stay in memory that is worth its two moves, in device-seconds of a process of nice 0.
    stay_s: ClassVar[float] = 60.0

    def turns(self) -> Turns:
        return Shares(self.slice_s)

    def place(self, job: Job) -> Place:
        return (job.attained_s / job.weight, job.submitted_at)

    def displaces(self, waiting: Job, resident: Job) -> bool:
        behind = resident.attained_s / resident.weight - waiting.attained_s / waiting.weight
        return behind > self.stay_s * resident.devices / resident.weight

    def review_s(self, resident: Job) -> float | None:
        return self.stay_s
