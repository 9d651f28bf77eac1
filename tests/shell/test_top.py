"""The live view: what it shows, and what its keys do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.input.base import PipeInput
from prompt_toolkit.output import DummyOutput

from llmos.shell.home import Home
from llmos.shell.render import cell_len
from llmos.shell.top import Top
from llmos.shell.top_frame import SORTS, Choices, Snapshot, frame, visible
from support.shell import LIMIT_S, Shell, Site, until


def process(pid: int, **values: Any) -> dict[str, Any]:
    memory = {"promised_bytes": 10, "measured_bytes": pid * 2**20, "peak_bytes": 0, "by_kind": {}}
    return {
        "pid": pid, "ppid": 0, "user": "ada", "program": "spin", "name": f"p{pid}",
        "role": "process", "state": "ready", "class": "batch", "nice": 0, "device": "sim0",
        "device_seconds": 1.0 * pid, "progress": {}, "reason": "", "exit_status": None,
        "memory": memory, **values,
    }  # fmt: skip


def seen(*processes: dict[str, Any], events: list[dict[str, Any]] | None = None) -> Snapshot:
    status = {
        "kernel": {"version": "0.1.0", "os_pid": 1, "uptime_s": 65.0},
        "devices": [{"device": "sim0", "kind": "sim", "load": 0.5, "running_pid": 2}],
        "processes": {"ready": len(processes)},
    }
    mem = [{"device": "sim0", "kind": "sim", "capacity_bytes": 100, "free_bytes": 25}]
    return Snapshot(status, list(processes), mem, events or [])


def test_a_frame_has_the_devices_the_processes_and_the_last_decisions() -> None:
    event = {"at": 90.0, "what": "preempted", "pid": 2, "by": 3, "why": "more urgent"}
    lines = frame(seen(process(2), process(3), events=[event]), Choices(), 80, 23, 100.0)
    text = "\n".join(line for _, line in lines)
    assert "load ███████░░░░░░░  50%" in text
    assert "75/100" in text
    assert "2 preempted by 3" in text
    assert len(lines) == 23
    assert {cell_len(line) for _, line in lines if line} == {80}


@pytest.mark.parametrize(("width", "height"), [(20, 5), (40, 10), (80, 24), (200, 60)])
def test_a_frame_fits_any_terminal(width: int, height: int) -> None:
    many = seen(*(process(pid, reason="waits for a very long time") for pid in range(1, 100)))
    lines = frame(many, Choices(pid=99), width, height, 0.0)
    assert len(lines) <= height
    assert all(cell_len(line) <= width for _, line in lines)


def test_the_chosen_process_stays_in_sight() -> None:
    many = seen(*(process(pid) for pid in range(1, 100)))
    lines = frame(many, Choices(sort="pid", pid=77), 80, 20, 0.0)
    assert any(style == "class:chosen" and " 77 " in line for style, line in lines)


def test_every_sort_and_the_filter_work_on_what_is_shown() -> None:
    snapshot = seen(process(1, nice=5), process(2, nice=-5), process(3, role="service"))
    order = {sort: [p["pid"] for p in visible(snapshot, Choices(sort=sort))] for sort in SORTS}
    assert order == {
        "pid": [1, 2, 3], "state": [1, 2, 3], "mem": [3, 2, 1], "time": [3, 2, 1],
        "nice": [2, 3, 1], "name": [1, 2, 3],
    }  # fmt: skip
    assert [p["pid"] for p in visible(snapshot, Choices(filter="P2"))] == [2]


def test_a_key_never_hits_what_is_not_shown() -> None:
    snapshot = seen(process(1), process(2))
    choices = Choices(pid=1, tagged={1})
    choices.filter = "p2"
    choices.settle(visible(snapshot, choices))
    assert choices.targets() == [2]
    choices.filter = "nothing"
    choices.settle(visible(snapshot, choices))
    assert choices.targets() == []


def test_top_once_prints_a_frame(sh: Shell, site: Site) -> None:
    pid = site.spin(steps=0, name="spinner")
    until(lambda: site.process(pid)["state"] == "running")
    out = sh.ok("top", "-1")
    assert "sim0" in out
    assert "spinner" in out
    assert sh.ok("top").splitlines()[0].startswith("llmos"), "no terminal: one frame"


Steps = Callable[[Top, PipeInput], Awaitable[None]]


def drive(home: Home, steps: Steps, readonly: bool = False) -> None:
    """Run the application on a keyboard that `steps` types on."""

    async def work(keys: PipeInput) -> None:
        top = Top(home, 0.02, readonly)
        running = asyncio.create_task(top.run())
        try:
            await holds(lambda: top.seen is not None and top.choices.pid)
            await steps(top, keys)
        finally:
            keys.send_text("\x03")
            await running

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        asyncio.run(work(keys))


async def holds(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  whatever is waited for has no event
            await asyncio.sleep(0.005)


def test_keys_tag_renice_pause_and_kill(site: Site) -> None:
    pid, other = site.spin(steps=0, name="one"), site.spin(steps=0, name="two")
    until(lambda: site.process(pid)["progress"] and site.process(other)["progress"])

    async def steps(top: Top, keys: PipeInput) -> None:
        def now(name: str) -> Any:
            assert top.seen is not None
            return {p["name"]: p for p in top.seen.processes}.get(name)

        keys.send_text("/one\r")
        await holds(lambda: top.choices.targets() == [pid])
        keys.send_text("\x1b[19~")  # F8
        await holds(lambda: now("one")["nice"] == 1)
        keys.send_text("\x1b[18~")  # F7
        await holds(lambda: now("one")["nice"] == 0)
        keys.send_text("p")
        await holds(lambda: now("one")["state"] == "paused")
        keys.send_text("p")
        await holds(lambda: now("one")["state"] != "paused")
        keys.send_text("kn")
        await holds(lambda: not top.asking)
        keys.send_text("ky")
        await holds(lambda: now("one") is None)
        assert now("two") is not None
        keys.send_text("/")
        await holds(lambda: top.asking)
        keys.send_text("\x1b")
        await holds(lambda: not top.choices.filter)
        keys.send_text(" ")
        await holds(lambda: top.choices.tagged)

    drive(site.home, steps)


def test_enter_explains_and_any_key_goes_back(site: Site) -> None:
    pid = site.spin(steps=0, name="one")

    async def steps(top: Top, keys: PipeInput) -> None:
        await holds(lambda: top.choices.pid == pid)
        keys.send_text("\r")
        await holds(lambda: any(f"spin {pid} 'one'" in line for line in top.page))
        keys.send_text("x")
        await holds(lambda: not top.page)
        keys.send_text("h")
        await holds(lambda: top.page)
        assert len(top.lines(80, 24, 0.0)) == 24

    drive(site.home, steps)


def test_a_view_that_is_read_only_changes_nothing(site: Site) -> None:
    pid = site.spin(steps=0)

    async def steps(top: Top, keys: PipeInput) -> None:
        keys.send_text("k")
        await holds(lambda: top.message == "read-only")

    drive(site.home, steps, readonly=True)
    assert site.process(pid)["state"] != "exited"


def test_the_view_outlives_a_kernel(off: Site) -> None:
    off.boot()

    async def steps(top: Top, keys: PipeInput) -> None:
        await asyncio.to_thread(off.kill)
        await holds(lambda: top.message.startswith("no kernel"))
        await asyncio.to_thread(off.boot)
        await holds(lambda: not top.message)

    drive(off.home, steps)
