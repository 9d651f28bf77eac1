"""What a trace is made of: jobs, and the rows of a file that could not be used.

All times are seconds from the start of the trace. Knows no file and no scheduler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from llmos.kernel.process import Class


@dataclass(frozen=True, slots=True)
class SimJob:
    """Something that wants devices for a while.

    `duration_s` is what it takes with all of its devices to itself. Memory is of each of its
    devices: `memory_bytes`, or a `memory_share` of a device (0 to 1), or neither: then
    `--job-memory` says. `shared` bytes of the `model` are counted once, whoever uses it.
    """

    submit_s: float
    duration_s: float
    devices: int = 1
    memory_bytes: int = 0
    memory_share: float = 0.0
    cls: Class = Class.BATCH
    nice: int = 0
    user: str = "user"
    program: str = "job"
    step_s: float = 0.0  # seconds between two places where it can be moved out; 0: anywhere
    model: str = ""
    shared_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be read."""

    line: int
    why: str


@dataclass(slots=True)
class Trace:
    """What was read of one file."""

    path: str
    kind: str  # the format that was recognised
    jobs: list[SimJob] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # why -> how many good rows


def in_order(jobs: Iterable[SimJob]) -> list[SimJob]:
    """Sorted by arrival, the first at second 0. Ties keep their order in the file."""
    ordered = sorted(jobs, key=lambda j: j.submit_s)
    start = ordered[0].submit_s if ordered else 0.0
    return [replace(j, submit_s=j.submit_s - start) for j in ordered]


def scale_arrivals(jobs: Iterable[SimJob], factor: float) -> list[SimJob]:
    """The same jobs, coming `factor` times as fast."""
    return [replace(j, submit_s=j.submit_s / factor) for j in jobs]
