"""Packing: two workers on one device at the same time, where that was measured to help.

Side by side two processes may do more work than in turns (two trainings of one thread each on two
cores), or less (whatever needs the whole device). So a pair is tried for a while and judged by
the sum of its normalised throughputs: for each of the two its steps per second beside the other,
over its steps per second alone. Above 1.05 it is packed from then on; the verdict is remembered by
what the two processes are, not by their pids. Never with an interactive one, and only where the two
leave each other room: lanes of a CPU device, or a device that takes several workers at once.

Knows no process and no clock: rates and seconds are passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

# The sum of normalised throughputs from which on two go side by side; 1 is taking turns.
WORTH = 1.05

# A verdict is made from so much time side by side, and asked for again after so long.
TRIAL_S = 5.0
VERDICT_S = 600.0

# A rate counts when it was made from so many steps.
STEPS = 3

Pair = tuple[str, str]


@dataclass(slots=True)
class Rate:
    """Steps per second that a worker has its device for."""

    steps: int = 0
    seconds: float = 0.0

    def per_s(self) -> float | None:
        return self.steps / self.seconds if self.steps >= STEPS and self.seconds > 0 else None


@dataclass(slots=True)
class _Trial:
    since: float
    rates: dict[str, Rate] = field(default_factory=dict)


@dataclass(slots=True)
class Packing:
    # By what a process is: its steps per second alone, and the sum that a pair reached and when.
    alone: dict[str, Rate] = field(default_factory=dict)
    sums: dict[Pair, tuple[float, float]] = field(default_factory=dict)
    _trials: dict[Pair, _Trial] = field(default_factory=dict)

    def allows(self, a: str, b: str, now: float) -> bool:
        """Should these two be together now: because it helps, or to find out?"""
        if self.alone_rate(a) is None or self.alone_rate(b) is None:
            return False  # there is nothing to compare with yet
        verdict = self.sums.get(_pair(a, b))
        if verdict is None or now - verdict[1] > VERDICT_S:
            return True
        return verdict[0] > WORTH

    def alone_rate(self, a: str) -> float | None:
        return self.alone[a].per_s() if a in self.alone else None

    def worked_alone(self, a: str, steps: int, seconds: float) -> None:
        """`a` made so many steps in so many seconds of the whole device."""
        rate = self.alone.setdefault(a, Rate())
        if rate.seconds > 60.0:  # the older half counts half
            rate.steps, rate.seconds = rate.steps // 2, rate.seconds / 2
        rate.steps += steps
        rate.seconds += seconds

    def begin(self, a: str, b: str, now: float) -> None:
        """The two have the device together from now on."""
        self._trials.setdefault(_pair(a, b), _Trial(now))

    def worked_beside(self, a: str, b: str, steps: int, seconds: float) -> None:
        """`a` made so many steps in so many seconds beside `b`."""
        trial = self._trials.get(_pair(a, b))
        if trial is not None:
            rate = trial.rates.setdefault(a, Rate())
            rate.steps += steps
            rate.seconds += seconds

    def judge(self, a: str, b: str, now: float) -> float | None:
        """The sum for a pair once there is enough to judge by; it is remembered."""
        pair = _pair(a, b)
        trial = self._trials.get(pair)
        if trial is None:
            return None
        parts = []
        for key in {a, b}:
            beside = trial.rates.get(key, Rate())
            rate, alone = beside.per_s(), self.alone_rate(key)
            if rate is None or alone is None or beside.seconds < TRIAL_S:
                return None
            parts.append(rate / alone)
        total = math.fsum(parts) if a != b else 2 * parts[0]
        self.sums[pair] = (total, now)
        del self._trials[pair]
        return total

    def to_wire(self) -> list[dict[str, Any]]:
        """What is known of pairs, for `status` and for the disk."""
        return [
            {"pair": list(pair), "sum": round(total, 3), "at": at}
            for pair, (total, at) in self.sums.items()
        ]

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Verdicts of an earlier kernel."""
        for row in rows:
            a, b = row["pair"]
            self.sums[_pair(str(a), str(b))] = (float(row["sum"]), float(row["at"]))


def _pair(a: str, b: str) -> Pair:
    return (a, b) if a <= b else (b, a)
