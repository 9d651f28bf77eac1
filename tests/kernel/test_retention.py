"""Who is forgotten, and who must not be."""

from __future__ import annotations

import time
from typing import Any

from llmos.kernel import protocol as p
from llmos.kernel import retention
from llmos.kernel.core import Core
from llmos.kernel.events import Expired, Forget
from llmos.kernel.process import Process, State
from support.live import Live, wait_until

DAY = 86_400.0


def made(core: Core, pid: int, ended_at: float | None = None, **more: Any) -> Process:
    proc = Process(pid, "spin", more.pop("args", {}), "u", 0, 0.0, **more)
    proc.state, proc.ended_at = State.WAITING, ended_at
    if ended_at is not None:
        proc.state, proc.exit_status = State.EXITED, 0
    core.m.enter(proc)
    return proc


def test_the_old_and_the_many_go_the_oldest_first() -> None:
    core = Core(0.0)
    for pid in range(1, 21):
        made(core, pid, ended_at=100.0 * DAY - pid)
    made(core, 50)
    now = 100.0 * DAY
    assert retention.choose(core.m, now, set(), keep_rows=15) == [20, 19, 18, 17, 16]
    assert retention.choose(core.m, now + 30 * DAY - 10, set()) == [20, 19, 18, 17, 16, 15, 14, 13,
                                                                    12, 11]  # fmt: skip
    assert retention.choose(core.m, now, set()) == []


def test_who_is_used_is_kept() -> None:
    core = Core(0.0)
    for pid in range(1, 7):
        made(core, pid, ended_at=0.0)
    made(core, 20, ppid=1)
    made(core, 21, args={"model": "/h/procs/2/checkpoints/step-000000005"})
    made(core, 22, args={"data": ["x", {"in": "/h/procs/3/data"}]})
    made(core, 23, cwd="/h/procs/4")
    made(core, 24, ended_at=99 * DAY, args={"model": "/h/procs/6/x"})  # has ended itself
    assert retention.choose(core.m, 100 * DAY, {5}) == [6]


def test_what_it_was_charged_stays_in_the_books() -> None:
    core = Core(0.0)
    core.add_device("cpu0", "cpu", 1 << 30)
    proc = made(core, 1, ended_at=1.0)
    core.m.earlier_s, proc.device_seconds = 5.0, 5.0
    core.check()
    orders = core.handle(Expired((1, 2)), 10.0)
    assert Forget(1) in orders
    assert not core.m.procs
    core.check()


def test_a_kernel_that_runs_on_forgets_row_table_and_folder(fresh: Live) -> None:
    async def go() -> None:
        await fresh.boot()
        kernel = fresh.kernel
        old, kept, read = [await fresh.spin(steps=1) for _ in range(3)]
        for pid in (old, kept, read):
            await fresh.wait(pid)
        for pid in (old, read):
            fresh.proc(pid).ended_at = time.time() - 31 * DAY
        # Somebody is in the middle of waiting for it.
        kernel._changed[read] = []
        folder = kernel.home.work(old)
        assert folder.is_dir()
        kernel.upkeep.forget_old()
        await wait_until(lambda: not folder.exists())
        assert kernel.core.m.procs.keys() & {old, kept, read} == {kept, read}
        del kernel._changed[read]
        kernel.upkeep.forget_old()
        last = await fresh.spin(steps=1)
        await fresh.wait(last)
        fresh.proc(last).ended_at = 1.0
        kernel.upkeep.forget_old()
        await kernel.journal.flushed()
        await fresh.down()
        await fresh.boot()
        assert fresh.kernel.core.m.procs.keys() & {old, kept, read, last} == {kept}
        assert await fresh.spin(steps=1) > last, "a pid was given away twice"
        assert not [r for r in await fresh.ask(p.Ps()) if r["pid"] in (old, read, last)]
        await fresh.down()

    fresh.run(go())
