"""What a worker may say: of itself and of its own guests. It is in the hands of its user."""

from __future__ import annotations

import os
from typing import Any

import pytest

from llmos.drivers.base import WorkerCame, WorkerSaid
from llmos.kernel.messages import MOST_NONSENSE
from llmos.kernel.process import State
from support.live import Live, in_kernel, wait_until


def say(live: Live, worker_id: str, kind: str, **values: Any) -> None:
    live.kernel.inbox.take(WorkerSaid(worker_id, {"k": kind, **values}))


async def two_engines(live: Live) -> tuple[int, int, str]:
    """A guest, another engine's guest, and the worker of the first."""
    mine = await live.guest(max_tokens=100_000)
    other = await live.guest(max_tokens=100_000, dtype="bfloat16")
    await live.until(mine, lambda g: g.progress.get("step", 0) >= 1)
    engine = live.kernel.core.m.engine_of(live.proc(mine))
    assert engine is not None
    return mine, other, engine.worker_id


REPORT = {"step": 5, "total": None, "metrics": {}, "marks": []}


@in_kernel
async def test_a_worker_ends_charges_and_rests_its_own_guests_only(live: Live) -> None:
    mine, other, worker_id = await two_engines(live)
    spin = await live.spin(steps=100_000)
    engine = live.proc(mine).engine_pid
    live.proc(other).inputs.append({"key": "k", "message": {}})
    nonsense = live.kernel.inbox._nonsense
    for victim in (spin, other, live.proc(other).engine_pid, 10**9, str(other), 0, None):
        said = nonsense.get(worker_id, 0)
        say(live, worker_id, "guest_done", pid=victim, status=1, reason="forged", result={"x": 1})
        say(live, worker_id, "guest_idle", pid=victim)
        say(live, worker_id, "mark", pid=victim)
        assert nonsense.pop(worker_id) == said + 3, victim
    for victim in (spin, other):
        before = live.proc(victim).device_seconds, dict(live.proc(victim).progress)
        say(live, worker_id, "report", shares={mine: 1.0, victim: 1.0}, **REPORT)
        assert nonsense.pop(worker_id) == 1
        assert (live.proc(victim).device_seconds, live.proc(victim).progress) == before
        assert (live.proc(victim).live, live.proc(victim).result) == (True, {})
    assert live.proc(other).inputs, "what waits for it is still there"
    for share in (-1.0, float("nan"), 1e300, 5e-324):
        say(live, worker_id, "report", shares={mine: share}, **REPORT)
        assert nonsense.pop(worker_id) == 1, share
    say(live, worker_id, "guest_idle", pid=engine)  # no guest at all
    assert nonsense.pop(worker_id) == 1
    say(live, worker_id, "guest_done", pid=mine, status=0, reason="done")
    assert not live.proc(mine).live


@in_kernel
async def test_of_guests_that_ended_or_were_forgotten_it_may_still_speak(live: Live) -> None:
    mine, _, worker_id = await two_engines(live)
    live.kernel.next_pid += 1
    forgotten = live.kernel.next_pid - 1
    say(live, worker_id, "guest_done", pid=mine, status=0, reason="done")
    step = live.proc(mine).progress["step"]
    say(live, worker_id, "report", shares={mine: 1.0, forgotten: 1.0, 10**9: 1.0}, **REPORT)
    say(live, worker_id, "mark", pid=mine)
    say(live, worker_id, "guest_done", pid=forgotten, status=0)
    assert worker_id not in live.kernel.inbox._nonsense
    assert live.proc(mine).progress["step"] == step


@in_kernel
async def test_nonsense_is_counted_wherever_it_is_met(live: Live) -> None:
    pid = await live.spin(steps=100_000)
    await live.until_state(pid, State.RUNNING)
    worker_id = live.proc(pid).worker_id
    for wrong in ("abc", [1], {"a": 1}, 1e400):
        say(live, worker_id, "guest_done", pid=wrong)
        say(live, worker_id, "done", status=wrong)
    assert live.kernel.inbox._nonsense[worker_id] == 8
    for _ in range(MOST_NONSENSE):
        say(live, worker_id, "idle", seen=None)
    await wait_until(lambda: live.proc(pid).worker_id != worker_id)


@pytest.mark.parametrize(
    "hello",
    [{"guests": ["a"]}, {"guests": 5}, {"rows": [1]}, {"rows": {"x": b""}}, {"waiting": [None]},
     {"seen": float("inf")}, {"device_bytes": "much"}],
)  # fmt: skip
@in_kernel
async def test_a_worker_whose_hello_makes_no_sense_is_ended(
    live: Live, hello: dict[str, Any]
) -> None:
    pid = await live.spin(steps=100_000)
    await live.until_state(pid, State.RUNNING)
    worker_id = live.proc(pid).worker_id
    live.kernel.core.m.workers[worker_id].up = False  # as one of an earlier kernel
    live.kernel.inbox.take(WorkerCame(worker_id, os.getpid(), {"k": "hello", **hello}, True))
    await wait_until(lambda: worker_id not in live.kernel.core.m.workers)
    assert any("in its hello" in why for _, _, why in live.proc(pid).story)


@in_kernel
async def test_a_hello_speaks_for_its_own_guests_only(live: Live) -> None:
    mine, other, worker_id = await two_engines(live)
    await live.until(other, lambda g: g.progress.get("step", 0) >= 1)
    live.kernel.core.m.workers[worker_id].up = False
    hello = {"k": "hello", "loaded": True, "guests": [mine], "waiting": [mine, other], "seen": 1}
    live.kernel.inbox.take(WorkerCame(worker_id, 1, hello, adopted=True))
    assert live.proc(mine).reason == "input"
    assert live.proc(other).reason != "input"
