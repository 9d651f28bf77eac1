"""check_driver: what every driver promises, as assertions that any driver can be run through.

    asyncio.run(check_driver(CpuDriver([]), home, entry="llmos.services.programs.spin:Spin"))

The program behind `entry` takes steps, busy_ms, memory_bytes, grow_bytes and has checkpoints: the
`spin` that llmos ships. Raises AssertionError with what was broken; returns what was checked.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmos.drivers.base import (
    Driver,
    DriverEvent,
    PlanMade,
    WorkerCame,
    WorkerEnded,
    WorkerHeld,
    WorkerSaid,
    WorkerSpec,
)

# Generous: a conformance run must not fail because the machine is busy.
LIMIT_S = 60.0
MIB = 1024**2

# How far beyond its promise a process may get before a driver's wall stops it.
WALL_SLACK = 1024 * MIB

# How long a held worker is watched for doing anything.
QUIET_S = 0.15
QUIET_ROUNDS = 20


class _Bench:
    """A driver under test, and everything it told."""

    def __init__(self, driver: Driver, home: Path, entry: str) -> None:
        self.driver, self.home, self.entry = driver, home, entry
        self.events: list[DriverEvent] = []
        self._news = asyncio.Event()
        self._numbers = itertools.count(1)

    def tell(self, event: DriverEvent) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, what: str, true: Callable[[DriverEvent], bool], since: int = 0) -> Any:
        """The first event from `since` on for which `true` holds."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while True:
                    for event in self.events[since:]:
                        if true(event):
                            return event
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"waited {LIMIT_S:.0f} s for: {what}") from None

    async def start(self, **args: Any) -> tuple[str, Path]:
        """A worker that is up and has been told to load; not granted yet."""
        number = next(self._numbers)
        work = self.home / "procs" / str(number)
        return await self.start_in(work, number, **args), work

    async def start_in(self, work: Path, pid: int, **args: Any) -> str:
        worker_id = f"w{pid}-{next(self._numbers)}"
        work.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  a bench may block
        device = self.driver.devices()[0]
        spec = WorkerSpec(
            worker_id, device.name, self.home / "w" / worker_id, work / "log", self.home
        )
        self.driver.start(spec)
        came = await self.until(
            f"{worker_id} comes up",
            lambda e: isinstance(e, WorkerCame) and e.worker_id == worker_id,
        )
        assert came.os_pid > 0
        assert not came.adopted
        self.driver.send(
            worker_id,
            {"k": "load", "pid": pid, "program": "spin", "entry": self.entry, "args": args,
             "work": str(work), "home": str(self.home), "device": device.torch_device,
             "threads": 1},
        )  # fmt: skip
        return worker_id

    def said(self, worker_id: str, k: str) -> list[dict[str, Any]]:
        return [
            e.message
            for e in self.events
            if isinstance(e, WorkerSaid) and e.worker_id == worker_id and e.message["k"] == k
        ]

    async def until_said(self, worker_id: str, k: str, more_than: int = 0) -> dict[str, Any]:
        await self.until(
            f"{worker_id} says {k}", lambda e: len(self.said(worker_id, k)) > more_than
        )
        return self.said(worker_id, k)[-1]

    async def until_ended(self, worker_id: str) -> int | None:
        ended = await self.until(
            f"{worker_id} ends", lambda e: isinstance(e, WorkerEnded) and e.worker_id == worker_id
        )
        return ended.status  # type: ignore[no-any-return]

    async def hold(self, worker_id: str) -> None:
        since = len(self.events)
        self.driver.hold(worker_id)
        await self.until(
            f"{worker_id} is held",
            lambda e: isinstance(e, WorkerHeld) and e.worker_id == worker_id,
            since,
        )


async def check_driver(driver: Driver, home: Path, *, entry: str) -> list[str]:
    """Run all checks on a driver that was not opened yet. `home` is an empty, short path."""
    bench = _Bench(driver, home, entry)
    for folder in (home / "w", home / "procs"):
        folder.mkdir(parents=True, exist_ok=True)
    await driver.open(bench.tell, home, "conformance")
    try:
        for check in CHECKS:
            await check(bench)
    finally:
        await driver.close()
    return [check.__name__ for check in CHECKS]


async def devices_are_named_and_have_room(b: _Bench) -> None:
    devices = b.driver.devices()
    assert devices, "a driver has at least one device"
    assert len({d.name for d in devices}) == len(devices)
    assert all(d.capacity_bytes > 0 and d.lanes >= 1 for d in devices)


async def a_plan_predicts_by_kind(b: _Bench) -> None:
    b.driver.plan(1, b.entry, {"steps": 1, "memory_bytes": 64 * MIB})
    made = await b.until("a plan", lambda e: isinstance(e, PlanMade) and e.ticket == 1)
    assert made.segments is not None, made.error
    assert sum(s["bytes"] for s in made.segments) >= 64 * MIB


async def steps_are_reported_in_order(b: _Bench) -> None:
    worker, _ = await b.start(steps=5, busy_ms=1.0, exit_status=3)
    b.driver.grant(worker, 2)
    status = await b.until_ended(worker)
    assert [m["step"] for m in b.said(worker, "report")] == [1, 2, 3, 4, 5]
    assert b.said(worker, "done")[-1]["status"] == 3
    assert status == 3


async def a_held_worker_does_nothing_and_goes_on_where_it_was(b: _Bench) -> None:
    worker, _ = await b.start(steps=10_000, busy_ms=1.0)
    b.driver.grant(worker, 2)
    await b.until_said(worker, "report")
    await b.hold(worker)
    # Reports that were on their way when it stopped may still come in; then nothing.
    for _ in range(QUIET_ROUNDS):
        before = len(b.said(worker, "report"))
        await asyncio.sleep(QUIET_S)
        if len(b.said(worker, "report")) == before:
            break
    else:
        raise AssertionError("a held worker goes on reporting")
    await asyncio.sleep(QUIET_S)
    assert len(b.said(worker, "report")) == before, "a held worker reported"
    b.driver.grant(worker, 2)
    await b.until_said(worker, "report", before + 2)
    steps = [m["step"] for m in b.said(worker, "report")]
    assert steps == list(range(1, len(steps) + 1)), "a step was lost or doubled"
    b.driver.signal(worker, 9)
    assert await b.until_ended(worker) == 128 + 9


async def a_held_worker_can_be_killed(b: _Bench) -> None:
    worker, _ = await b.start(steps=10_000, busy_ms=1.0)
    b.driver.grant(worker, 2)
    await b.until_said(worker, "report")
    await b.hold(worker)
    b.driver.signal(worker, 15)
    assert await b.until_ended(worker) == 128 + 15


async def memory_is_measured_and_comes_back(b: _Bench) -> None:
    device = b.driver.devices()[0].name
    nbytes = 128 * MIB
    worker, _ = await b.start(steps=10_000, busy_ms=1.0, memory_bytes=nbytes)
    b.driver.grant(worker, 2)
    await b.until_said(worker, "report", 1)
    sample = await b.driver.measure(device, [])
    used = sample.workers[worker]
    assert nbytes <= used <= nbytes + 512 * MIB, f"{used} for {nbytes}"
    assert 0 <= sample.available_bytes <= sample.total_bytes + sample.foreign_bytes + used
    b.driver.signal(worker, 9)
    await b.until_ended(worker)
    after = await b.driver.measure(device, [])
    assert worker not in after.workers


async def a_promise_is_a_wall(b: _Bench) -> None:
    """A program that grows beyond it ends by itself and says so; one within it notices nothing."""
    device, promised, grows = b.driver.devices()[0].name, 512 * MIB, 32 * MIB
    worker, _ = await b.start(steps=0, busy_ms=1.0, memory_bytes=64 * MIB, grow_bytes=grows)
    b.driver.limit(worker, promised)
    await b.until_said(worker, "loaded")
    await b.driver.measure(device, [])
    b.driver.grant(worker, 2)
    assert await b.until_ended(worker) == 1
    done = b.said(worker, "done")[-1]
    assert done["result"]["error"]["code"] == "out-of-memory", done
    within = (promised - 64 * MIB) // grows
    assert len(b.said(worker, "report")) >= within - 1, "the wall stood inside of the promise"
    assert done["result"]["memory"]["peak_bytes"] <= promised + WALL_SLACK
    assert done["result"]["memory"]["promised_bytes"] == promised


async def a_limit_can_be_raised(b: _Bench) -> None:
    worker, _ = await b.start(steps=40, busy_ms=1.0, grow_bytes=16 * MIB)
    b.driver.limit(worker, 64 * MIB)
    b.driver.limit(worker, 1024 * MIB)
    b.driver.grant(worker, 2)
    assert await b.until_ended(worker) == 0


async def stop_writes_a_checkpoint_and_a_new_worker_goes_on_from_it(b: _Bench) -> None:
    worker, work = await b.start(steps=10_000, busy_ms=1.0)
    b.driver.grant(worker, 2)
    await b.until_said(worker, "report", 3)
    b.driver.send(worker, {"k": "stop"})
    assert await b.until_ended(worker) == 0
    saved = b.said(worker, "checkpointed")[-1]
    assert Path(saved["folder"]).is_dir()  # noqa: ASYNC240  a bench may block
    again = await b.start_in(work, int(work.name), steps=10_000, busy_ms=1.0)
    b.driver.grant(again, 2)
    await b.until_said(again, "report")
    assert b.said(again, "report")[0]["step"] == saved["step"] + 1
    b.driver.signal(again, 9)
    await b.until_ended(again)


async def an_identity_that_does_not_match_is_not_adopted(b: _Bench) -> None:
    spec = WorkerSpec(
        "w9-9", b.driver.devices()[0].name, b.home / "w" / "w9-9", b.home / "log", b.home
    )
    b.driver.adopt(spec, 1, -12345.0)
    await b.until_ended("w9-9")


CHECKS = (
    devices_are_named_and_have_room,
    a_plan_predicts_by_kind,
    steps_are_reported_in_order,
    a_held_worker_does_nothing_and_goes_on_where_it_was,
    a_held_worker_can_be_killed,
    memory_is_measured_and_comes_back,
    a_promise_is_a_wall,
    a_limit_can_be_raised,
    stop_writes_a_checkpoint_and_a_new_worker_goes_on_from_it,
    an_identity_that_does_not_match_is_not_adopted,
)
