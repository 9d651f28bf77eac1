"""The configuration of a boot, frozen: from the command line, and nothing else yet."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, NoSuchThing

DRIVER_GROUP = "llmos.drivers"


@dataclass(frozen=True)
class Config:
    home: Path
    devices: tuple[str, ...] = ()  # as given: "cpu0:cores=0,memory=8GiB"; empty: the machine's CPU
    policy: str = "eevdf"
    measure_s: float = 1.0  # how often memory is measured


def check(config: Config) -> None:
    if config.policy != "eevdf":
        raise BadArgument(f"there is no policy {config.policy!r}", "this version has: eevdf")


def drivers_of(config: Config) -> dict[str, Any]:
    """Driver instances by kind: one for each kind of device that is configured, and the host."""
    by_kind: dict[str, list[str]] = {}
    for spec in config.devices or ("cpu0",):
        kind = spec.partition(":")[0].rstrip("0123456789")
        by_kind.setdefault(kind, []).append(spec)
    if not config.devices:
        by_kind = {"cpu": []}
    return {kind: load_driver(kind)(specs) for kind, specs in {**by_kind, "host": []}.items()}


def load_driver(kind: str) -> Any:
    """The driver class of a kind of device, through the entry points."""
    # llmos's own first: reading one distribution is ten times faster than reading all.
    own = [p for p in metadata.distribution("llmos").entry_points if p.group == DRIVER_GROUP]
    found = {p.name: p for p in own}
    if kind not in found:
        found |= {p.name: p for p in metadata.entry_points(group=DRIVER_GROUP)}
    if kind not in found:
        raise NoSuchThing(f"there is no driver for devices named {kind!r}",
                          f"drivers: {', '.join(sorted(found))}")  # fmt: skip
    return found[kind].load()
