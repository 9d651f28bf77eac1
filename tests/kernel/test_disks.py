"""What kind of disk a folder lies on, and the journal on one of a network."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest

from llmos.kernel.disks import Disk, disk_of, free_bytes
from llmos.kernel.journal import Journal
from llmos.kernel.process import Process

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /home rw,relatime - nfs4 server:/export/home rw,vers=4.2
31 30 0:27 / /home/local\\040disk rw - xfs /dev/sdb rw
32 22 0:28 / /mnt/ssh rw,nosuid - fuse.sshfs me@host:/ rw,user_id=0
33 22 0:29 / /mnt/w rw - 9p share rw
34 22 0:30 / /mnt/over rw - ext4 /dev/sdc rw
35 22 0:31 / /mnt/over rw - cifs //server/share rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "disk"),
    [
        ("/opt/llmos", Disk("ext4", "/")),
        ("/home/ada/.llmos", Disk("nfs4", "/home")),
        ("/homeless", Disk("ext4", "/")),
        ("/home/local disk/h", Disk("xfs", "/home/local disk")),
        ("/mnt/ssh/h", Disk("fuse.sshfs", "/mnt/ssh")),
        ("/mnt/w", Disk("9p", "/mnt/w")),
        ("/mnt/over/h", Disk("cifs", "/mnt/over")),
    ],
)
def test_the_mount_of_a_folder(path: str, disk: Disk) -> None:
    assert disk_of(Path(path), MOUNTS) == disk
    assert disk.network == (disk.kind not in ("ext4", "xfs"))


def test_this_machine_has_a_disk(tmp_path: Path) -> None:
    assert disk_of(tmp_path).kind != "unknown"
    assert free_bytes(os.statvfs(tmp_path)) > 0


def test_on_a_network_there_is_no_log_ahead_and_what_was_flushed_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"

    async def go(network: bool, pid: int) -> list[str]:
        journal = Journal(path, network=network)
        found = journal.open()
        journal.save(Process(pid, "spin", {}, "u", 0, 1.0), {})
        await journal.flushed()
        (name,) = journal._db.execute("PRAGMA journal_mode").fetchone()  # type: ignore[union-attr]
        (sync,) = journal._db.execute("PRAGMA synchronous").fetchone()  # type: ignore[union-attr]
        beside = sorted(os.listdir(tmp_path))
        journal.close()
        assert (name, sync, len(found)) == (journal.mode, 2, pid - 1)
        return beside

    # A home that was on a local disk before, and is copied there and back.
    assert "journal.db-wal" in asyncio.run(go(False, 1))
    assert asyncio.run(go(True, 2)) == ["journal.db", "journal.db-journal"]
    assert "journal.db-wal" in asyncio.run(go(False, 3))
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM process").fetchone() == (3,)
    db.close()
