"""The manifest: what can be run and called here, as data, made from entry points.

    python -P -m llmos.services.manifest FILE

writes FILE (JSON) unless it is up to date, and prints whether it did. It is keyed by the entry
points, the versions of their distributions and the times of their modules, so that the kernel
and the shell read schemas without importing anybody's code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmos.services import base as services
from llmos.services.programs import base as programs

FORMAT = 1
GROUPS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llmos.programs": programs.describe,
    "llmos.services": services.describe,
}


def key_of(points: list[importlib.metadata.EntryPoint]) -> str:
    """Changes when anything the manifest is made from may have changed."""
    parts = [f"format {FORMAT}", sys.version]
    for point in points:
        version = point.dist.version if point.dist else "?"
        spec = importlib.util.find_spec(point.module)
        origin = spec.origin if spec else None
        changed = os.stat(origin).st_mtime_ns if origin else 0
        parts.append(f"{point.group} {point.name} {point.value} {version} {changed}")
    parts += [str(os.stat(str(m.__file__)).st_mtime_ns) for m in (services, programs)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def make(points: list[importlib.metadata.EntryPoint]) -> dict[str, Any]:
    """Import each entry point and describe it; one that cannot be is named under `errors`."""
    manifest: dict[str, Any] = {"programs": {}, "services": {}, "errors": []}
    for point in points:
        try:
            described = GROUPS[point.group](point.load())
        except Exception as exc:  # noqa: BLE001  a broken plugin must not hide the others
            text = f"{point.group} {point.name} ({point.value}): {type(exc).__name__}: {exc}"
            manifest["errors"].append(text)
            continue
        described["entry"] = point.value
        described["distribution"] = point.dist.name if point.dist else ""
        manifest[point.group.removeprefix("llmos.")][point.name] = described
    return manifest


def entry_points() -> list[importlib.metadata.EntryPoint]:
    found = {(p.group, p.name): p for g in GROUPS for p in importlib.metadata.entry_points(group=g)}
    return [found[k] for k in sorted(found)]


def main() -> int:
    path = Path(sys.argv[1])
    points = entry_points()
    key = key_of(points)
    try:
        if json.loads(path.read_text()).get("key") == key:
            sys.stdout.write("current\n")
            return 0
    except (OSError, ValueError):
        pass  # there is none yet, or it is torn: made anew below
    manifest = {"key": key, **make(points)}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(manifest, indent=1))
    aside.rename(path)
    sys.stdout.write("made\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
