"""Rows of the journal: a process as bytes, versioned, with a checksum; and back.

A row of version 2 is a MessagePack map {v, sum, body}: `body` is a packed map {seq, process,
worker}, `sum` its CRC-32. So a row says by itself where it ends, whether it is whole, and which of
two rows of a process is the newer one: what fsck needs to find rows in a database that is broken.
Version 1 was {v, process, worker}. Rows of older versions open for ever.
"""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
import zlib
from typing import Any

import msgpack

from llmos.kernel.errors import HomeUnusable
from llmos.kernel.process import Class, Memory, Process, Residency, Role, State

ROW_VERSION = 2

# How a row of this version begins.
SIGNATURE = b"\x83\xa1v\x02\xa3sum\xc4\x04"

Worker = dict[str, Any]

_NAMES = tuple(f.name for f in dataclasses.fields(Process))
_MEMORY = tuple(f.name for f in dataclasses.fields(Memory))
_values = operator.attrgetter(*_NAMES)
_memory_values = operator.attrgetter(*_MEMORY)
_AT_MEMORY = _NAMES.index("memory")


def _allowed(hint: Any) -> tuple[type, ...]:
    """The types that a value of an annotated field may have."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(t for part in typing.get_args(hint) for t in _allowed(part))
    plain = typing.get_origin(hint) or hint
    return (int, float) if plain is float else (plain,)


# What a field may be. A row that has something else there was not written by any version: nothing
# of it can be trusted.
_ALLOWED = {name: _allowed(hint) for name, hint in typing.get_type_hints(Process).items()}


class DamagedRow(Exception):
    """These bytes are no row that any version has written."""


class NewerRow(HomeUnusable):
    """A row of a version that is not known yet."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"the journal has rows of version {version}, this llmos knows {ROW_VERSION}: "
            "a newer one wrote them, and nothing was changed",
            "start it with the newer llmos, or choose another folder with LLMOS_HOME",
        )


def pack_row(proc: Process, worker: Worker, seq: int = 0) -> bytes:
    values = list(_values(proc))
    values[_AT_MEMORY] = dict(zip(_MEMORY, _memory_values(proc.memory), strict=True))
    process = dict(zip(_NAMES, values, strict=True))
    body: bytes = msgpack.packb({"seq": seq, "process": process, "worker": worker})
    return seal(body)


def seal(body: bytes) -> bytes:
    row: bytes = msgpack.packb(
        {"v": ROW_VERSION, "sum": zlib.crc32(body).to_bytes(4, "big"), "body": body}
    )
    return row


def unpack_row(row: bytes) -> tuple[Process, Worker]:
    """A row of this or an older version. Raises DamagedRow, NewerRow."""
    return unpack(row)[:2]


def unpack(row: bytes) -> tuple[Process, Worker, int]:
    """(process, worker, seq). Fields that are not known any more are dropped, those that did not
    exist yet have their defaults. Raises DamagedRow, NewerRow."""
    value = _map(row)
    version = value.get("v")
    if not isinstance(version, int) or version < 1:
        raise DamagedRow("it has no version")
    if version > ROW_VERSION:
        raise NewerRow(version)
    if version >= 2:
        body, told = value.get("body"), value.get("sum")
        if not isinstance(body, bytes) or zlib.crc32(body).to_bytes(4, "big") != told:
            raise DamagedRow("its checksum is wrong")
        value = _map(body)
    try:
        worker, seq = value.get("worker", {}), value.get("seq", 0)
        if not isinstance(worker, dict) or not isinstance(seq, int):
            raise DamagedRow("it is no map of a process")
        return _process(value["process"]), worker, seq
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DamagedRow(f"it is no process ({type(exc).__name__}: {exc})") from None


def _map(data: bytes) -> dict[str, Any]:
    try:
        value = msgpack.unpackb(data, strict_map_key=False)
    except Exception as exc:  # noqa: BLE001  msgpack raises a dozen kinds for bytes that are none
        raise DamagedRow(f"it cannot be read ({type(exc).__name__})") from None
    if not isinstance(value, dict):
        raise DamagedRow("it is no map")
    return value


def _process(body: dict[str, Any]) -> Process:
    if body.get("device"):  # of a version in which a process had one device
        body.setdefault("devices", [body["device"]])
    body = {k: v for k, v in body.items() if k in _ALLOWED}
    body["devices"] = tuple(body.get("devices", ()))
    memory = {k: v for k, v in body.get("memory", {}).items() if k in _MEMORY}
    body["memory"] = Memory(**memory)
    body["cls"] = Class(body["cls"])
    body["state"] = State(body["state"])
    body["residency"] = Residency(body["residency"])
    body["role"] = Role(body["role"])
    body["story"] = [tuple(line) for line in body.get("story", [])]
    for name, value in body.items():
        if not isinstance(value, _ALLOWED[name]):
            raise DamagedRow(f"{name} is {value!r}"[:100])
    proc = Process(**body)
    if (proc.exit_status is not None) != (proc.state is State.EXITED):
        raise DamagedRow(f"it is {proc.state} with exit status {proc.exit_status}")
    return proc
