"""Which CPU devices there are: cores by affinity, memory by cgroup limit, or as configured.

A device is written NAME[:key=value,...], as in `cpu0:cores=0-1,memory=8GiB`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llmos.drivers.base import DeviceInfo
from llmos.kernel.errors import BadArgument

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4,
          "ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}  # fmt: skip

# A limit this large means "none" in cgroup v1.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class CpuDevice:
    info: DeviceInfo
    cores: tuple[int, ...]


def parse_bytes(text: str) -> int:
    """`8GiB`, `500MB`, `1073741824` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None:
        raise BadArgument(f"{text!r} is not a size", "write it as 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


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
        cores += found
    return tuple(dict.fromkeys(cores))


def memory_bytes() -> tuple[int, int, str]:
    """(total, available, where the total comes from): of the machine, or of our cgroup."""
    meminfo = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    total, available = meminfo["MemTotal"], meminfo["MemAvailable"]
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            text = Path(limit_file).read_text().strip()
            limit = int(text) if text != "max" else _NO_LIMIT
            used = int(Path(usage_file).read_text())
        except (OSError, ValueError):
            continue
        if limit < total:
            return limit, max(0, limit - used), f"cgroup limit ({limit_file})"
    return total, available, "MemTotal"


def find(specs: list[str]) -> list[CpuDevice]:
    """The configured devices, or one of all cores and all memory. Raises BadArgument."""
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    total, _, source = memory_bytes()
    if not specs:
        info = DeviceInfo("cpu0", "cpu", total, len(allowed), "cpu", f"affinity; {source}")
        return [CpuDevice(info, allowed)]
    found = [_parse(spec, allowed, total, len(specs)) for spec in specs]
    _check_overlap(found, total)
    return found


def _parse(spec: str, allowed: tuple[int, ...], total: int, count: int) -> CpuDevice:
    name, _, rest = spec.partition(":")
    if not re.fullmatch(r"cpu\d+", name):
        raise BadArgument(f"device {name!r} is not known here", "CPU devices are cpu0, cpu1, ...")
    cores, capacity = allowed, total // count
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key == "cores" and equals:
            cores = parse_cores(value)
        elif key == "memory" and equals:
            capacity = parse_bytes(value)
        else:
            raise BadArgument(f"{spec}: {item!r} is not known", "write cores=0-1 or memory=8GiB")
    if capacity <= 0:
        raise BadArgument(f"{spec}: {name} has no memory", "write memory=8GiB")
    missing = [c for c in cores if c not in allowed]
    if missing:
        have = ", ".join(map(str, allowed))
        raise BadArgument(f"{spec}: core {missing[0]} is not available", f"cores here: {have}")
    return CpuDevice(DeviceInfo(name, "cpu", capacity, len(cores), "cpu", "configured"), cores)


def _check_overlap(found: list[CpuDevice], total: int) -> None:
    owner: dict[int, str] = {}
    for device in found:
        for core in device.cores:
            if core in owner:
                raise BadArgument(
                    f"core {core} is given to {owner[core]} and to {device.info.name}",
                    "give each core to one device",
                )
            owner[core] = device.info.name
    if len({d.info.name for d in found}) < len(found):
        raise BadArgument("two devices have the same name", "name them cpu0, cpu1, ...")
    asked = sum(d.info.capacity_bytes for d in found)
    if asked > total:
        raise BadArgument(
            f"the devices ask for {asked / 2**30:.1f} GiB; there are {total / 2**30:.1f} GiB",
            "lower memory=",
        )
