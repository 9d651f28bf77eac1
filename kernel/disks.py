"""On what kind of disk a folder lies, and how much room is left there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# File systems whose files another machine holds. The shared memory that SQLite's WAL needs does
# not work there, and a lost server is not a lost disk.
NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "9p", "ceph", "lustre", "gpfs",
    "beegfs", "orangefs", "pvfs2", "glusterfs", "coda", "davfs", "fuse.sshfs", "fuse.glusterfs",
    "fuse.ceph", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.davfs2", "fuse.smbnetfs",
})  # fmt: skip

MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Disk:
    kind: str  # "ext4", "nfs4", "fuse.sshfs"; "unknown"
    mounted_at: str

    @property
    def network(self) -> bool:
        return self.kind in NETWORK


def disk_of(path: Path, mountinfo: str | None = None) -> Disk:
    """The mount that `path` (absolute) lies on. `mountinfo` as in proc_pid_mountinfo(5)."""
    if mountinfo is None:
        try:
            mountinfo = MOUNTS.read_text(errors="replace")
        except OSError:
            return Disk("unknown", "/")
    found = Disk("unknown", "/")
    inside = os.path.realpath(path)
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind:
            continue
        at = _unescape(fields[4])
        within = inside == at or inside.startswith(at.rstrip("/") + "/")
        # Of two mounts on the same folder the later one is seen.
        if within and len(at) >= len(found.mounted_at):
            found = Disk(kind[0], at)
    return found


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def free_bytes(found: os.statvfs_result) -> int:
    """What this user may still write to a file system."""
    blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
    return blocks * found.f_frsize
