"""Down and up again: what survives a shutdown, and what a second kernel may not do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel import protocol as p
from llmos.kernel.config import Config, check, drivers_of
from llmos.kernel.errors import Busy, HomeUnusable, NoSuchThing, ServiceFailed
from llmos.kernel.home import LONGEST_INSIDE, SOCKET_PATH_BYTES, Home
from llmos.kernel.process import Residency, State
from support.live import Live, short_home, wait_until


def test_shutdown_then_boot_goes_on_with_what_was_not_paused(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        goes = await fresh.spin(steps=400, busy_ms=2, memory_bytes=2**22)
        rests = await fresh.spin(steps=400, busy_ms=2)
        waits = await fresh.spin(steps=2, memory_bytes=2**30 - 2**20)
        for pid in (goes, rests):
            await fresh.until(pid, lambda q: q.progress.get("step", 0) >= 2)
        await fresh.ask(p.Pause(rests))
        answer = await fresh.down()
        assert answer == {"stopped": 2, "checkpoints": 2}
        saved = {pid: fresh.proc(pid).checkpoint for pid in (goes, rests)}
        assert all(c is not None and c["step"] >= 2 for c in saved.values())

        await fresh.boot()
        assert fresh.proc(rests).state is State.PAUSED
        assert fresh.proc(rests).residency is Residency.DISK
        for pid in (goes, waits):
            assert (await fresh.wait(pid))["exit_status"] == 0
        assert fresh.proc(rests).state is State.PAUSED
        await fresh.ask(p.Resume(rests))
        assert (await fresh.wait(rests))["exit_status"] == 0
        for pid in (goes, rests):
            items, _ = await fresh.talk.collect(p.Attach(pid))
            assert [i["record"]["step"] for i in items] == list(range(1, 401)), "lost or doubled"
        assert fresh.problems == []
        await fresh.down()

    fresh.run(go())


def test_guests_go_on_after_a_boot_in_one_engine_and_paused_ones_stay_paused(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        guests = [await fresh.guest(max_tokens=200) for _ in range(3)]
        for pid in guests:
            await fresh.until(pid, lambda q: q.progress.get("step", 0) >= 1)
        await fresh.ask(p.Pause(guests[2]))
        await fresh.down()
        await fresh.boot()
        for pid in guests[:2]:
            assert (await fresh.wait(pid))["exit_status"] == 0
        assert fresh.proc(guests[2]).state is State.PAUSED
        engines = {fresh.proc(pid).engine_pid for pid in guests}
        assert len(engines) == 1, "each got an engine of its own"
        await fresh.ask(p.Kill(guests[2]))
        await fresh.down()

    fresh.run(go())


def test_guests_that_were_acknowledged_outlive_a_crash_of_the_machine(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        guests = [await fresh.guest(max_tokens=n) for n in (500, 600)]
        for pid in guests:
            await fresh.until(pid, lambda q: q.progress.get("step", 0) >= 1)
        await fresh.crash()
        await fresh.boot()
        for pid in guests:
            assert (await fresh.wait(pid))["exit_status"] == 0
        assert fresh.problems == []
        await fresh.down()

    fresh.run(go())


def test_the_table_outlives_a_crash_of_the_kernel(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        done = await fresh.spin(steps=1, exit_status=4, name="first")
        await fresh.wait(done)
        waits = await fresh.spin(steps=2, memory_bytes=2**30 - 2**20)
        await fresh.crash()
        await fresh.boot()
        rows = {r["pid"]: r for r in await fresh.ask(p.Ps(all=True))}
        assert (rows[done]["exit_status"], rows[done]["name"]) == (4, "first")
        assert waits in rows
        new = await fresh.spin(steps=1)
        assert new > max(done, waits), "a pid is given once"
        await fresh.down()

    fresh.run(go())


def test_an_attached_guest_is_found_again_and_its_pid_is_not_given_again(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        await fresh.wait(await fresh.guest(max_tokens=1))  # its engine is up
        pid = await fresh.guest(max_tokens=100_000, attached=True)
        await fresh.until(pid, lambda q: q.progress.get("step", 0) >= 1)
        await fresh.crash()
        await fresh.boot()
        assert pid in {r["pid"] for r in await fresh.ask(p.Ps(all=True))}
        assert await fresh.spin(steps=1) > pid, "its stream would begin with another's records"
        await fresh.down()

    fresh.run(go())


def test_shutdown_in_the_first_moment_leaves_nothing_behind(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        await fresh.down()

    fresh.run(go())


def test_what_comes_while_the_kernel_shuts_down_is_refused(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        pid = await fresh.spin(steps=1000, busy_ms=100)
        await fresh.until_state(pid, State.RUNNING)
        down = fresh.talk.begin(p.Shutdown())
        asked = fresh.talk.begin(p.Submit("spin"))
        with pytest.raises(Busy):
            await fresh.talk.answer(asked)
        assert await fresh.ask(p.Ping()) is None
        assert (await fresh.talk.answer(down))["stopped"] == 1
        await fresh._close()

    fresh.run(go())


async def row_of(live: Live, service: str) -> dict[str, Any]:
    return next(s for s in await live.ask(p.Services()) if s["name"] == service)


def test_services_come_up_are_restarted_by_call_and_come_back_when_killed(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        models = await row_of(fresh, "models")
        assert models["summary"]
        found = await fresh.ask(p.Call("models.ls"))
        assert [m["name"] for m in found] == ["toy"]
        first = models["os_pid"]
        assert await fresh.ask(p.Services("restart", "models")) == {
            "name": "models",
            "pid": models["pid"],
        }
        models = await row_of(fresh, "models")
        assert models["os_pid"] != first

        open_call = fresh.talk.begin(p.Call("models.ls"))
        os.kill(models["os_pid"], 9)
        proc = await fresh.until_state(models["pid"], State.BACKOFF)
        assert "SIGKILL" in proc.story[-1][2]
        with contextlib.suppress(ServiceFailed):  # or it was answered before the kill
            await fresh.talk.answer(open_call)
        # A call that comes meanwhile waits for the service to be back.
        assert [m["name"] for m in await fresh.ask(p.Call("models.ls"))] == ["toy"]
        assert (await row_of(fresh, "models"))["restarts"] == 1
        assert fresh.problems == []
        await fresh.down()

    fresh.run(go())


def test_a_journal_that_cannot_be_written_is_said_and_reads_go_on(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        await fresh.ask(p.Programs())
        journal = fresh.kernel.journal
        real = journal._write_rows

        def broken() -> None:
            journal._connected().execute("PRAGMA query_only=ON")
            real()

        journal._write_rows = broken  # type: ignore[method-assign]
        seen = len(await fresh.ask(p.Ps()))
        with pytest.raises(HomeUnusable, match="journal cannot be written"):
            await fresh.spin(steps=1000)
        with pytest.raises(HomeUnusable, match="no new work is taken"):
            await fresh.spin(steps=1000)
        assert (await fresh.ask(p.Status()))["journal"]["error"]
        assert len(await fresh.ask(p.Ps())) >= 1
        assert len(await fresh.ask(p.Ps())) == seen, "what was not acknowledged is there"
        del journal._write_rows
        await wait_until(lambda: not journal.failed)
        pid = await fresh.spin(steps=1)
        assert (await fresh.wait(pid))["exit_status"] == 0
        assert (await fresh.ask(p.Status()))["journal"]["error"] is None
        await fresh.down()

    fresh.run(go())


def test_input_for_a_detached_guest_outlives_a_crash_and_an_attached_one_is_not_journaled(
    fresh: Live,
) -> None:
    async def go() -> None:
        await fresh.boot()
        await fresh.ask(p.Programs())
        kept = await fresh.guest(max_tokens=100_000)
        await fresh.until(kept, lambda q: q.progress.get("step", 0) >= 1)  # its engine is up
        mine = await fresh.guest(max_tokens=100_000, attached=True)
        for pid in (kept, mine):
            await fresh.ask(p.Send(pid, {"prompt": "and then?"}))
        db = sqlite3.connect(fresh.path / "journal.db")
        journaled = {pid for (pid,) in db.execute("SELECT pid FROM process")}
        db.close()
        assert journaled & {kept, mine} == {kept}
        await fresh.crash()
        await fresh.boot()
        assert [i["message"] for i in fresh.proc(kept).inputs] == [{"prompt": "and then?"}]
        given = fresh.kernel.core.m.early_input
        await wait_until(lambda: kept not in given)  # the new engine has it
        await fresh.ask(p.Kill(kept, 9))
        await fresh.down()

    fresh.run(go())


def kernel_process(home: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "llmos.kernel.main", "--home", str(home), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_kernel_is_refused_and_does_no_harm(fresh: Live) -> None:
    home = Home(fresh.path)
    home.prepare()
    with home.held():

        async def go() -> None:
            await fresh.boot()
            pid = await fresh.spin(steps=100_000)
            second = await asyncio.to_thread(kernel_process, fresh.path)
            assert second.returncode == 75
            assert f"pid {os.getpid()}" in second.stderr
            assert second.stderr.count("\n") == 1, second.stderr
            assert await fresh.ask(p.Ping()) is None
            assert fresh.proc(pid).live
            await fresh.ask(p.Kill(pid))
            await fresh.down()

        fresh.run(go())


BAD_BOOTS = {
    "an unknown driver": (["--device", "tpu0"], "no driver"),
    "a core that is not there": (["--device", "cpu0:cores=4096"], "core 4096 is not available"),
    "too much memory": (["--device", "cpu0:memory=9999GiB"], "lower memory="),
    "an unknown policy": (["--policy", "lottery"], "no policy 'lottery'"),
    "a key that is not known": (["--device", "sim0:speed=9"], "'speed=9' is not known"),
}


@pytest.mark.parametrize("what", BAD_BOOTS)
def test_a_boot_that_cannot_be_says_so_in_one_line(what: str, tmp_path: Path) -> None:
    arguments, says = BAD_BOOTS[what]
    ended = kernel_process(tmp_path / "h", *arguments)
    assert ended.returncode == 1
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert not (tmp_path / "h" / "kernel.sock").exists()


def test_a_kernel_with_a_wrong_configuration_file_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("batch_share = 0.1\nslice = 3\n")
    ended = kernel_process(tmp_path, "--device", "sim0")
    assert ended.returncode == 1
    assert ended.stderr == ("llmos: config.toml: 'slice' is not known (did you mean slice_s?)\n")
    assert not (tmp_path / "kernel.sock").exists()


def test_a_home_whose_path_is_too_long_is_refused() -> None:
    most = SOCKET_PATH_BYTES - LONGEST_INSIDE
    with pytest.raises(HomeUnusable, match="too long"):
        Home(Path("/" + "x" * most)).prepare()


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(HomeUnusable, match="cannot be used"):
        Home(tmp_path / "home").prepare()


def test_a_home_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.home.os.getuid", lambda: os.geteuid() + 1)
    with pytest.raises(HomeUnusable, match="another user"):
        Home(tmp_path).prepare()


def test_a_home_keeps_its_identity(tmp_path: Path) -> None:
    first, second = Home(tmp_path), Home(tmp_path)
    first.prepare()
    second.prepare()
    assert first.id == second.id != ""


def test_a_damaged_journal_is_said_in_one_line() -> None:
    home = short_home()
    (home / "journal.db").write_bytes(b"this is not a database, but it is long enough" * 100)
    ended = kernel_process(home, "--device", "sim0")
    assert ended.returncode == 1
    assert "journal.db cannot be used" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_configurations_are_checked() -> None:
    with pytest.raises(NoSuchThing, match="no policy 'lottery'"):
        check(Config(Path("/x"), policy="lottery"))
    with pytest.raises(NoSuchThing):
        drivers_of(Config(Path("/x"), ("gpu0",)))
    assert set(drivers_of(Config(Path("/x")))) == {"cpu", "host"}
    assert set(drivers_of(Config(Path("/x"), ("sim0", "sim1:memory=1GiB")))) == {"sim", "host"}
