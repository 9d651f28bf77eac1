"""Simulated devices from a few letters: `16xH100-80G`, `2xsim-8GiB`, `A100-40G`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmos.kernel.errors import BadArgument
from llmos.kernel.units import parse_bytes

_SPEC = re.compile(r"(?:(\d+)x)?([A-Za-z][\w.]*)-(\S+)")

MOST_DEVICES = 100_000


@dataclass(frozen=True, slots=True)
class SimDevice:
    name: str
    capacity_bytes: int


def parse_devices(specs: Sequence[str]) -> list[SimDevice]:
    """The devices of all groups. Raises BadArgument."""
    groups = [_parse(spec) for spec in specs]
    counts: dict[str, int] = {}
    found = []
    for n, name, capacity in groups:
        for _ in range(n):
            number = counts[name] = counts.get(name, -1) + 1
            found.append(SimDevice(f"{name.lower()}-{number}", capacity))
    if not found or len(found) > MOST_DEVICES:
        raise BadArgument(f"{len(found)} devices cannot be simulated", f"1 to {MOST_DEVICES:,} can")
    return found


def _parse(spec: str) -> tuple[int, str, int]:
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise BadArgument(
            f"{spec!r} says no devices", "write how many, what and their memory: 16xH100-80G"
        )
    capacity = parse_bytes(match[3])
    if capacity <= 0:
        raise BadArgument(f"{spec!r}: a device without memory holds nothing")
    return int(match[1] or 1), match[2], capacity
