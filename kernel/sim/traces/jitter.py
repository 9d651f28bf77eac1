"""How much slower a gang is for its slowest worker: from measured step times (Alibaba PAI).

All workers of a gang wait for each other in every step, so a step takes what its slowest worker
takes. From the step times of many workers of one job, the slowdown of a gang of k is the mean, over
steps, of the largest of k workers' times, over the mean of all.
"""

from __future__ import annotations

import random
from collections import defaultdict

from llmos.kernel.errors import BadInput
from llmos.kernel.sim.traces.source import RowError, cell, number, open_source

COLUMNS = {"worker", "time", "batch_time_norm"}

DRAWS = 2_000


class Jitter:
    """Slowdowns by the size of a gang; 1 for a job on one device."""

    def __init__(self, steps: list[list[float]], seed: int) -> None:
        """`steps`: the times of the workers in each step. Needs one step with two workers."""
        self._steps, self._seed = [s for s in steps if len(s) > 1], seed
        times = [t for step in self._steps for t in step]
        self._mean = sum(times) / len(times) if times else 0.0
        if self._mean <= 0:
            raise BadInput("there is no step with the times of two workers")
        self._known: dict[int, float] = {1: 1.0}

    def slowdown(self, gang: int) -> float:
        if gang not in self._known:
            rng = random.Random(self._seed)
            total = 0.0
            for _ in range(DRAWS):
                step = rng.choice(self._steps)
                total += max(rng.choices(step, k=gang))
            self._known[gang] = max(1.0, total / DRAWS / self._mean)
        return self._known[gang]


def read_jitter(path: str, seed: int) -> Jitter:
    """Raises BadInput when the file has no step times."""
    source = open_source(path)
    if not source.lines or not set(source.lines[0].split(",")) >= COLUMNS:
        raise BadInput(f"{path} has no step times", f"it needs {', '.join(sorted(COLUMNS))}")
    steps: dict[str, list[float]] = defaultdict(list)
    for line, row in source.table():
        try:
            steps[cell(row, "time")].append(number(row, "batch_time_norm"))
        except RowError as exc:
            raise BadInput(f"{path}:{line}: {exc}") from None
    try:
        return Jitter(list(steps.values()), seed)
    except BadInput as exc:
        raise BadInput(f"{path}: {exc.message}") from None
