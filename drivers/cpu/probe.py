"""Which CPU devices there are: cores by affinity, memory by cgroup limit, or as configured.

A device is written NAME[:key=value,...], as in `cpu0:cores=0-1,memory=8GiB`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmos.drivers.base import DeviceInfo
from llmos.drivers.cpu import cgroup
from llmos.kernel.errors import BadArgument
from llmos.kernel.units import parse_bytes

# Linux is built for at most 8,192; a typing error must not become a list of a billion.
MOST_CORES = 8192


@dataclass(frozen=True, slots=True)
class CpuDevice:
    info: DeviceInfo
    cores: tuple[int, ...]


def parse_cores(text: str) -> tuple[int, ...]:
    """`0-1+4` -> (0, 1, 4)."""
    cores: list[int] = []
    for part in text.split("+"):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise BadArgument(f"{text!r} is not a list of cores", "write it as 0-3 or 0+2")
        found = range(int(match[1]), int(match[2] or match[1]) + 1)
        if not found:
            raise BadArgument(
                f"{text!r} is not a list of cores", "write the smaller one first: 0-3"
            )
        if found.stop > MOST_CORES:
            raise BadArgument(f"{text!r} is not a list of cores", "so many there are nowhere")
        cores += found
    return tuple(dict.fromkeys(cores))


def find(specs: list[str], root: Path = Path("/")) -> list[CpuDevice]:
    """The configured devices, or one of all cores and all memory. Raises BadArgument.

    The memory is looked up in /proc and /sys under `root`.
    """
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    memory = cgroup.read(root)
    found = [_parse(spec, allowed, memory, max(1, len(specs))) for spec in specs or ["cpu0"]]
    _check_together(found, memory)
    return found


def _parse(spec: str, allowed: tuple[int, ...], memory: cgroup.Memory, count: int) -> CpuDevice:
    name, _, rest = spec.partition(":")
    if not re.fullmatch(r"cpu\d+", name):
        raise BadArgument(f"device {name!r} is not known here", "CPU devices are cpu0, cpu1, ...")
    cores, capacity = allowed, memory.total_bytes // count
    cores_why, memory_why = "affinity", memory.why
    if count > 1:
        memory_why = f"1/{count} of {memory.why}"
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key == "cores" and equals:
            cores, cores_why = parse_cores(value), "as given"
        elif key == "memory" and equals:
            capacity, memory_why = parse_bytes(value), "as given"
        else:
            raise BadArgument(f"{spec}: {item!r} is not known", "write cores=0-1 or memory=8GiB")
    if capacity <= 0:
        raise BadArgument(f"{spec}: {name} has no memory", "write memory=8GiB")
    missing = [c for c in cores if c not in allowed]
    if missing:
        have = show_cores(allowed)
        raise BadArgument(f"{spec}: core {missing[0]} is not available", f"cores here: {have}")
    why = f"cores {show_cores(cores)}: {cores_why}; memory: {memory_why}"
    return CpuDevice(DeviceInfo(name, "cpu", capacity, len(cores), "cpu", why), cores)


def show_cores(cores: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> `0-2+5`, as `parse_cores` reads it."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return "+".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _check_together(found: list[CpuDevice], memory: cgroup.Memory) -> None:
    if len({d.info.name for d in found}) < len(found):
        raise BadArgument("two devices have the same name", "name them cpu0, cpu1, ...")
    owner: dict[int, str] = {}
    for device in found:
        for core in device.cores:
            if core in owner:
                raise BadArgument(
                    f"core {core} is given to {owner[core]} and to {device.info.name}",
                    "give each core to one device",
                )
            owner[core] = device.info.name
    asked, total = sum(d.info.capacity_bytes for d in found), memory.total_bytes
    if asked > total:
        raise BadArgument(
            f"the devices ask for {asked / 2**30:.1f} GiB; "
            f"there are {total / 2**30:.1f} GiB ({memory.why})",
            "lower memory=",
        )
