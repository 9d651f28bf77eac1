"""A policy that may be wrong: when it raises, the default takes its place and nobody loses a turn.

A policy is trusted code of the kernel, but a bug in it must not take the machine down. The wrapper
knows which jobs are queued, so that the default can go on with them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any, ClassVar

from llmos.kernel.policies.base import NOBODY, Job, Place, Policy, Turns
from llmos.kernel.policies.siblings import Siblings

Failed = Callable[[str], None]


class Guarded(Policy):
    """`policy` until it raises, the default from then on. `failed` gets one line, once."""

    name: ClassVar[str] = "guarded"

    def __init__(self, policy: Policy, failed: Failed) -> None:
        super().__init__(policy.slice_s)
        self.inner = policy
        self._failed = failed
        self._spare = Siblings(policy.slice_s)

    @property
    def broken(self) -> bool:
        return self.inner is self._spare

    def give_up(self, exc: Exception) -> None:
        if not self.broken:
            name, self.inner = self.inner.name, self._spare
            self._failed(f"policy {name!r} raised {type(exc).__name__}: {exc}; the default goes on")

    def turns(self) -> Turns:
        return GuardedTurns(self)

    def place(self, job: Job) -> Place:
        found: Place = self._ask("place", lambda place: tuple(map(float, place)), job)
        return found

    @property
    def displacing(self) -> bool:  # type: ignore[override]
        return self.inner.displacing

    @property
    def in_order(self) -> bool:  # type: ignore[override]
        return self.inner.in_order

    def displaces(self, waiting: Job, resident: Job) -> bool:
        return bool(self._ask("displaces", bool, waiting, resident))

    def review_s(self, resident: Job) -> float | None:
        found: float | None = self._ask(
            "review_s", lambda s: None if s is None else float(s), resident
        )
        return found

    def arrived(self, job: Job) -> Iterable[str]:
        return list(self._ask("arrived", list, job))

    def ended(self, job: Job) -> Iterable[str]:
        return list(self._ask("ended", list, job))

    def _ask(self, question: str, convert: Callable[[Any], Any], *about: Job) -> Any:
        """The policy's answer, or the default's when it raises or answers what it cannot be."""
        try:
            return convert(getattr(self.inner, question)(*about))
        except Exception as exc:  # noqa: BLE001  whatever it raises, the machine goes on
            self.give_up(exc)
            return convert(getattr(self.inner, question)(*about))


class GuardedTurns(Turns):
    def __init__(self, policy: Guarded) -> None:
        self._policy = policy
        self._jobs: dict[str, Job] = {}
        self._of: Policy = policy.inner
        try:
            self._inner = self._of.turns()
        except Exception as exc:  # noqa: BLE001
            policy.give_up(exc)
            self._rebuild()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job, lag_s: float = 0.0) -> None:
        self._follow()
        # Last, so that a rebuild does not add it twice.
        broke = self._tried(lambda: self._inner.add(job, lag_s))
        self._jobs[job.key] = job
        if broke:
            self._rebuild()

    def remove(self, key: str) -> float:
        self._follow()
        del self._jobs[key]
        return float(self._ask(lambda: self._inner.remove(key)) or 0.0)

    def charge(self, key: str, used_s: float) -> None:
        self._ask(lambda: self._inner.charge(key, used_s))

    def pick(self, skip: Container[str] = NOBODY) -> str | None:
        def picked() -> str | None:
            found = self._inner.pick(skip)
            if found is not None and (found not in self._jobs or found in skip):
                raise ValueError(f"picked {found!r}, who does not wait")
            return found

        found: str | None = self._ask(picked, again=True)
        return found

    def left_s(self, key: str) -> float:
        def left() -> float:
            seconds = float(self._inner.left_s(key))
            if not seconds > 0:
                raise ValueError(f"a turn of {seconds} s")
            return seconds

        return float(self._ask(left, again=True))

    def renice(self, key: str, weight: float) -> None:
        self._jobs[key].weight = weight
        self._ask(lambda: self._inner.renice(key, weight))

    def request(self, key: str, request_s: float) -> None:
        self._ask(lambda: self._inner.request(key, request_s))

    def may_run(self, key: str) -> bool:
        return bool(self._ask(lambda: self._inner.may_run(key), again=True))

    def check(self) -> None:
        self._follow()
        self._inner.check()

    def _ask(self, question: Callable[[], Any], again: bool = False) -> Any:
        """The answer of the policy's turns; when they raise, the default's where it has to be
        asked `again` (what changes something is in the jobs that it is made of)."""
        self._follow()
        found: list[Any] = []
        if self._tried(lambda: found.append(question())):
            self._rebuild()
            return question() if again else None
        return found[0]

    def _tried(self, what: Callable[[], Any]) -> bool:
        """Whether it raised: then the policy has been given up."""
        try:
            what()
        except Exception as exc:  # noqa: BLE001  whatever it raises, the machine goes on
            self._policy.give_up(exc)
            return True
        return False

    def _follow(self) -> None:
        """The policy broke elsewhere: this queue goes over to the default too."""
        if self._of is not self._policy.inner:
            self._rebuild()

    def _rebuild(self) -> None:
        self._of = self._policy.inner
        self._inner = self._of.turns()
        for job in self._jobs.values():
            self._inner.add(job)
