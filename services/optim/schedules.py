"""Learning rate schedules, driven by the progress of a run in [0, 1].

They do not know steps or seconds: a run that is boxed in time and one that is boxed in steps
use the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmos.kernel.errors import BadArgument

# The learning rate ends at this part of its peak (cosine, linear).
FLOOR = 0.1


def constant(progress: float) -> float:
    return 1.0


def linear(progress: float) -> float:
    """From 1 down to FLOOR on a line."""
    return 1.0 - (1.0 - FLOOR) * progress


def cosine(progress: float) -> float:
    """From 1 down to FLOOR on half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}


def factor(schedule: str, progress: float, warmup: float) -> float:
    """What the peak learning rate is multiplied with.

    `progress` is the part of the run that is done; for the first `warmup` of it the factor
    rises on a line, then the schedule runs over the rest. Raises BadArgument.
    """
    if schedule not in SCHEDULES:
        raise BadArgument(f"there is no schedule {schedule!r}", f"one of {', '.join(SCHEDULES)}")
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    return SCHEDULES[schedule]((progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 1.0)
