"""The manifest: what can be run, called and used here, as data, made from entry points.

    python -P -m llmos.services.manifest FILE

writes FILE (JSON) unless it is up to date, and prints whether it did. Where there is none, a first
one has llmos's own only ("begun"), and is replaced by the whole one ("made"). It is keyed by the
entry points, the versions of their distributions and the times of their modules, so that the
kernel and the shell read schemas without importing anybody's code.

Each plugin's program or service is imported in a process of its own, for a limited time: one that
raises, hangs or exits while it is imported is left out with its error, and takes nobody along.
Sources and optimizers are not imported at all: what is said of them stands in their source text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmos.services import base as services
from llmos.services import call_types, found, isolated
from llmos.services.programs import base as programs

FORMAT = 2
OURS = "llmos"  # the distribution whose code is imported without fear

EntryPoint = importlib.metadata.EntryPoint

GROUPS: dict[str, Callable[[EntryPoint], dict[str, Any]]] = {
    "llmos.programs": lambda point: programs.describe(point.load()),
    "llmos.services": lambda point: services.describe(point.load()),
    "llmos.sources": found.describe,
    "llmos.optimizers": found.describe,
}
IMPORTED = ("llmos.programs", "llmos.services")

# How many plugins are imported at the same time.
AT_ONCE = 8


def key_of(points: list[EntryPoint]) -> str:
    """Changes when anything the manifest is made from may have changed."""
    parts = [f"format {FORMAT}", sys.version]
    parts += [f"{p.group} {p.name} {p.value} {version_of(p)} {found.code_of(p)}" for p in points]
    made_by = (services, call_types, found, programs)
    parts += [str(os.stat(str(m.__file__)).st_mtime_ns) for m in made_by]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def version_of(point: EntryPoint) -> str:
    return point.dist.version if point.dist else "?"


def make(points: list[EntryPoint]) -> dict[str, Any]:
    """Describe each entry point; one that cannot be is named under `errors` and `broken`."""
    manifest: dict[str, Any] = {g.removeprefix("llmos."): {} for g in GROUPS}
    manifest |= {"errors": [], "broken": []}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        apart = {p: pool.submit(isolated.describe, p) for p in points if _is_apart(p)}
        here = {p: _describe(p) for p in points if p not in apart}
    for point in points:
        data, error, printed = apart[point].result() if point in apart else here[point]
        kind = point.group.removeprefix("llmos.")
        where = {"entry": point.value, "distribution": _distribution(point)}
        if point.name in manifest[kind]:
            taken = manifest[kind][point.name]["distribution"]
            data, error, printed = None, f"{taken} has one of this name already", ""
        if data is None:
            manifest["errors"].append(f"{point.group} {point.name} ({point.value}): {error}")
            told = {"kind": kind, "name": point.name, "error": error, "printed": printed}
            manifest["broken"].append({**told, **where})
        else:
            manifest[kind][point.name] = {**data, **where, "code": found.code_of(point)}
    for schema in manifest["programs"].values():
        _offer(schema, manifest)
    return manifest


def _is_apart(point: EntryPoint) -> bool:
    """Would it mean to run somebody else's code?"""
    return point.group in IMPORTED and not _is_ours(point)


def _describe(point: EntryPoint) -> isolated.Described:
    """What it is, or why nobody knows."""
    try:
        return isolated.Described(GROUPS[point.group](point))
    except Exception as exc:  # noqa: BLE001  one that is broken must not hide the others
        return isolated.Described(None, f"{type(exc).__name__}: {exc}")


def _offer(schema: dict[str, Any], manifest: dict[str, Any]) -> None:
    """An argument that names an optimizer (or a source) has those that are installed as choices."""
    for field in schema["args"]:
        if field.get("plugin"):
            field["choices"] = sorted(manifest[field["plugin"]])


def entry_points() -> list[EntryPoint]:
    """By group and name; of two with the same name llmos's own is first."""
    every = [p for g in GROUPS for p in importlib.metadata.entry_points(group=g)]
    return sorted(every, key=lambda p: (p.group, p.name, not _is_ours(p), _distribution(p)))


def _distribution(point: EntryPoint) -> str:
    return str(point.dist.name) if point.dist else ""


def _is_ours(point: EntryPoint) -> bool:
    return _distribution(point) == OURS


def is_current(path: Path, key: str) -> bool:
    """Is there nothing new? What was broken is tried again: it may have been mended elsewhere."""
    try:
        manifest = json.loads(path.read_text())
        return bool(manifest.get("key") == key and not manifest["broken"])
    except (OSError, ValueError, KeyError, AttributeError):
        return False  # there is none yet, or it is torn, or an older llmos made it


def main() -> int:
    path = Path(sys.argv[1])
    points = entry_points()
    key = key_of(points)
    if is_current(path, key):
        sys.stdout.write("current\n")
        return 0
    if not path.exists():
        # Nobody waits for a plugin that is slow to import before there is anything at all.
        write(path, {"key": "", **make([p for p in points if _is_ours(p)])})
        sys.stdout.write("begun\n")
        sys.stdout.flush()
    write(path, {"key": key, **make(points)})
    sys.stdout.write("made\n")
    return 0


def write(path: Path, manifest: dict[str, Any]) -> None:
    """A reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(manifest, indent=1))
    aside.rename(path)


if __name__ == "__main__":
    raise SystemExit(main())
