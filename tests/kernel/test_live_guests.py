"""Guests of an engine on a running kernel: one worker, several processes, streams with offsets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmos.drivers.base import WorkerCame
from llmos.drivers.worker.stream import Stream
from llmos.kernel import protocol as p
from llmos.kernel.errors import BadArgument, IllegalMove
from llmos.kernel.process import Class, Process, Role, State
from support.live import Live, in_kernel, submission, wait_until


def tokens(items: list[dict[str, Any]]) -> list[int]:
    return [t for item in items for t in item["record"].get("tokens", ())]


def engine_of(live: Live, pid: int) -> Process:
    engine = live.kernel.core.m.engine_of(live.proc(pid))
    assert engine is not None
    return engine


@in_kernel
async def test_three_guests_share_one_worker_and_each_hears_its_own(live: Live) -> None:
    guests = [await live.guest(max_tokens=n) for n in (5, 9, 2)]
    rows = {row["pid"]: row for row in await live.ask(p.Ps())}
    engines = {engine_of(live, g).pid for g in guests}
    assert len(engines) == 1
    assert rows[engines.pop()]["role"] == "engine"
    for pid, wanted in zip(guests, (5, 9, 2), strict=True):
        items, answer = await live.talk.collect(p.Attach(pid))
        assert tokens(items) == list(range(1, wanted + 1))
        assert (answer["exit_status"], answer["result"]) == (0, {"tokens": wanted})


@in_kernel
async def test_other_arguments_of_the_engine_are_another_engine(live: Live) -> None:
    a = await live.guest(dtype="float32")
    b = await live.guest(dtype="bfloat16")
    c = await live.guest(dtype="float32", keep_alive_s=7.0)
    assert engine_of(live, a) is engine_of(live, c)
    assert engine_of(live, a) is not engine_of(live, b)


@in_kernel
async def test_who_comes_back_with_an_offset_misses_nothing(live: Live) -> None:
    pid = await live.guest(max_tokens=60)
    seen: list[dict[str, Any]] = []
    offset = 0
    for _ in range(3):
        async with await live.other() as talk:
            number = talk.begin(p.Attach(pid, offset))
            for _ in range(7):
                item = (await talk.next_message(number))["item"]
                seen.append(item)
                offset = item["offset"]
    items, answer = await live.talk.collect(p.Attach(pid, offset))
    assert tokens(seen + items) == list(range(1, 61))
    assert answer["exit_status"] == 0
    again, _ = await live.talk.collect(p.Attach(pid, 0, follow=False))
    assert tokens(again) == list(range(1, 61))


@in_kernel
async def test_attach_without_follow_stops_at_the_last_record(live: Live) -> None:
    pid = await live.guest(max_tokens=100_000)
    await live.until(pid, lambda g: g.progress.get("step", 0) >= 3)
    items, answer = await live.talk.collect(p.Attach(pid, follow=False))
    assert answer == {"offset": items[-1]["offset"]}
    with pytest.raises(BadArgument):
        await live.talk.collect(p.Attach(pid, -1))


@in_kernel
async def test_killing_one_guest_leaves_the_others_and_the_engine(live: Live) -> None:
    a, b = await live.guest(max_tokens=100_000), await live.guest(max_tokens=20)
    assert (await live.ask(p.Kill(a, 2)))["exit_status"] == 130
    assert (await live.wait(b))["exit_status"] == 0
    assert engine_of(live, b).live


@in_kernel
async def test_a_paused_guest_gets_nothing_while_the_others_go_on(live: Live) -> None:
    a, b = await live.guest(max_tokens=100_000), await live.guest(max_tokens=100_000)
    await live.until(a, lambda g: g.progress.get("step", 0) >= 3)
    await live.ask(p.Pause(a))
    _, end = await live.talk.collect(p.Attach(a, follow=False))
    before = live.proc(b).progress.get("step", 0)
    await live.until(b, lambda g: g.progress.get("step", 0) >= before + 5)
    more, _ = await live.talk.collect(p.Attach(a, end["offset"], follow=False))
    assert len(more) <= 1, "the step that ran when it was paused may still end"
    await live.ask(p.Resume(a))
    steps = live.proc(a).progress["step"]
    await live.until(a, lambda g: g.progress["step"] >= steps + 3)


@in_kernel
async def test_a_guest_takes_the_device_from_a_training_and_gives_it_back(live: Live) -> None:
    training = await live.spin(steps=100_000, busy_ms=50)
    await live.until(training, lambda t: t.progress.get("step", 0) >= 1)
    chat = await live.guest(max_tokens=5)
    assert (await live.wait(chat))["exit_status"] == 0
    assert live.proc(training).preemptions >= 1
    found = [e for e in await live.ask(p.Events()) if e["what"] == "preempted"]
    assert found[-1]["pid"] == training
    assert found[-1]["by"] == chat
    await live.until_state(training, State.RUNNING)


@in_kernel
async def test_a_batch_guest_waits_its_turn_behind_an_interactive_process(live: Live) -> None:
    urgent = await live.spin(steps=100_000, busy_ms=1, cls="interactive")
    await live.until(urgent, lambda t: t.progress.get("step", 0) >= 1)
    guest = await live.guest(max_tokens=5, cls="batch")
    assert live.proc(guest).cls is Class.BATCH
    before = live.proc(urgent).progress["step"]
    await live.until(urgent, lambda t: t.progress["step"] >= before + 10)
    assert live.proc(guest).progress == {}
    await live.ask(p.Kill(urgent))
    assert (await live.wait(guest))["exit_status"] == 0


@in_kernel
async def test_send_to_what_takes_no_input_is_refused(live: Live) -> None:
    pid = await live.spin(steps=1000)
    with pytest.raises(IllegalMove, match="takes no input"):
        await live.ask(p.Send(pid, {"text": "hello"}))


@in_kernel
async def test_killing_an_engine_ends_its_guests_with_a_reason(live: Live) -> None:
    guest = await live.guest(max_tokens=100_000)
    await live.until(guest, lambda g: g.progress.get("step", 0) >= 1)
    engine = engine_of(live, guest)
    await live.ask(p.Kill(engine.pid, 9))
    ended = await live.wait(guest)
    assert ended["exit_status"] == 1
    assert f"process {engine.pid}" in ended["reason"]
    again = await live.guest(max_tokens=2)
    assert (await live.wait(again))["exit_status"] == 0


@in_kernel
async def test_killing_an_engine_that_waits_for_memory_ends_its_guests(live: Live) -> None:
    driver: Any = live.kernel.drivers["sim"]
    hog = await live.spin(steps=100_000, memory_bytes=1000 * 2**20)
    await live.ask(p.Renice(hog, cls="interactive"))  # else it would be moved out
    real = driver.plan
    driver.plan = lambda ticket, entry, args: real(ticket, entry, {**args, "memory_bytes": 2**29})
    known, live.kernel.planner.profiles.lookup = (
        live.kernel.planner.profiles.lookup,
        lambda key: None,
    )  # type: ignore[method-assign]
    try:
        guest = await live.guest(dtype="float32", max_tokens=5)
    finally:
        driver.plan, live.kernel.planner.profiles.lookup = real, known  # type: ignore[method-assign]
    engine = engine_of(live, guest)
    assert (engine.state, engine.reason) == (State.WAITING, "memory")
    await live.ask(p.Kill(engine.pid))
    assert (await live.wait(guest))["exit_status"] == 1
    await live.ask(p.Kill(hog))


@in_kernel
async def test_an_idle_engine_leaves_after_its_keep_alive(live: Live) -> None:
    spins = [
        await live.spin(steps=100_000, busy_ms=1) for _ in range(2)
    ]  # alarms come all the time
    guest = await live.guest(max_tokens=2, keep_alive_s=0.8)
    engine = engine_of(live, guest)
    assert (await live.wait(guest))["exit_status"] == 0
    await wait_until(lambda: not engine.live, 5.0)
    assert engine.exit_status == 0
    assert all(live.proc(s).live for s in spins)


@in_kernel
async def test_an_engine_whose_only_guest_was_killed_before_it_came_up_leaves(live: Live) -> None:
    guest = await live.guest(max_tokens=100_000, keep_alive_s=0.1)
    engine = engine_of(live, guest)
    await live.ask(p.Kill(guest))
    await wait_until(lambda: not engine.live, 5.0)
    assert engine.exit_status == 0


@in_kernel
async def test_a_held_engine_whose_last_guest_is_killed_leaves(live: Live) -> None:
    guest = await live.guest(max_tokens=100_000, keep_alive_s=0.1, cls="batch")
    await live.until(guest, lambda g: g.progress.get("step", 0) >= 1)
    engine = engine_of(live, guest)
    urgent = await live.spin(steps=100_000, busy_ms=1, cls="interactive")
    await live.until(urgent, lambda t: t.progress.get("step", 0) >= 1)
    assert live.proc(guest).state is State.PREEMPTED
    await live.ask(p.Kill(guest))
    await wait_until(lambda: not engine.live, 5.0)
    assert live.proc(urgent).live


@in_kernel
async def test_guests_are_processes_of_the_table(live: Live) -> None:
    guest = await live.guest(max_tokens=100_000)
    await live.until_state(guest, State.RUNNING)
    row = next(r for r in await live.ask(p.Ps()) if r["pid"] == guest)
    engine = engine_of(live, guest)
    assert (row["role"], row["class"]) == ("guest", "interactive")
    assert row["worker_id"] == engine.worker_id
    assert live.proc(guest).role is Role.GUEST
    assert engine.pid < guest


@in_kernel
async def test_an_adopted_engine_is_told_whose_clients_are_gone(live: Live) -> None:
    guest = await live.guest(max_tokens=100_000)
    await live.until(guest, lambda g: g.progress.get("step", 0) >= 1)
    worker_id = engine_of(live, guest).worker_id
    driver: Any = live.kernel.drivers["sim"]
    inside = driver._workers[worker_id].guests
    live.kernel.core.m.workers[worker_id].up = False  # as right after a boot
    gone = 9999  # of a client of the earlier kernel
    inside[gone] = dataclasses.replace(inside[guest], stream=Stream(live.path / "gone"))
    hello = {"k": "hello", "loaded": True, "guests": [guest, gone], "waiting": [], "seen": 1}
    live.kernel.inbox.take(WorkerCame(worker_id, 1, hello, adopted=True))
    await wait_until(lambda: gone not in inside)
    assert guest in inside
    step = live.proc(guest).progress["step"]
    await live.until(guest, lambda g: g.progress["step"] > step + 3)


@in_kernel
async def test_an_adopted_engine_says_which_guests_wait_for_input(live: Live) -> None:
    guest = await live.guest(max_tokens=100_000)
    await live.until(guest, lambda g: g.progress.get("step", 0) >= 1)
    worker_id = engine_of(live, guest).worker_id
    live.kernel.core.m.workers[worker_id].up = False
    hello = {"k": "hello", "loaded": True, "guests": [guest], "waiting": [guest], "seen": 1}
    live.kernel.inbox.take(WorkerCame(worker_id, 1, hello, adopted=True))
    assert (live.proc(guest).state, live.proc(guest).reason) == (State.WAITING, "input")


@in_kernel
async def test_an_attached_process_ends_with_the_last_line_of_its_owner(live: Live) -> None:
    """Its client comes back over another line before the old one is seen to end; then it goes."""
    first, second = await live.other(), await live.other()
    pid = (await first.ask(submission("spin", steps=100_000, attached=True)))["pid"]
    begun = second.begin(p.Attach(pid, own=True))
    await second.next_message(begun)
    await first.close()
    await live.ask(p.Ping())
    assert live.proc(pid).live
    assert pid not in live.kernel.owners.missing
    second.send({"id": 0, "bye": True})
    await second.close()
    assert (await live.wait(pid))["exit_status"] == 129


@in_kernel
async def test_a_line_that_breaks_twice_has_its_whole_grace_each_time(live: Live) -> None:
    first = await live.other()
    pid = (await first.ask(submission("spin", steps=100_000, attached=True)))["pid"]
    await first.close()
    await wait_until(lambda: pid in live.kernel.owners.missing)
    before = live.kernel.owners.missing[pid].when()
    second = await live.other()
    await second.next_message(second.begin(p.Attach(pid, own=True)))
    assert pid not in live.kernel.owners.missing
    await second.close()
    await wait_until(lambda: pid in live.kernel.owners.missing)
    assert live.kernel.owners.missing[pid].when() > before
    await live.ask(p.Kill(pid, 9))
