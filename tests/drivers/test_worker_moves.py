"""A real worker moves its memory out and back: by message, at a step boundary, to the same bits."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.drivers.conformance import _Bench
from support.fake_gpus import FakeGpus, driver_without_gpu
from support.live import short_home

SPIN = "llmos.services.programs.spin:Spin"
BALLAST = 64 * 2**20
STEPS = 40


@pytest.fixture
def home() -> Iterator[Path]:
    path = short_home()
    yield path
    shutil.rmtree(path)


async def bench(home: Path) -> _Bench:
    made = _Bench(driver_without_gpu(FakeGpus()), home, SPIN)
    for folder in (home / "w", home / "procs"):
        folder.mkdir(parents=True)
    await made.driver.open(made.tell, home, "moves")
    return made


async def checksum(b: _Bench, ways: list[list[str]], **args: float) -> float:
    """Run to the end, moved out and back on the way -> the result's checksum."""
    worker, _ = await b.start(steps=STEPS, busy_ms=1.0, memory_bytes=BALLAST, **args)
    b.driver.grant(worker, 2)
    for number, way in enumerate(ways, 1):
        await b.until_said(worker, "report", 3 * number)
        for where in way:
            outs = len(b.said(worker, "moved_out"))
            b.driver.send(worker, {"k": "move_out", "where": where})
            out = await b.until_said(worker, "moved_out", outs)
            assert out["where"] == where
            assert out["bytes"] > BALLAST
            assert out["seconds"] > 0
        sample = await b.driver.measure("cuda0", [])
        if way[-1] == "disk":
            assert sample.workers[worker] < BALLAST
        # It can be held while it is out, comes back without a lease, and does no step before one.
        await b.hold(worker)
        reports = len(b.said(worker, "report"))
        b.driver.send(worker, {"k": "move_in"})
        await b.until_said(worker, "moved_in", number - 1)
        assert len(b.said(worker, "report")) == reports
        b.driver.grant(worker, 2)
    done = await b.until_said(worker, "done")
    await b.until_ended(worker)
    return float(done["result"]["checksum"])


@pytest.mark.slow
@pytest.mark.long
def test_a_training_that_was_moved_out_and_back_ends_at_the_same_bits(home: Path) -> None:
    async def go() -> None:
        b = await bench(home)
        try:
            moved = await checksum(b, [["host"], ["disk"], ["host", "disk"]])
            assert moved == await checksum(b, [])
        finally:
            await b.driver.close()

    asyncio.run(go())


@pytest.mark.slow
@pytest.mark.long
def test_who_is_out_comes_back_to_write_its_checkpoint(home: Path) -> None:
    async def go() -> None:
        b = await bench(home)
        try:
            worker, _ = await b.start(steps=0, busy_ms=1.0, memory_bytes=BALLAST)
            b.driver.grant(worker, 2)
            await b.until_said(worker, "report", 2)
            b.driver.send(worker, {"k": "move_out", "where": "disk"})
            await b.until_said(worker, "moved_out")
            b.driver.send(worker, {"k": "stop"})
            assert await b.until_ended(worker) == 0
            assert b.said(worker, "moved_in")
            assert b.said(worker, "checkpointed")
        finally:
            await b.driver.close()

    asyncio.run(go())
