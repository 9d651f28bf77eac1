"""Which CUDA devices there are: those that CUDA_VISIBLE_DEVICES leaves visible, or as configured.

A device is written cudaN[:memory=20GiB]; N counts the visible ones.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from llmos.drivers.base import DeviceInfo
from llmos.drivers.cuda.nvml import Gpu, Gpus
from llmos.kernel.errors import BadArgument, NoSuchThing
from llmos.kernel.units import parse_bytes


@dataclass(frozen=True, slots=True)
class CudaDevice:
    info: DeviceInfo
    gpu: Gpu


def find(specs: list[str], gpus: Gpus) -> list[CudaDevice]:
    """The configured devices, or all visible ones. Raises BadArgument, NoSuchThing."""
    seen = visible(gpus)
    if not seen:
        raise NoSuchThing(
            "there is no CUDA device here",
            "`nvidia-smi -L` lists GPUs; CUDA_VISIBLE_DEVICES can hide them",
        )
    found = [_parse(spec, seen, gpus.version) for spec in specs or _all(seen)]
    if len({d.info.name for d in found}) < len(found):
        raise BadArgument("two devices have the same name", "name them cuda0, cuda1, ...")
    return found


def visible(gpus: Gpus) -> list[Gpu]:
    """The GPUs of this process, in CUDA's order: what it cannot read ends the list."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return [gpus.by_index(n) for n in range(gpus.count())]
    found = []
    for item in (part.strip() for part in asked.split(",")):
        try:
            found.append(gpus.by_index(int(item)) if item.isdigit() else gpus.by_uuid(item))
        except NoSuchThing:
            break
    return found


def _all(seen: list[Gpu]) -> list[str]:
    return [f"cuda{n}" for n in range(len(seen))]


def _parse(spec: str, seen: list[Gpu], version: str) -> CudaDevice:
    name, _, rest = spec.partition(":")
    match = re.fullmatch(r"cuda(\d+)", name)
    if match is None:
        raise BadArgument(
            f"device {name!r} is not known here", "CUDA devices are cuda0, cuda1, ..."
        )
    number = int(match[1])
    if number >= len(seen):
        raise BadArgument(f"there is no {name}", f"CUDA devices here: {', '.join(_all(seen))}")
    gpu = seen[number]
    capacity, source = (
        gpu.capacity_bytes,
        f"total less {gpu.reserved_bytes / 2**20:.0f} MiB reserved",
    )
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key != "memory" or not equals:
            raise BadArgument(f"{spec}: {item!r} is not known", "write memory=20GiB")
        capacity, source = parse_bytes(value), "configured"
    if not 0 < capacity <= gpu.capacity_bytes:
        raise BadArgument(
            f"{name} asks for {capacity / 2**30:.1f} GiB; the GPU has "
            f"{gpu.capacity_bytes / 2**30:.1f} GiB",
            "lower memory=, or leave it out for all of it",
        )
    why = f"{gpu.name}, driver {version}; memory: {source}"
    info = DeviceInfo(name, "cuda", capacity, 1, "cuda:0", why, moves_to="host")
    return CudaDevice(info, gpu)
