"""What can never be started or adopted ends, alone and with a reason; the kernel goes on."""

from __future__ import annotations

import sqlite3

from llmos.kernel import protocol as p
from llmos.kernel.process import State
from llmos.kernel.rows import pack_row, unpack_row
from support.live import Live, in_kernel, wait_until

STRANGER = 54321  # in no database of users


@in_kernel
async def test_a_folder_that_its_user_spoils_is_no_trouble_of_the_disk(live: Live) -> None:
    pid = await live.spin(steps=100_000, restart="always")
    await live.until_state(pid, State.RUNNING)
    await live.ask(p.Pause(pid, release=True))
    await live.until(pid, lambda q: not q.worker_id)
    (live.kernel.home.work(pid) / "result.json").mkdir()
    await live.ask(p.Resume(pid))
    proc = await live.until_state(pid, State.EXITED)
    assert (proc.exit_status, proc.reason) == (
        1, "it could not be started: result.json: Is a directory"
    )  # fmt: skip
    await wait_until(lambda: not live.kernel.core.m.workers.keys() & live.kernel.last_cause.keys())
    live.kernel.health.check()
    other = await live.spin(steps=1)
    assert (await live.wait(other))["exit_status"] == 0
    assert not [w for w in live.kernel.last_cause if w.startswith(f"w{pid}-")]


@in_kernel
async def test_a_guest_whose_folder_cannot_be_made_ends_and_its_engine_goes_on(live: Live) -> None:
    first = await live.guest(max_tokens=100_000)
    await live.until(first, lambda g: g.progress.get("step", 0) >= 1)
    live.kernel.home.work(live.kernel.next_pid).write_text("in the way")
    pid = await live.guest(max_tokens=5)
    proc = await live.until_state(pid, State.EXITED)
    assert proc.reason == f"it could not be admitted: {pid}: File exists"
    live.kernel.health.check()
    engine = live.proc(live.proc(first).engine_pid)
    await live.ask(p.Kill(first, 9))
    await live.until(engine.pid, lambda e: e.reason == "idle")
    assert (await live.wait(await live.guest(max_tokens=5)))["exit_status"] == 0


def test_a_user_who_is_removed_takes_his_processes_along_and_nothing_else(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        his, waits, others = [await fresh.spin(steps=100_000) for _ in range(3)]
        guest = await fresh.guest(max_tokens=100_000)
        await fresh.until(guest, lambda g: g.progress.get("step", 0) >= 1)
        await wait_until(lambda: {his, others} <= fresh.kernel.worker_rows.keys())
        engine = fresh.proc(guest).engine_pid
        await fresh.kernel.journal.flushed()
        await fresh.crash()
        db = sqlite3.connect(fresh.path / "journal.db")
        for pid in (his, waits, guest, engine):
            (row,) = db.execute("SELECT row FROM process WHERE pid = ?", (pid,)).fetchone()
            proc, worker = unpack_row(row)
            proc.uid = STRANGER
            row = pack_row(proc, {} if pid == waits else worker)
            db.execute("UPDATE process SET row = ? WHERE pid = ?", (row, pid))
        db.commit()
        db.close()
        await fresh.boot()
        for pid in (his, waits, guest, engine):
            ended = await fresh.until_state(pid, State.EXITED)
            assert f"uid {STRANGER} is in no database of users" in ended.reason
        step = fresh.proc(others).progress.get("step", 0)
        await fresh.until(others, lambda q: q.progress.get("step", 0) > step)
        await fresh.ask(p.Kill(others, 9))
        await fresh.down()
        assert not fresh.problems

    fresh.run(go())
