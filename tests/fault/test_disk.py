"""A disk that is full, or read-only: said, survived, and over by itself when there is room.

On a small file system in memory, mounted for the test: skipped where that is not allowed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel import protocol as p
from llmos.kernel.errors import HomeUnusable
from support.real import Machine, last_words, wait_until

SIZE = 24 * 2**20


def mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


def small_disk(at: Path) -> bool:
    return mount("-t", "tmpfs", "-o", f"size={SIZE},mode=0700", "llmos-test", str(at))


@contextlib.contextmanager
def machine_on_a_small_disk(*devices: str) -> Iterator[Machine]:
    made = Machine(*devices)
    if os.geteuid() != 0 or not small_disk(made.home):
        made.dispose()
        pytest.skip("a file system cannot be mounted here")
    try:
        made.boot()
        yield made
        made.shutdown()
        made.check_nobody_is_left()
    finally:
        for os_pid in made.os_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(os_pid, 9)
        wait_until(lambda: not made.os_pids(), "all to be gone")
        subprocess.run(["umount", "-l", str(made.home)], check=True)
        made.dispose()


def fill(home: Path) -> Path:
    """Not a byte is left."""
    ballast = home / "ballast"
    with ballast.open("ab", buffering=0) as f:
        for piece in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while f.write(bytes(piece)):
                    pass
    return ballast


def disk(m: Machine) -> dict[str, Any]:
    found: dict[str, Any] = m.ask(p.Status())["disk"]
    return found


def test_a_full_disk_is_said_refuses_new_work_and_is_over_by_itself() -> None:
    with machine_on_a_small_disk("--device", "sim0:memory=1GiB") as m:
        runs = m.submit(steps=100_000, busy_ms=2, memory_bytes=2**29)
        waits = m.submit(steps=1, memory_bytes=2**30 - 2**20)
        m.until_step(runs, 3)
        ballast = fill(m.home)
        wait_until(lambda: disk(m)["trouble"], "the trouble to be seen")
        assert "full" in disk(m)["trouble"]
        before = [r["pid"] for r in m.ask(p.Ps())]
        with pytest.raises(HomeUnusable, match=r"no new work is taken: the disk.* full") as refused:
            m.submit(steps=1)
        assert "make room" in refused.value.hint
        assert [r["pid"] for r in m.ask(p.Ps())] == before
        m.until_step(runs, m.step(runs) + 20)  # what runs goes on
        assert m.row(waits)["reason"] == "disk"
        ballast.unlink()
        wait_until(lambda: disk(m)["trouble"] is None, "the end of the trouble")
        assert m.ask(p.Kill(runs, 15))["exit_status"] == 143
        assert m.end_of(waits)["exit_status"] == 0
        assert m.end_of(m.submit(steps=1))["exit_status"] == 0
        assert "work is taken and started" in m.log()
        m.kill_kernel()
        m.boot()
        assert m.end_of(waits)["exit_status"] == 0
        steps = [r["step"] for r in m.records(runs)]
        assert steps == list(range(1, len(steps) + 1)), "a record was lost or torn"


@pytest.mark.long
def test_a_worker_on_a_full_disk_goes_on_and_loses_no_word() -> None:
    with machine_on_a_small_disk("--device", "cpu0:memory=2GiB") as m:
        ends = m.submit(steps=100, busy_ms=5)
        goes = m.submit(steps=100_000, busy_ms=5)
        for pid in (ends, goes):
            m.until_step(pid, 2)
        ballast = fill(m.home)
        with pytest.raises(HomeUnusable, match="no room for a checkpoint"):
            m.ask(p.Checkpoint(goes))
        assert not list((m.home / "procs" / str(goes) / "checkpoints").glob(".writing*"))
        m.until_step(ends, 100)
        m.until_step(goes, m.step(goes) + 20)
        assert m.row(ends)["state"] != "exited"  # it has words that are nowhere yet
        assert not (m.home / "procs" / str(ends) / "result.json").exists()
        ballast.unlink()
        assert m.end_of(ends)["exit_status"] == 0
        assert last_words(m.home, ends)["status"] == 0
        assert [r["step"] for r in m.records(ends)] == list(range(1, 101))
        assert m.ask(p.Checkpoint(goes))["step"] > 2
        steps = [r["step"] for r in m.records(goes)]
        assert steps == list(range(1, len(steps) + 1))
        assert any("no checkpoint" in r["text"] for r in m.records(goes, "note"))
        assert m.ask(p.Kill(goes, 15))["exit_status"] == 143


def shell(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "llmos.shell", *words], capture_output=True, text=True,
        env={**os.environ, "LLMOS_HOME": str(home)}, check=False,
    )  # fmt: skip


def test_on_a_full_or_read_only_disk_boot_and_fsck_say_so_in_one_line() -> None:
    with machine_on_a_small_disk("--device", "sim0:memory=1GiB") as m:
        m.submit(steps=1)
        m.shutdown()
        ballast = fill(m.home)
        full = shell(m.home, "boot", "--device", "sim0")
        ballast.unlink()
        assert mount("-o", "remount,ro", str(m.home))
        refused = shell(m.home, "boot", "--device", "sim0")
        first = shell(m.home / "new", "boot", "--device", "sim0")  # of somebody new to it
        checked = shell(m.home, "fsck")
        assert mount("-o", "remount,rw", str(m.home))
        for done, why, status in (
            (full, "No space left", 1), (refused, "Read-only", 1), (checked, "Read-only", 8),
            (first, f"the home {m.home}/new cannot be made: Read-only", 1),
        ):  # fmt: skip
            assert (done.returncode, done.stdout) == (status, "")
            assert why in done.stderr.splitlines()[0], done.stderr
            assert "Traceback" not in done.stderr
            assert done.stderr.count("\n") <= 2, "a line, and one that says what helps"
        m.boot()
