"""The journal: what was acknowledged is there after a crash, and many saves are few commits."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgpack
import pytest

from llmos.kernel import protocol as p
from llmos.kernel.errors import HomeUnusable
from llmos.kernel.journal import Journal
from llmos.kernel.process import Class, Memory, Process, Residency, Role, State
from llmos.kernel.rows import _ALLOWED as ALLOWED
from llmos.kernel.rows import pack_row, unpack_row
from support.live import Live, wait_until


def process(pid: int = 7, submitted_at: float = 5.0, **more: Any) -> Process:
    return Process(pid, "spin", {"steps": 3}, "u", 1000, submitted_at, **more)


def with_journal(path: Path, work: Callable[[Journal], Coroutine[Any, Any, None]]) -> Journal:
    async def go() -> Journal:
        journal = Journal(path / "journal.db")
        journal.open()
        try:
            await work(journal)
        finally:
            journal.close()
        return journal

    return asyncio.run(go())


def rows(path: Path) -> list[tuple[Process, dict[str, Any]]]:
    journal = Journal(path / "journal.db")
    try:
        return journal.open()
    finally:
        journal.close()


def test_rows_survive_reopening_with_every_field(tmp_path: Path) -> None:
    full = process(
        name="n", role=Role.GUEST, cls=Class.IDLE, nice=-3, state=State.PAUSED, env={"A": "b"},
        residency=Residency.DISK, story=[(1.0, "a", "b")], memory=Memory(1, 2, 3, {"kv": 4}),
        progress={"step": 3}, checkpoint={"folder": "/x", "step": 3}, awaits_input=True,
        segments=[{"kind": "kv", "bytes": 9, "shared": ""}], device_seconds=1.5, restarts=2,
    )  # fmt: skip

    async def work(journal: Journal) -> None:
        journal.save(full, {"worker_id": "w7-1", "os_pid": 99})
        journal.save(process(8), {})
        await journal.flushed()

    with_journal(tmp_path, work)
    found = rows(tmp_path)
    assert found == [(full, {"worker_id": "w7-1", "os_pid": 99}), (process(8), {})]


def test_the_last_save_counts_and_what_is_forgotten_is_gone(tmp_path: Path) -> None:
    async def work(journal: Journal) -> None:
        proc = process()
        for n in range(20):
            proc.device_seconds = float(n)
            journal.save(proc, {})
        journal.save(process(8), {})
        journal.forget(8)
        await journal.flushed()

    with_journal(tmp_path, work)
    assert [(p.pid, p.device_seconds) for p, _ in rows(tmp_path)] == [(7, 19.0)]


def test_what_was_flushed_is_there_though_nobody_closed(tmp_path: Path) -> None:
    async def go() -> None:
        journal = Journal(tmp_path / "journal.db")
        journal.open()
        journal.save(process(), {})
        await journal.flushed()
        other = sqlite3.connect(tmp_path / "journal.db")  # as the next kernel would
        assert other.execute("SELECT count(*) FROM process").fetchone() == (1,)
        other.close()
        journal.close()

    asyncio.run(go())


def test_saves_that_come_together_are_committed_together(tmp_path: Path) -> None:
    async def work(journal: Journal) -> None:
        for pid in range(1, 201):
            journal.save(process(pid), {})
        await asyncio.gather(*(journal.flushed() for _ in range(50)))

    journal = with_journal(tmp_path, work)
    assert len(rows(tmp_path)) == 200
    assert journal.commits <= 20, "group commit"


def test_close_writes_what_is_left(tmp_path: Path) -> None:
    async def work(journal: Journal) -> None:
        for pid in range(1, 101):
            journal.save(process(pid), {})

    with_journal(tmp_path, work)
    assert len(rows(tmp_path)) == 100


def test_a_row_of_another_version_opens() -> None:
    """Fields that are not known are dropped, those that are missing get their default."""
    old = {
        "v": 1,
        "process": {
            "pid": 3, "program": "pretrain", "args": {}, "user": "u", "uid": 0, "submitted_at": 1.0,
            "cls": 1, "state": "waiting", "residency": "none", "role": "process",
            "of_the_future": [1, 2],
        },
    }  # fmt: skip
    proc, worker = unpack_row(msgpack.packb(old))
    assert (proc.pid, proc.state, proc.nice, proc.restart, worker) == (
        3,
        State.WAITING,
        0,
        "no",
        {},
    )
    assert proc.memory == Memory()


def test_the_first_rows_ever_written_open_for_ever() -> None:
    # Written by version 1. Never edit these bytes; add a line instead.
    row = bytes.fromhex(
        "83a17601a770726f63657373de0026a370696409a770726f6772616da47370696ea46172677381a57374657073"
        "03a475736572a175a3756964cd03e8ac7375626d69747465645f6174cb3ff8000000000000a47070696400a46e"
        "616d65a0a4726f6c65a770726f63657373ad6465766963655f77616e746564a0a3637764a0a3656e7680a86174"
        "746163686564c2a772657374617274a26e6fae6861735f636865636b706f696e74c2aa656e67696e655f6b6579"
        "a0a3636c7301a46e696365fda57374617465a6706175736564a97265736964656e6379a46469736ba672656173"
        "6f6ea0ab657869745f737461747573c0a6646576696365a0a9776f726b65725f6964a0aa656e67696e655f7069"
        "6400ac6177616974735f696e707574c2a87365676d656e747390aa737461727465645f6174c0a8656e6465645f"
        "6174c0ae6465766963655f7365636f6e6473cb0000000000000000ab707265656d7074696f6e7300a872657374"
        "6172747300ad6e6578745f73746172745f6174c0a573746f72799193cb3ff0000000000000a6706175736564b2"
        "6120706572736f6e20706175736564206974a66d656d6f727984ae70726f6d697365645f627974657300ae6d65"
        "6173757265645f627974657300aa7065616b5f627974657300a762795f6b696e6480a870726f677265737380aa"
        "636865636b706f696e7482a6666f6c646572a22f78a47374657002a6726573756c7480a6776f726b657282a977"
        "6f726b65725f6964a477392d31a66f735f7069644d"
    )
    proc, worker = unpack_row(row)
    assert (proc.pid, proc.program, proc.args, proc.nice) == (9, "spin", {"steps": 3}, -3)
    assert (proc.state, proc.residency) == (State.PAUSED, Residency.DISK)
    assert proc.checkpoint == {"folder": "/x", "step": 2}
    assert proc.story == [(1.0, "paused", "a person paused it")]
    assert worker == {"worker_id": "w9-1", "os_pid": 77}


def test_a_row_is_what_the_process_was() -> None:
    proc = process()
    again, worker = unpack_row(pack_row(proc, {"a": 1}))
    assert dataclasses.asdict(again) == dataclasses.asdict(proc)
    assert worker == {"a": 1}


def test_a_disk_that_is_full_is_said_and_what_was_lost_is_written_when_there_is_room(
    tmp_path: Path,
) -> None:
    async def go() -> None:
        journal = Journal(tmp_path / "journal.db")
        journal.open()
        journal.save(process(1), {})
        await journal.flushed()
        real = journal._write_rows

        def full() -> None:
            db = journal._connected()
            (pages,) = db.execute("PRAGMA page_count").fetchone()
            db.execute(f"PRAGMA max_page_count={pages}")
            real()

        journal._write_rows = full  # type: ignore[method-assign]
        journal.save(process(2, name="x" * 100_000), {})
        with pytest.raises(HomeUnusable, match="full"):
            await journal.flushed()
        assert "full" in journal.failed
        told: list[str] = []
        journal.on_change = lambda: told.append(journal.failed)
        journal._write_rows = real  # type: ignore[method-assign]
        await wait_until(lambda: told != [])  # by itself: nobody has asked for anything
        assert told == [""]
        journal.save(process(3), {})
        await journal.flushed()
        assert journal.failed == ""
        journal.close()

    asyncio.run(go())
    assert [p.pid for p, _ in rows(tmp_path)] == [1, 2, 3]


def test_a_file_that_is_no_journal_is_said(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"no database at all, whatever it is called" * 50)
    with pytest.raises(HomeUnusable, match="cannot be used"):
        Journal(tmp_path / "journal.db").open()


@pytest.mark.parametrize("harm", ["damaged", "deleted", "replaced"])
def test_a_file_that_breaks_under_a_kernel_is_written_anew_from_its_table(
    tmp_path: Path, harm: str
) -> None:
    path = tmp_path / "journal.db"

    async def go() -> None:
        journal = Journal(path)
        journal.open()
        table = [process(pid) for pid in (1, 2)]
        journal.on_lost = lambda: journal.write_anew([(proc, {}) for proc in table])
        for proc in table:
            journal.save(proc, {})
        await journal.flushed()
        if harm == "damaged":
            journal._disconnect()  # or its own cache would hide the damage
            path.with_name("journal.db-wal").unlink(missing_ok=True)
            path.write_bytes(b"x" * 8192)
        elif harm == "deleted":
            path.unlink()
        else:
            path.unlink()
            sqlite3.connect(path).close()
            path.write_bytes(b"")
        journal.save(process(3), {})
        table.append(process(3))
        with pytest.raises(HomeUnusable):
            await journal.flushed()
        await wait_until(lambda: journal.failed == "")
        journal.save(process(4), {})
        await journal.flushed()
        journal.close()

    asyncio.run(go())
    assert [p.pid for p, _ in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [None, 0])
def test_a_lost_journal_is_not_made_anew_over_everybodys_checkpoints(
    tmp_path: Path, size: int | None
) -> None:
    (tmp_path / "procs" / "7" / "checkpoints" / "step-000000010").mkdir(parents=True)
    if size is not None:
        (tmp_path / "journal.db").touch()
    with pytest.raises(HomeUnusable, match="1 processes have left checkpoints"):
        Journal(tmp_path / "journal.db").open()
    assert (tmp_path / "procs" / "7" / "checkpoints" / "step-000000010").is_dir()


def test_every_field_may_be_what_its_annotation_says() -> None:
    proc = Process(1, "exec", {}, "u", 0, 1.0, hang_s=0.0, deadline_at=5, predicted_s=2.5)
    proc.checkpoint = {"step": 3}
    back, _ = unpack_row(pack_row(proc, {}))
    assert back == proc
    for f in dataclasses.fields(Process):
        assert isinstance(getattr(proc, f.name), ALLOWED[f.name]), f.name


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that takes rows of 1 MB, in place of SQLite's 1 GB."""
    connect = sqlite3.connect

    def small(*args: Any, **options: Any) -> sqlite3.Connection:
        db = connect(*args, **options)
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
        return db

    monkeypatch.setattr(sqlite3, "connect", small)


@pytest.mark.usefixtures("small_rows")
def test_a_row_that_no_database_takes_does_not_keep_the_others_out(tmp_path: Path) -> None:
    large = process(1, name="x" * 2_000_000)
    refused: list[tuple[int, str]] = []

    async def work(journal: Journal) -> None:
        journal.on_refused = lambda pid, why: refused.append((pid, why))
        journal.save(process(1), {})
        await journal.flushed()
        for pid in (2, 3):
            journal.save(large, {})
            journal.save(process(pid), {})
            await journal.flushed()
            assert not journal.failed
        journal.write_anew([(large, {}), *((process(pid), {}) for pid in (2, 3, 4))])
        await journal.flushed()
        await wait_until(lambda: len(refused) == 3)

    with_journal(tmp_path, work)
    assert {pid for pid, _ in refused} == {1}
    assert refused[0][1].startswith("string or blob too big")
    assert [proc.pid for proc, _ in rows(tmp_path)] == [2, 3, 4]


@pytest.mark.usefixtures("small_rows")
def test_a_process_whose_row_cannot_be_written_ends_and_others_are_taken(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        await fresh.ask(p.Programs())
        guest = await fresh.guest(max_tokens=100_000)
        await fresh.ask(p.Send(guest, {"prompt": "x" * 2_000_000}))
        ended = await fresh.until_state(guest, State.EXITED)
        assert "its row in the journal cannot be written: string or blob too big" in ended.reason
        assert (await fresh.wait(await fresh.spin(steps=1)))["exit_status"] == 0
        assert (await fresh.ask(p.Status()))["journal"]["error"] is None
        await fresh.down()

    fresh.run(go())
    (row,) = [proc for proc, _ in rows(fresh.path) if proc.role is Role.GUEST]
    assert row.state is State.EXITED
