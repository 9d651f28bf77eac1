"""What /proc knows about OS processes: state, start time, children, private memory."""

from __future__ import annotations

import os
from pathlib import Path

# Fields of /proc/PID/stat after the name, and of /proc/PID/statm; see proc(5).
_STATE, _PARENT, _GROUP, _START = 0, 1, 2, 19
_DATA = 5

_PAGE = os.sysconf("SC_PAGE_SIZE")


def stat(os_pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name; None when there is no such process."""
    try:
        text = Path(f"/proc/{os_pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()


def started(os_pid: int) -> float:
    """Clock ticks after boot at which the process began; -1 when it is gone."""
    fields = stat(os_pid)
    return float(fields[_START]) if fields and fields[_STATE] not in "ZX" else -1.0


def is_stopped(os_pid: int) -> bool:
    """Has every thread of the process stopped (or is the process gone)?"""
    try:
        tasks = os.listdir(f"/proc/{os_pid}/task")
    except FileNotFoundError:
        return True
    for task in tasks:
        try:
            text = Path(f"/proc/{os_pid}/task/{task}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text[text.rindex(")") + 2] not in "TtZX":
            return False
    return True


def group(os_pid: int) -> int:
    """Its process group; -1 when it is gone."""
    fields = stat(os_pid)
    return int(fields[_GROUP]) if fields else -1


def children(os_pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [os_pid]
    for pid in found:
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
        except FileNotFoundError:
            continue
        for task in tasks:
            try:
                text = Path(f"/proc/{pid}/task/{task}/children").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found += [int(c) for c in text.split()]
    return found


def affinity(os_pid: int) -> set[int]:
    """The cores that a process may run on; none when it is gone."""
    try:
        return os.sched_getaffinity(os_pid)
    except ProcessLookupError:
        return set()


def private_bytes(os_pid: int) -> int:
    """Private anonymous memory: what would come back if the process went.

    Private_Dirty counts pages that only this process has and that no file backs. Pages shared
    with the zygote since the fork, and mapped weight files, are not among them.
    """
    return _rollup(os_pid, ("Private_Dirty:", "Private_Hugetlb:", "Swap:"))


def data_bytes(os_pid: int) -> int:
    """Private writable mappings, touched or not: what RLIMIT_DATA counts, and the stack (0.1 MiB).

    0 when the process is gone. Takes 20 us.
    """
    try:
        text = Path(f"/proc/{os_pid}/statm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.split()[_DATA]) * _PAGE


def resident_bytes(os_pid: int) -> int:
    """Resident pages that no file backs: nearly what `private_bytes` says, and takes 20 us.

    Pages shared with a parent since a fork are among them. 0 when the process is gone.
    """
    try:
        text = Path(f"/proc/{os_pid}/statm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, resident, shared, *_ = text.split()
    return (int(resident) - int(shared)) * _PAGE


def anonymous_bytes(os_pid: int) -> int:
    """All anonymous memory, shared with children or not: what a zygote is charged with."""
    return _rollup(os_pid, ("Anonymous:", "Swap:"))


def _rollup(os_pid: int, wanted: tuple[str, ...]) -> int:
    try:
        text = Path(f"/proc/{os_pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(wanted))
