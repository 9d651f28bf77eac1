"""The configuration of a boot: the defaults, then `config.toml` of the home, then flags.

Everything is checked before anything is started. What is wrong is said in one line, with the
file and the line or the flag it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from llmos.kernel.errors import BadArgument, BadInput, HomeUnusable, NoSuchThing
from llmos.kernel.policies.base import Policy
from llmos.kernel.process import Class
from llmos.kernel.sched import SLICE_S
from llmos.kernel.settings import Settings
from llmos.kernel.units import parse_bytes

DRIVER_GROUP = "llmos.drivers"
POLICY_GROUP = "llmos.policies"
FILE = "config.toml"


def _number(default: float | None, low: float, high: float) -> Any:
    return field(default=default, metadata={"kind": "number", "low": low, "high": high})


def _bytes(default: int, high: int, low: int = 0) -> Any:
    return field(default=default, metadata={"kind": "size", "low": low, "high": high})


def _count(default: int, low: int, high: int) -> Any:
    return field(default=default, metadata={"kind": "count", "low": low, "high": high})


def _text(default: str) -> Any:
    return field(default=default, metadata={"kind": "text"})


@dataclass(frozen=True)
class Config:
    """What a boot was told. Fields with a kind are keys of the file; out of range raises
    BadArgument. docs/reference/configuration.md says why each default is what it is."""

    home: Path
    devices: tuple[str, ...] = ()  # as given: "cpu0:cores=0,memory=8GiB"; empty: the machine's CPU
    policy: str = _text("siblings")
    # The part of a device's time, as an average over a minute, that batch gets beside interactive
    # processes. Above a half it would be batch that preempts.
    batch_share: float = _number(0.05, 0, 0.5)
    slice_s: float = _number(0.5, 0.01, 60)  # the longest turn of a batch process on a CPU
    measure_s: float = _number(1.0, 0.05, 60)  # how often memory is measured
    # What a promise has above the measured peak.
    margin_share: float = _number(0.10, 0, 1)
    margin_bytes: int = _bytes(64 * 1024**2, 1 << 40)
    # How long an engine keeps its model after its last use; None: what each program says.
    keep_alive_s: float | None = _number(None, -1, 365 * 86400)
    min_residency_s: float = _number(30.0, 0, 86400)  # before it may be moved out to make room
    # Of device time without a sign of life: then a worker hangs. 0: never.
    hang_s: float = _number(300.0, 0, 30 * 86400)
    # Without a kernel for so long workers go to a safepoint, checkpoint and wait.
    alone_s: float = _number(20.0, 1, 86400)
    # Limits (docs/concepts/limits.md). Of one user:
    max_clients: int = _count(256, 1, 10_000)  # connections
    max_processes: int = _count(10_000, 1, 10_000_000)  # that have not ended
    user_memory: float = _number(1.0, 0.01, 1)  # part of each device's memory
    user_device_s: float = _number(0.0, 0, 1e9)  # device-seconds in a window; 0: no limit
    user_window_s: float = _number(86_400.0, 60, 31 * 86_400)
    # Of one client:
    max_open_requests: int = _count(256, 1, 100_000)
    client_buffer: int = _bytes(1 << 20, 1 << 30, low=4096)  # answers that wait for it
    # Of all clients together: parts of messages whose rest has not come.
    max_unfinished: int = _bytes(64 << 20, 1 << 40, low=16 << 20)
    log_size: int = _bytes(64 << 20, 1 << 50, low=64 << 10)  # of one process, on the disk
    # A shared machine (docs/concepts/security.md): whose members may connect.
    group: str = _text("")
    devices_from: str = ""  # "--device" or "config.toml"; empty: found
    services: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by name: limits

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.metadata and value is not f.default:
                _check(f, f.name, value)

    def argument_defaults(self) -> dict[str, Any]:
        """Values for arguments of programs that were not given, by the argument's name."""
        return {} if self.keep_alive_s is None else {"keep_alive_s": self.keep_alive_s}


KEYS = {f.name: f for f in dataclasses.fields(Config) if f.metadata}


@dataclass(frozen=True)
class _ServiceLimits:
    memory_bytes: int = _bytes(0, 1 << 50)


SERVICE_KEYS = {f.name: f for f in dataclasses.fields(_ServiceLimits)}


def load(home: Path, flags: Mapping[str, Any]) -> Config:
    """The configuration of the home at `home` under the `flags` that were given.

    `flags` has fields of Config; a flag wins over the file. Raises BadArgument, HomeUnusable.
    """
    values = _read(home / FILE)
    if "devices" in values:
        values["devices_from"] = FILE
    for name, value in flags.items():
        if name in KEYS:
            values[name] = _value(KEYS[name], "--" + name.replace("_", "-"), value)
        else:
            values[name] = value
    if flags.get("devices"):
        values["devices_from"] = "--device"
    return Config(home, **values)


def _read(path: Path) -> dict[str, Any]:
    """The keys of the file as fields of Config; none when there is no file."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise HomeUnusable(f"{path} cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError as exc:
        raise BadArgument(f"{path} is no UTF-8 text (byte {exc.start})") from None
    except tomllib.TOMLDecodeError as exc:
        raise BadArgument(f"{path} is not TOML: {exc}") from None
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name == "devices":
            values[name] = _devices(value)
        elif name == "services":
            values[name] = _services(value)
        elif name in KEYS:
            values[name] = _value(KEYS[name], f"{FILE}: {name}", value)
        else:
            raise _unknown(f"{FILE}: {name!r} is not known", name, ["devices", *KEYS, "services"])
    return values


def _services(value: Any) -> dict[str, dict[str, int]]:
    """`[services.NAME]` of the file: what the service NAME may have."""
    made: dict[str, dict[str, int]] = {}
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise BadArgument(
            f"{FILE}: services has a table for each service", "write [services.NAME] above its keys"
        )
    for service, table in value.items():
        for name, given in table.items():
            called = f"{FILE}: services.{service}: {name}"
            if name not in SERVICE_KEYS:
                raise _unknown(f"{called!r} is not known", name, list(SERVICE_KEYS))
            made.setdefault(service, {})[name] = _value(SERVICE_KEYS[name], called, given)
    return made


def _unknown(message: str, name: str, known: list[str]) -> BadArgument:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return BadArgument(message, hint)


def _value(f: dataclasses.Field[Any], called: str, value: Any) -> Any:
    """A value of the file or of a flag as its field has it. Raises BadArgument."""
    if f.metadata["kind"] == "size" and isinstance(value, str):
        try:
            value = parse_bytes(value)
        except BadArgument as exc:
            raise BadArgument(f"{called}: {exc.message}", exc.hint) from None
    _check(f, called, value)
    return float(value) if f.metadata["kind"] == "number" else value


def _check(f: dataclasses.Field[Any], called: str, value: Any) -> None:
    """Raises BadArgument when a value has the wrong type or is out of range."""
    kind = f.metadata["kind"]
    if kind == "text":
        if not isinstance(value, str):
            raise BadArgument(f"{called} is a text, not {value!r}"[:300])
        return
    low, high = f.metadata["low"], f.metadata["high"]
    right = int | float if kind == "number" else int
    if not isinstance(value, right) or isinstance(value, bool) or value != value:
        number = "a whole number" if kind == "count" else "a number"
        what = "a size, as in 64MiB" if kind == "size" else f"{number} from {low:g} to {high:g}"
        raise BadArgument(f"{called} is {what}, not {value!r}"[:300])
    if not low <= value <= high:
        bounds = f"{low} to {high} bytes" if kind == "size" else f"{low:g} to {high:g}"
        raise BadArgument(f"{called} is {bounds}, not {value!r}"[:300])


def _devices(value: Any) -> tuple[str, ...]:
    """`devices` of the file: texts as after --device, or tables with the same keys."""
    if not isinstance(value, list):
        raise BadArgument(
            f"{FILE}: devices is a list, not {value!r}"[:300],
            'write devices = ["cpu0:cores=0"], or a [[devices]] table for each',
        )
    return tuple(_device(entry, n) for n, entry in enumerate(value, 1))


def _device(entry: Any, number: int) -> str:
    called = f"{FILE}: device {number}"
    if isinstance(entry, str) and entry:
        return entry
    if not isinstance(entry, dict):
        raise BadArgument(f"{called} is a text or a table, not {entry!r}"[:300])
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        raise BadArgument(f"{called} has no name", 'write name = "cpu0"')
    for key in entry:
        # In TOML a key after a [[devices]] header is one of that device.
        if key in KEYS or key == "devices":
            raise BadArgument(
                f"{called} ({entry['name']}) has the key {key!r}, which is none of a device",
                "write it above the first [[devices]]",
            )
    name: str = entry["name"]
    items = [f"{k}={_item(called, k, v)}" for k, v in entry.items() if k != "name"]
    return f"{name}:{','.join(items)}" if items else name


def _item(called: str, key: str, value: Any) -> str:
    """One key of a device's table, as a driver reads it."""
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return "+".join(map(str, value))
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        text = str(value)
        if text and not set(text) & set(",=:\n"):
            return text
    raise BadArgument(f"{called}: {key} cannot be {value!r}"[:300])


def check(config: Config) -> None:
    """Raises what is wrong before anything is started."""
    policy_of(config)


def policy_of(config: Config) -> Policy:
    """The policy that the configuration names, through the entry points. Raises NoSuchThing."""
    found = _entry_points(POLICY_GROUP, config.policy)
    if config.policy not in found:
        near = difflib.get_close_matches(config.policy, found, 1)
        hint = f"did you mean {near[0]}?" if near else f"policies: {', '.join(sorted(found))}"
        raise NoSuchThing(f"there is no policy {config.policy!r}", hint)
    try:
        made: Policy = found[config.policy].load()(config.slice_s)
    except Exception as exc:  # noqa: BLE001  a plugin may raise anything; the boot says what
        raise BadInput(
            f"policy {config.policy!r} cannot be loaded: {type(exc).__name__}: {exc}",
            "boot with another --policy",
        ) from None
    return made


def settings_of(config: Config) -> Settings:
    """What the core is told of the configuration."""
    return Settings(
        batch_share=config.batch_share,
        slices={**SLICE_S, Class.BATCH: config.slice_s, Class.IDLE: config.slice_s},
        margin_share=config.margin_share,
        margin_bytes=config.margin_bytes,
        min_residency_s=config.min_residency_s,
        hang_s=config.hang_s,
        user_memory=config.user_memory,
        user_device_s=config.user_device_s,
        user_window_s=config.user_window_s,
    )


def drivers_of(config: Config) -> dict[str, Any]:
    """Driver instances by kind: one for each kind of device that is configured, and the host."""
    by_kind: dict[str, list[str]] = {}
    for spec in config.devices:
        kind = spec.partition(":")[0].rstrip("0123456789")
        if kind in ("", "host"):
            raise NoSuchThing(f"{spec!r} names no device", "write it as cpu0 or cpu0:memory=8GiB")
        by_kind.setdefault(kind, []).append(spec)
    if not config.devices:
        by_kind = {"cpu": []}
    return {kind: load_driver(kind)(specs) for kind, specs in {**by_kind, "host": []}.items()}


def load_driver(kind: str) -> Any:
    """The driver class of a kind of device, through the entry points."""
    found = _entry_points(DRIVER_GROUP, kind)
    if kind not in found:
        raise NoSuchThing(f"there is no driver for devices named {kind!r}",
                          f"drivers: {', '.join(sorted(found))}")  # fmt: skip
    return found[kind].load()


def _entry_points(group: str, wanted: str) -> dict[str, metadata.EntryPoint]:
    # llmos's own first: reading one distribution is ten times faster than reading all.
    own = [p for p in metadata.distribution("llmos").entry_points if p.group == group]
    found = {p.name: p for p in own}
    if wanted not in found:
        found |= {p.name: p for p in metadata.entry_points(group=group)}
    return found
