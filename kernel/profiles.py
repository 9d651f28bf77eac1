"""What earlier runs needed: planned segments and measured peaks, remembered by what decides them.

A process of a known profile needs no plan (a forked child, 20 ms and more), and its promise
is what a run like it has really taken. What decides memory is the program, its arguments but
those that its schema says cannot matter (`shape=False`), the kind of device, and the files that it
reads, by size and time. A file that is missing or has changed is no known profile: the plan then
checks it, and refuses what cannot be.

The file is a cache. It may be deleted; one that cannot be read is started afresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1

# So many profiles are kept, those used last.
MOST_PROFILES = 1000

# The promise covers the largest of the last runs: one odd run is forgotten after a few more.
LAST_PEAKS = 3

# A folder with more files than this is no model and no data set: looking at all of them would
# take longer than a plan.
MOST_FILES = 1000

Segments = list[dict[str, Any]]
Schema = dict[str, Any]


@dataclass
class _Profile:
    segments: Segments = field(default_factory=list)  # as planned; empty: never planned
    peaks: list[int] = field(default_factory=list)  # private bytes of the last runs, newest last


class Profiles:
    """All profiles of a home. `stamp` names the versions they are of: others are forgotten."""

    def __init__(self, path: Path, stamp: str, margin_share: float, margin_bytes: int) -> None:
        self._path, self._stamp = path, stamp
        self._margin_share, self._margin_bytes = margin_share, margin_bytes
        self._known: dict[str, _Profile] = {}  # by key, the one used last at the end
        self._dirty = False

    def __len__(self) -> int:
        return len(self._known)

    # ---- on disk ----

    def load(self, log: Callable[[str], None]) -> None:
        """Read the file. What is wrong with it is logged, and costs only what it knew."""
        try:
            held = json.loads(self._path.read_bytes())
            if (held["format"], held["stamp"]) != (FORMAT, self._stamp):
                log("profiles: of other versions, started afresh")
                return
            known = {key: _checked(value) for key, value in held["profiles"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            log(f"profiles: {self._path} cannot be read ({type(exc).__name__}), started afresh")
            return
        self._known = known
        self._forget_oldest()

    def save(self) -> None:
        """Write the file if anything changed: whole, or not at all. Raises OSError."""
        if not self._dirty:
            return
        held = {key: asdict(profile) for key, profile in self._known.items()}
        text = json.dumps({"format": FORMAT, "stamp": self._stamp, "profiles": held})
        # Not synced: after a power cut it may be torn, and then is started afresh.
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        aside.write_text(text)
        aside.rename(self._path)
        self._dirty = False

    # ---- what is known ----

    def lookup(self, key: str | None) -> Segments | None:
        """The promise for a process of this profile; None when it must be planned."""
        profile = self._known.get(key or "")
        if key is None or profile is None or not profile.segments:
            return None
        self._touch(key)
        return self._corrected(profile)

    def planned(self, key: str | None, segments: Segments) -> Segments:
        """Remember a plan -> the promise: the plan, or what was measured for it before."""
        if key is None or not segments:
            return segments
        profile = self._touch(key)
        profile.segments = [dict(s) for s in segments]
        return self._corrected(profile)

    def measured(self, key: str | None, peak_bytes: int) -> None:
        """Remember the peak of one run, once it has settled: its private bytes on one device."""
        if key is None or peak_bytes <= 0:
            return
        profile = self._touch(key)
        profile.peaks = [*profile.peaks, peak_bytes][-LAST_PEAKS:]

    def _touch(self, key: str) -> _Profile:
        profile = self._known.pop(key, None) or _Profile()
        self._known[key] = profile
        self._dirty = True
        self._forget_oldest()
        return profile

    def _forget_oldest(self) -> None:
        while len(self._known) > MOST_PROFILES:
            del self._known[next(iter(self._known))]

    def _corrected(self, profile: _Profile) -> Segments:
        """The segments, of which the private ones make up the measured peak and its margin."""
        if not profile.peaks:
            return [dict(s) for s in profile.segments]
        peak = max(profile.peaks)
        return scaled(profile.segments, peak + int(peak * self._margin_share) + self._margin_bytes)


def scaled(segments: Segments, private_bytes: int) -> Segments:
    """Segments whose private bytes are `private_bytes` together, each kind in its proportion.

    A measurement says how much, not what for. Shared segments are not in it, and stay.
    """
    shared = [dict(s) for s in segments if s.get("shared")]
    private = [s for s in segments if not s.get("shared")]
    before = sum(s["bytes"] for s in private)
    if not before:
        return [*shared, {"kind": "context", "bytes": private_bytes, "shared": ""}]
    made, given, seen = [], 0, 0
    for segment in private:
        # By the sums so far: rounding neither loses nor makes a byte.
        seen += segment["bytes"]
        upto = private_bytes * seen // before
        made.append({**segment, "bytes": upto - given})
        given = upto
    return [*shared, *made]


def key(schema: Schema, args: dict[str, Any], device_kind: str) -> str | None:
    """What decides the memory of a process, as one text; None when that cannot be known.

    It cannot for somebody's own command, and where an argument names a file that is not here
    (or a model on a hub) or a folder of too many files. Reads no file's content.
    """
    if schema.get("foreign"):
        return None
    parts: list[Any] = [schema["name"], schema["entry"], device_kind]
    for f in schema["args"]:
        if not f.get("shape", True):
            continue
        value = args.get(f["name"], f["default"])
        parts.append([f["name"], value])
        if (f.get("path") or f.get("model")) and value:
            identity = _identity(str(value))
            if identity is None:
                return None
            parts.append(identity)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _identity(path: str) -> list[Any] | None:
    """The size and time of a file, or of all files in a folder; None when there is none."""
    if not os.path.isabs(path):  # a name on a hub: what is behind it may change
        return None
    found = []
    try:
        for name, seen in _files(path):
            found.append([name, seen.st_size, seen.st_mtime_ns])
            if len(found) > MOST_FILES:
                return None
    except OSError:
        return None
    return sorted(found)


def _files(path: str) -> Iterator[tuple[str, os.stat_result]]:
    seen = os.stat(path)
    if not stat.S_ISDIR(seen.st_mode):
        yield "", seen
        return
    for folder, _, names in os.walk(path, onerror=_raise):
        for name in names:
            file = os.path.join(folder, name)
            yield os.path.relpath(file, path), os.stat(file)


def _raise(error: OSError) -> None:
    raise error


def _checked(value: Any) -> _Profile:
    """A profile of the file. Raises ValueError, KeyError, TypeError where it is none."""
    segments, peaks = value["segments"], value["peaks"]
    right = isinstance(segments, list) and isinstance(peaks, list)
    for segment in segments if right else []:
        right = right and isinstance(segment["kind"], str) and isinstance(segment["shared"], str)
        right = right and _is_size(segment["bytes"])
    if not right or not all(_is_size(p) for p in peaks):
        raise ValueError("not a profile")
    return _Profile(segments, peaks[-LAST_PEAKS:])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
