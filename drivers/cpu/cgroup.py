"""How much memory this process may use: the machine's, or the tightest limit of its cgroups.

A limit of any ancestor counts, so each hierarchy (v2, and the memory controller of v1) is walked
from this process's group up to where it is mounted. What is not mounted here is not seen, and
what is seen is reported with the file it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# cgroup v1 writes "no limit" as the largest multiple of a page in 63 bits.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class Memory:
    """What there is and what is left, in bytes. `why`: where the total comes from."""

    total_bytes: int
    available_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class _Files:
    """The names that one version of cgroups uses."""

    kind: str  # the file system type in mountinfo
    limit: str
    usage: str
    inactive: str  # the line of memory.stat with file pages nobody has touched lately


_V2 = _Files("cgroup2", "memory.max", "memory.current", "inactive_file")
_V1 = _Files("cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def read(root: Path = Path("/")) -> Memory:
    """Look at /proc and /sys under `root`. Takes about 0.2 ms."""
    meminfo = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in (root / "proc/meminfo").read_text().splitlines()
    }
    total, available, why = meminfo["MemTotal"], meminfo["MemAvailable"], "MemTotal"
    for folder, files in _groups(root):
        limit = _number(folder / files.limit)
        if limit is None:
            continue
        left = limit - _in_use(folder, files)
        available = min(available, max(0, left))
        if limit < total:
            total, why = limit, f"cgroup limit (/{(folder / files.limit).relative_to(root)})"
    return Memory(total, available, why)


def _groups(root: Path) -> list[tuple[Path, _Files]]:
    """The folders of this process's group and of its ancestors, in every hierarchy.

    v1 mounts one folder for each controller: those without memory have no such files.
    """
    found: list[tuple[Path, _Files]] = []
    mounts = _mounts(root)
    for controllers, group in _memberships(root):
        files = _V1 if controllers else _V2
        for mounted_root, point in mounts.get(files.kind, ()):
            folder = _inside(group, mounted_root)
            if folder is None:
                continue
            top = root / point.lstrip("/")
            here = top / folder
            found += [(p, files) for p in (here, *here.parents) if p.is_relative_to(top)]
    return found


def _memberships(root: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each hierarchy with memory that we are in; "" is cgroup v2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # a system without cgroups has no limits
    split = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return [(c, path) for _, c, path in split if c == "" or "memory" in c.split(",")]


def _mounts(root: Path) -> dict[str, list[tuple[str, str]]]:
    """File system type -> (which part of it is mounted, where), for cgroups; see proc(5)."""
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split(" ", 1)[0]
        if kind in ("cgroup", "cgroup2") and len(fields) > 4:
            found.setdefault(kind, []).append((fields[3], fields[4]))
    return found


def _inside(group: str, mounted_root: str) -> str | None:
    """The folder of a group below a mount point that shows only the part under `mounted_root`.

    In a container the mount often shows just the container's own group, while
    /proc/self/cgroup names it from the real root; or that path is "/" (its own namespace).
    """
    path, top = PurePosixPath(group), PurePosixPath(mounted_root)
    if ".." in path.parts:  # outside of the namespace that the mount shows
        return None
    if path.is_relative_to(top):
        return str(path.relative_to(top))
    return "." if group == "/" else None


def _in_use(folder: Path, files: _Files) -> int:
    """Bytes charged to a group, less the file pages that go first when it is short."""
    used = _number(folder / files.usage) or 0
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return used
    for line in lines:
        name, _, value = line.partition(" ")
        if name == files.inactive:
            return max(0, used - int(value))
    return used


def _number(path: Path) -> int | None:
    """The limit or usage in a file; None where there is none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    if not text.isdigit() or int(text) >= _NO_LIMIT:
        return None
    return int(text)
