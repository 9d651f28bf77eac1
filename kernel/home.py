"""The home: one folder with everything a kernel knows, and the lock that makes it one kernel's."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from llmos.kernel.errors import Busy, HomeUnusable

# A unix socket's path fits in 107 bytes (sun_path, less the end); a worker's is the longest:
# HOME/w/w12345678-12345678/sock
SOCKET_PATH_BYTES = 107
LONGEST_INSIDE = len("/w/w12345678-12345678/sock")


class Home:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = path / "kernel.sock"
        self.lock = path / "kernel.lock"
        self.journal = path / "journal.db"
        self.attached = path / "attached"
        self.manifest = path / "manifest.json"
        self.services = path / "services.json"
        self.profiles = path / "profiles.json"
        self.packing = path / "packing.json"
        self.usage = path / "usage.json"
        self.log = path / "kernel.log"
        self.dmesg = path / "dmesg.jsonl"
        self.models = path / "models"
        self.id = ""

    def work(self, pid: int) -> Path:
        """The folder of one process: stream, log, checkpoints, result."""
        return self.path / "procs" / str(pid)

    def worker(self, worker_id: str) -> Path:
        return self.path / "w" / worker_id

    def prepare(self) -> None:
        """Make the folders, owner only. Raises HomeUnusable."""
        if len(os.fsencode(self.path)) + LONGEST_INSIDE > SOCKET_PATH_BYTES:
            most = SOCKET_PATH_BYTES - LONGEST_INSIDE
            raise HomeUnusable(
                f"the path of the home is too long for a unix socket "
                f"({len(os.fsencode(self.path))} bytes, at most {most}): {self.path}",
                "set LLMOS_HOME to a shorter path",
            )
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.stat().st_uid != os.getuid():
                raise HomeUnusable(f"{self.path} belongs to another user")
            self.path.chmod(0o700)
            for folder in (self.path / "procs", self.path / "w", self.models):
                folder.mkdir(mode=0o700, exist_ok=True)
            identity = self.path / "id"
            if not identity.exists():
                identity.write_text(secrets.token_hex(8))
            self.id = identity.read_text().strip()
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise HomeUnusable(f"the home {self.path} cannot be used: {reason}") from None

    def open_to(self, group: grp.struct_group) -> None:
        """Let members of a group reach the socket, the registry, and nothing else. As root.

        The folders of processes and workers can be passed through, not listed: each belongs to
        whose process it is. In `models` everybody may put what is his, as in /tmp. Raises
        HomeUnusable.
        """
        for parent in self.path.parents:
            found = parent.stat()
            passable = 0o010 if found.st_gid == group.gr_gid else 0o001
            if not found.st_mode & passable:
                raise HomeUnusable(
                    f"members of {group.gr_name} cannot reach {self.path}: {parent} is closed to "
                    "them",
                    "choose another folder with LLMOS_HOME, such as /var/lib/llmos",
                )
        os.umask(0o077)
        for entry in os.scandir(self.path):
            if entry.is_file(follow_symlinks=False):
                os.chmod(entry.path, 0o600)
        for folder in (self.path / "procs", self.path / "w"):
            folder.chmod(0o711)
        os.chown(self.models, 0, group.gr_gid)
        self.models.chmod(0o1770)
        os.chown(self.path, 0, group.gr_gid)
        self.path.chmod(0o710)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one kernel of this home, or raise Busy with the pid of the other."""
        try:
            fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise HomeUnusable(f"the home {self.path} cannot be used: {reason}") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # a kernel, or fsck
                other = os.read(fd, 32).decode(errors="replace").strip() or "?"
                raise Busy(
                    f"a kernel serves {self.path} already (pid {other})",
                    "`llmos shutdown` ends it",
                ) from None
            with contextlib.suppress(OSError):  # on a full disk the lock has no number in it
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(fd)


def boot_id() -> str:
    """What this run of the machine is called; empty where nobody says."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
