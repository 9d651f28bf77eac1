"""The kernel's log: what follows from what, over tasks, workers and kernels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel import dmesg
from llmos.kernel import protocol as p
from llmos.kernel.dmesg import Dmesg
from llmos.kernel.errors import BadArgument
from llmos.kernel.process import State
from support.live import Live, in_kernel


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


def made(tmp_path: Path) -> Dmesg:
    log = Dmesg(tmp_path / "dmesg.jsonl", lambda: 12.5)
    log.open()
    return log


@in_loop
async def test_what_follows_bears_the_number_of_its_cause(
    tmp_path: Path,
) -> None:
    log = made(tmp_path)
    with log.because(log.cause("kill", "15 (user 0)", 3)):
        log.write("exited", 3)
        task = asyncio.ensure_future(_later(log))
    with log.because(log.cause("clock")):
        pass  # nothing follows: nothing is told
    log.write("alone")
    await task
    assert [(x["what"], x["pid"], x["cause"]) for x in log.lines] == [
        ("kill", 3, 1), ("exited", 3, 1), ("alone", None, None), ("started", 4, 1),
    ]  # fmt: skip
    assert log.causes_of(list(log.lines)) == {1: "kill: 15 (user 0)"}


async def _later(log: Dmesg) -> None:
    await asyncio.sleep(0)
    log.write("started", 4)


@in_loop
async def test_the_next_kernel_goes_on_with_the_numbers_and_finds_all_but_leases(
    tmp_path: Path,
) -> None:
    log = made(tmp_path)
    with log.because(log.cause("submit")):
        log.write("started", 1)
        log.write("granted", 1)
        log.write("backoff", 1)
    log.close()
    with (tmp_path / "dmesg.jsonl").open("a") as file:
        file.write('{"torn')
    again = made(tmp_path)
    assert [x["what"] for x in again.lines] == ["submit", "started", "backoff"]
    assert again.cause("x").number == 2
    again.write("more")
    assert again.lines[-1]["seq"] > 4
    assert [x["what"] for x in again.select(level="warning")] == ["backoff"]
    assert [x["what"] for x in again.select(pid=1, since=1)] == ["started", "backoff"]
    again.close()


@in_loop
async def test_the_file_does_not_grow_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmesg, "FILE_BYTES", 2000)
    log = made(tmp_path)
    for n in range(100):
        log.write("exited", n, "x" * 50)
        log._flush()
    log.close()
    sizes = _sizes(tmp_path)
    assert len(sizes) == 2
    assert all(size < 2500 for size in sizes)
    assert made(tmp_path).lines[-1]["pid"] == 99


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.iterdir()]


@in_loop
async def test_a_log_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    log = Dmesg(tmp_path / "gone" / "dmesg.jsonl", lambda: 1.0)
    log.open()
    log.write("exited", 1)
    log.close()
    assert "No such file" in log.failed


async def lines_of(live: Live, **more: Any) -> list[tuple[str, int | None]]:
    items, _ = await live.talk.collect(p.Dmesg(**{"level": "debug", **more}))
    lines = [item["line"] for item in items]
    return [(line["what"], line["pid"]) for line in lines]


@in_kernel
async def test_a_preemption_bears_the_number_of_the_submit_that_caused_it(live: Live) -> None:
    training = await live.spin(steps=100_000, busy_ms=1)
    await live.until_state(training, State.RUNNING)
    urgent = await live.spin(steps=3, cls="interactive")
    await live.wait(urgent)
    lines = list(live.kernel.dmesg.lines)
    cause = next(x["cause"] for x in lines if x["what"] == "preempted" and x["pid"] == training)
    told = await lines_of(live, cause=cause)
    assert told[0] == ("submit", None)
    for line in [("started", urgent), ("preempted", training), ("held", training),
                 ("granted", urgent), ("loaded", urgent)]:  # fmt: skip
        assert line in told, told
    explained = await live.ask(p.Explain(training))
    because = {x["what"]: x["because"] for x in explained["log"]}
    assert because["preempted"].startswith("submit: spin")
    await live.ask(p.Kill(training, 9))
    assert ("kill", training) in await lines_of(live, pid=training)


@in_kernel
async def test_a_level_that_does_not_exist_is_refused(live: Live) -> None:
    with pytest.raises(BadArgument, match="level is one of debug"):
        await live.ask(p.Dmesg(level="loud"))
