"""Where a pull keeps what it has fetched until the model is there, and whether there is room.

The folder outlives the process that fetched: who pulls the same again goes on from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmos.kernel.errors import Busy, HomeUnusable

MIB = 1024**2

# Beginning with a dot: the registry lists no such folder.
PREFIX = ".pull-"

LOCK = "lock"

# A disk that is filled to its last byte by a model cannot write a log line either.
SPARE_BYTES = 64 * MIB


@contextlib.contextmanager
def staging(models: Path, key: str, pid: int) -> Iterator[Path]:
    """`models/.pull-UID-KEY`, for this process alone. It goes when nothing was raised, or when
    there is nothing in it. Raises Busy.
    """
    folder = models / f"{PREFIX}{os.getuid()}-{key}"
    lock = _locked(folder, key, pid)
    try:
        yield folder
        shutil.rmtree(folder)
    except BaseException:
        if os.listdir(folder) == [LOCK]:
            shutil.rmtree(folder)
        raise
    finally:
        os.close(lock)


def _locked(folder: Path, key: str, pid: int) -> int:
    """The folder, made and locked -> a descriptor whose end is that of the lock. Raises Busy."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # whoever had it has just ended, and taken the folder away
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(lock, 32).decode(errors="replace").strip() or "?"
            os.close(lock)
            raise Busy(
                f"process {other} pulls {key} at this moment", f"`llmos attach {other}` shows it"
            ) from None
        if os.fstat(lock).st_nlink:
            break
        os.close(lock)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{pid}\n".encode(), 0)
    return lock


def check_room(folder: Path, need_bytes: int, what: str) -> None:
    """Raise HomeUnusable when the disk of `folder` has no room for so much."""
    free = free_bytes(folder)
    if free - SPARE_BYTES < need_bytes:
        raise HomeUnusable(
            f"{what} needs {shown(need_bytes)} of disk; the home has "
            f"{shown(max(0, free - SPARE_BYTES))} free",
            "make room (`llmos models` shows what is there), or use another home (LLMOS_HOME)",
        )


def free_bytes(folder: Path) -> int:
    """What its owner may write on the disk of a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def shown(count: int) -> str:
    return f"{count / 1024 / MIB:.1f} GiB" if count >= 1024 * MIB else f"{count / MIB:.0f} MiB"
