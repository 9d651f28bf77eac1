"""Journals as older versions wrote them open; one of a newer version is refused, untouched.

The files in `samples/` were written by the code of the commit in their names, and are never edited.
A new version of rows adds one.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import msgpack
import pytest

from llmos.kernel.errors import HomeUnusable
from llmos.kernel.fsck.main import check
from llmos.kernel.home import Home
from llmos.kernel.journal import Journal
from llmos.kernel.kernel import Kernel
from llmos.kernel.process import Class, Process, Residency, Role, State
from llmos.kernel.rows import ROW_VERSION, Worker
from support.live import Live

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.db"))


def opened(path: Path) -> tuple[dict[int, Process], dict[int, Worker], Journal]:
    async def go() -> tuple[dict[int, Process], dict[int, Worker], Journal]:
        journal = Journal(path)
        found = journal.open()
        journal.close()
        return {p.pid: p for p, _ in found}, {p.pid: w for p, w in found}, journal

    return asyncio.run(go())


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda p: p.stem)
def test_a_journal_of_every_version_opens(sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    shutil.copyfile(sample, path)
    procs, workers, journal = opened(path)
    assert (sorted(procs), journal.aside) == ([1, 2, 3, 4], {})
    first = procs[1]
    assert (first.program, first.args["steps"], first.user, first.nice) == (
        "pretrain", 100, "ada", 5)  # fmt: skip
    assert (first.state, first.devices, first.device_seconds) == (State.RUNNING, ("cpu0",), 42.5)
    assert first.checkpoint is not None
    assert first.checkpoint["step"] == 50
    assert first.story == [(1001.0, "planning", "submitted"), (1010.0, "running", "its turn")]
    assert (first.memory.peak_bytes, first.memory.by_kind) == (1600, {"weights": 1000})
    assert workers[1]["os_pid"] == 4194000
    assert (workers[1].get("devices") or [workers[1]["device"]]) == ["cpu0"]
    assert (procs[2].role, procs[2].cls) == (Role.GUEST, Class.INTERACTIVE)
    assert (procs[3].state, procs[3].residency) == (State.PAUSED, Residency.DISK)
    assert (procs[4].exit_status, procs[4].reason) == (1, "ValueError: no")


@pytest.mark.parametrize("sample", SAMPLES[:1] + SAMPLES[-1:], ids=lambda p: p.stem)
def test_a_kernel_boots_on_it_and_goes_on(sample: Path, fresh: Live) -> None:
    shutil.copyfile(sample, fresh.path / "journal.db")

    async def go() -> None:
        await fresh.boot()
        kernel: Kernel = fresh.kernel
        assert {1, 3, 4} <= kernel.core.m.procs.keys()
        assert fresh.proc(3).state is State.PAUSED
        pid = await fresh.spin(steps=1)
        assert pid > 4
        assert (await fresh.wait(pid))["exit_status"] == 0
        await fresh.down()

    fresh.run(go())


def newer(path: Path) -> None:
    """Two rows of today and one of a version that nobody knows yet."""
    shutil.copyfile(SAMPLES[-1], path)
    db = sqlite3.connect(path)
    row = msgpack.packb({"v": ROW_VERSION + 1, "of": "the future"})
    db.execute("INSERT INTO process VALUES (9, NULL, ?)", (row,))
    db.execute("UPDATE process SET row = x'00' WHERE pid = 2")  # and a damaged one, left as it is
    db.commit()
    db.close()


def test_a_row_of_a_newer_version_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.prepare()
    newer(home.journal)
    before = home.journal.read_bytes()
    with pytest.raises(HomeUnusable, match="rows of version 3, this llmos knows 2") as refused:
        opened(home.journal)
    assert "\n" not in refused.value.message
    with pytest.raises(HomeUnusable, match="version 3"):
        check(home, repair=True)
    assert home.journal.read_bytes() == before
    assert [p.name for p in tmp_path.glob("journal*")] == ["journal.db"]


def test_a_file_of_a_newer_format_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    shutil.copyfile(SAMPLES[-1], path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=77")
    db.close()
    before = path.read_bytes()
    with pytest.raises(HomeUnusable, match="format 77"):
        opened(path)
    assert path.read_bytes() == before


def test_a_damaged_row_is_set_aside_and_the_others_open(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    shutil.copyfile(SAMPLES[-1], path)
    db = sqlite3.connect(path)
    (row,) = db.execute("SELECT row FROM process WHERE pid = 3").fetchone()
    hurt = bytearray(row)
    hurt[len(hurt) // 2] ^= 1
    db.execute("UPDATE process SET row = ? WHERE pid = 3", (bytes(hurt),))
    db.commit()
    db.close()
    for _ in range(2):  # it stays known
        procs, _, journal = opened(path)
        assert sorted(procs) == [1, 2, 4]
        assert list(journal.aside) == [3]
        assert "checksum" in journal.aside[3]
        assert journal.last_pid >= 3, "its number would be given away again"
    db = sqlite3.connect(path)
    assert db.execute("SELECT row FROM aside").fetchone() == (bytes(hurt),)
    db.close()
