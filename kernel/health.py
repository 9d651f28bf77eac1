"""Whether the disk of the home takes what is written; and what follows when it does not.

In trouble (full, read-only, a journal that cannot be written) new work is refused, what waits is
not started, what runs goes on. A look every second or so tells when it is well again.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from llmos.kernel import database, disks
from llmos.kernel import events as ev
from llmos.kernel.errors import HomeUnusable
from llmos.kernel.ledger import SYSTEM_PID
from llmos.kernel.log import log

if TYPE_CHECKING:
    from llmos.kernel.kernel import Kernel

MIB = 1024**2

# How often the disk is looked at.
LOOK_S = 1.0

# New work is refused when less is left: the rest is for what runs (streams, logs, last words). A
# small disk keeps a twentieth.
RESERVE_BYTES = 64 * MIB
RESERVE_SHARE = 0.05


# What an OSError of the disk itself says. Any other is about one file, which may be a user's.
_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


def is_disks(exc: Exception) -> bool:
    return isinstance(exc, OSError) and exc.errno in _OF_THE_DISK


class Health:
    def __init__(self, kernel: Kernel) -> None:
        self._k = kernel
        self.disk = disks.disk_of(kernel.home.path)
        self.free_bytes = 0
        self.trouble = ""  # one line; empty when all is well
        self._write_failed = ""  # of the kernel itself, elsewhere than in the journal

    def check(self) -> None:
        """Raise HomeUnusable when no new work can be taken."""
        if not self.trouble:
            self.look()
        if self.trouble:
            raise HomeUnusable(
                f"no new work is taken: {self.trouble}",
                f"make room on the disk of {self._k.home.path}; it is looked at again every second",
            )

    def failed(self, exc: OSError) -> None:
        """The kernel could not write a file of its own: `is_disks(exc)`."""
        self._write_failed = exc.strerror or str(exc)
        self._set(self._found())

    def look(self) -> None:
        """Is it well? Asks the disk; what failed by writing is asked by writing."""
        if self._write_failed:
            self._write_failed = self._probe()
        self._set(self._found())

    def _found(self) -> str:
        try:
            stat = os.statvfs(self._k.home.path)
        except OSError as exc:
            return f"the home cannot be looked at ({exc.strerror})"
        self.free_bytes = disks.free_bytes(stat)
        if stat.f_flag & os.ST_RDONLY:
            return "the disk of the home is read-only"
        reserve = min(RESERVE_BYTES, int(stat.f_blocks * stat.f_frsize * RESERVE_SHARE))
        if self.free_bytes < reserve:
            left = f"{self.free_bytes / MIB:.0f} MiB left, {reserve / MIB:.0f} are kept"
            return f"the disk of the home is full ({left} for what runs)"
        if self._k.journal.failed:
            return self._k.journal.failed
        if self._write_failed:
            return f"the home cannot be written ({self._write_failed})"
        return ""

    def _probe(self) -> str:
        probe = self._k.home.path / f".probe-{os.getpid()}"
        try:
            try:
                probe.write_bytes(bytes(4096))
                database.sync(probe)
            finally:
                probe.unlink(missing_ok=True)
        except OSError as exc:
            return exc.strerror or str(exc)
        return ""

    def _set(self, trouble: str) -> None:
        was, self.trouble = self.trouble, trouble
        if bool(trouble) == bool(was):
            return  # the number of bytes left changes with every look
        if trouble:
            log(f"{trouble}: new work is refused, nothing is started, what runs goes on")
        else:
            log("the home can be written again: work is taken and started")
        self._k.core.m.record("disk", SYSTEM_PID, trouble or "well again")
        self._k.post(ev.DiskTold(trouble))
