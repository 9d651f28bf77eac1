"""Sizes, times and intervals as people write them. Knows nothing else: every room may use it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmos.kernel.errors import BadArgument

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """`8GiB`, `8G` (the same: so llmos prints it), `500MB`, `1073741824` -> bytes.

    Raises BadArgument.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?(b?)", text.strip().lower())
    if match is None:
        raise BadArgument(f"{text!r} is not a size", "write it as 8GiB or 500MB")
    base = 1000 if match[4] and not match[3] else 1024
    return int(float(match[1]) * base ** _POWERS[match[2] or ""])


_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_PART_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

FOR_EVER = -1.0


def parse_duration(value: str | float) -> float:
    """`5m`, `1h30m`, `1.5s`, `300ms`, `2d`, `300` (seconds), `0` -> seconds; whatever is negative
    is FOR_EVER.

    Raises BadArgument.
    """
    text = str(value).strip().lower()
    bare = text.removeprefix("-")
    if re.fullmatch(r"\d+(?:\.\d+)?", bare):
        seconds = float(bare)
    elif re.fullmatch(f"(?:{_PART.pattern})+", bare):
        seconds = sum(float(number) * _PART_S[unit] for number, unit in _PART.findall(bare))
    else:
        raise BadArgument(f"{text!r} is no time", "write it as 30s, 5m, 1h30m or 2d")
    return FOR_EVER if text.startswith("-") and seconds else seconds


_EVERY = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
_SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3600.0),
}


@dataclass(frozen=True)
class Interval:
    """So many steps, or so many seconds; one of both is 0. Both are 0 where nobody has chosen."""

    steps: int = 0
    seconds: float = 0.0


def parse_interval(value: str | int) -> Interval:
    """`500`, `500steps`, `90s`, `10min`, `2h` -> an interval; 0 is nobody's choice.

    Raises BadArgument.
    """
    text = str(value).strip().lower()
    match = _EVERY.fullmatch(text)
    if match is None:
        raise BadArgument(f"{text!r} is no interval", _HOW)
    number, unit = match[1], match[2]
    if unit in ("", "step", "steps"):
        if "." in number:
            raise BadArgument(f"{text!r}: steps are whole", _HOW)
        return Interval(steps=int(number))
    if unit not in _SECONDS:
        raise BadArgument(f"{text!r}: there is no unit {unit!r}", _HOW)
    seconds = float(number) * _SECONDS[unit]
    if seconds < 1:
        raise BadArgument(f"{text!r}: an interval of time is at least 1s", _HOW)
    return Interval(seconds=seconds)


_HOW = "write it in steps or in time: 500, 500steps, 90s, 10min, 2h"
