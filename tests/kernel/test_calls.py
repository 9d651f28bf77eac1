"""Every call, over the real socket, on a kernel with a simulated device."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from llmos.kernel import protocol as p
from llmos.kernel.errors import (
    BadArgument,
    BadInput,
    IllegalMove,
    LlmosError,
    NoMemory,
    NoSuchProcess,
    NoSuchThing,
    NotAllowed,
    TimedOut,
)
from llmos.kernel.process import State
from support.client import Talk
from support.live import MIB, Live, in_kernel, wait_until


@in_kernel
async def test_a_submitted_process_runs_and_is_waited_for(live: Live) -> None:
    pid = await live.spin(steps=3, exit_status=7)
    ended = await live.wait(pid)
    assert ended == {"pid": pid, "exit_status": 7, "reason": "done", "result": {"steps": 3}}
    assert await live.wait(pid) == ended, "waiting for what has ended answers at once"


@in_kernel
async def test_ps_shows_the_live_ones_and_with_all_every_one(live: Live) -> None:
    done = await live.spin(steps=1)
    await live.wait(done)
    pid = await live.spin(steps=1000, name="mine", nice=3, cls="idle", memory_bytes=5 * MIB)
    await live.until(pid, lambda proc: proc.started_at is not None)
    rows = {row["pid"]: row for row in await live.ask(p.Ps())}
    assert done not in rows
    row = rows[pid]
    assert (row["name"], row["nice"], row["class"], row["state"]) == ("mine", 3, "idle", "running")
    assert row["user"]
    assert row["worker_id"]
    assert row["started_at"] >= row["submitted_at"]
    assert row["memory"]["promised_bytes"] >= 5 * MIB
    every = {row["pid"]: row for row in await live.ask(p.Ps(all=True))}
    assert every[done]["state"] == "exited"
    assert every[done]["ended_at"] is not None
    (one,) = await live.ask(p.Ps(pid=done))
    assert one["exit_status"] == 0


@in_kernel
async def test_status_names_the_kernel_and_accounts_for_its_devices(live: Live) -> None:
    pid = await live.spin(steps=1000)
    await live.until_state(pid, State.RUNNING)
    status = await live.ask(p.Status())
    assert status["kernel"]["os_pid"] == os.getpid()
    assert status["kernel"]["home"] == str(live.path)
    (device,) = status["devices"]
    assert device["running_pid"] == pid
    uptime = live.kernel.now() - live.kernel.core.m.started_at
    assert device["busy_s"] + device["idle_s"] == pytest.approx(uptime, abs=0.05)


@in_kernel
async def test_the_books_of_memory_add_up(live: Live) -> None:
    pid = await live.spin(steps=1000, memory_bytes=100 * MIB)
    await live.until_state(pid, State.RUNNING)
    (books,) = await live.ask(p.Mem())
    assert books["promised_bytes"] >= 100 * MIB
    total = books["foreign_bytes"] + books["promised_bytes"] + books["free_bytes"]
    assert total == books["capacity_bytes"]
    assert sum(s["bytes"] for s in books["segments"]) == books["promised_bytes"]
    assert [s for s in books["segments"] if s["pids"] == [pid]]


@in_kernel
async def test_pause_answers_when_the_device_is_free_and_resume_goes_on(live: Live) -> None:
    pid = await live.spin(steps=60, busy_ms=5)
    await live.until(pid, lambda proc: proc.progress.get("step", 0) >= 2)
    answer = await live.ask(p.Pause(pid))
    assert (answer["pid"], answer["state"], answer["freed_bytes"]) == (pid, "paused", 0)
    assert live.kernel.core.m.devices["sim0"].lease is None
    step = live.proc(pid).progress["step"]
    other = await live.spin(steps=5)
    await live.wait(other)
    assert live.proc(pid).progress["step"] == step
    assert (await live.ask(p.Resume(pid)))["pid"] == pid
    assert (await live.wait(pid))["result"] == {"steps": 60}
    with pytest.raises(IllegalMove):
        await live.ask(p.Resume(pid))


@in_kernel
async def test_stop_and_cont_are_pause_and_resume(live: Live) -> None:
    pid = await live.spin(steps=1000)
    await live.until_state(pid, State.RUNNING)
    await live.ask(p.Kill(pid, 19))
    assert live.proc(pid).state is State.PAUSED
    await live.ask(p.Kill(pid, 18))
    await live.until_state(pid, State.RUNNING)


@in_kernel
async def test_kill_answers_when_the_process_is_gone_and_its_memory_back(live: Live) -> None:
    free = live.kernel.core.m.ledger.free("sim0")
    pid = await live.spin(steps=1000, memory_bytes=64 * MIB)
    await live.until_state(pid, State.RUNNING)
    answer = await live.ask(p.Kill(pid, 2))
    assert answer == {"pid": pid, "state": "exited", "exit_status": 130}
    assert live.kernel.core.m.ledger.free("sim0") == free
    with pytest.raises(IllegalMove, match="ended already"):
        await live.ask(p.Kill(pid))


@in_kernel
async def test_a_process_can_be_killed_in_the_moment_it_was_submitted(live: Live) -> None:
    for _ in range(5):
        pid = await live.spin(steps=1000)
        assert (await live.ask(p.Kill(pid, 15)))["exit_status"] == 143


@in_kernel
async def test_renice_changes_who_goes_first(live: Live) -> None:
    a, b = await live.spin(steps=100_000, busy_ms=1), await live.spin(steps=100_000, busy_ms=1)
    answer = await live.ask(p.Renice(b, -20))
    assert answer == {"pid": b, "nice": -20, "class": "batch", "deadline_at": None}
    await live.until(b, lambda proc: proc.device_seconds > 0.7)
    assert live.proc(a).device_seconds < live.proc(b).device_seconds
    with pytest.raises(BadArgument, match="-20 to 19"):
        await live.ask(p.Renice(a, 20))
    with pytest.raises(BadArgument, match="class is one of"):
        await live.ask(p.Renice(a, cls="urgent"))
    for wrong in (-5.0, float("inf")):
        with pytest.raises(BadArgument, match="a deadline is a time from now on"):
            await live.ask(p.Renice(a, deadline_s=wrong))
    assert live.proc(a).deadline_at is None


@in_kernel
async def test_a_class_changes_while_both_run(live: Live) -> None:
    a, b = await live.spin(steps=100_000, busy_ms=1), await live.spin(steps=100_000, busy_ms=1)
    await live.ask(p.Renice(b, cls="interactive"))
    await live.until(b, lambda proc: proc.state == "running")
    used = live.proc(a).device_seconds
    await live.until(b, lambda proc: proc.device_seconds > 0.6)
    assert live.proc(a).device_seconds == pytest.approx(used, abs=0.05)


@in_kernel
async def test_a_deadline_that_cannot_wait_goes_first(live: Live) -> None:
    a, b = await live.spin(steps=100_000, busy_ms=1), await live.spin(steps=1000, busy_ms=1)
    answer = await live.ask(p.Renice(b, deadline_s=5.0))
    assert answer["deadline_at"] == pytest.approx(live.kernel.now() + 5.0, abs=0.5)
    used = live.proc(a).device_seconds
    await live.until(b, lambda proc: proc.device_seconds > 0.7)
    assert live.proc(a).device_seconds == pytest.approx(used, abs=0.2)
    advice = (await live.ask(p.Explain(b)))["advice"]
    assert any("its deadline is in" in line for line in advice)


@in_kernel
async def test_release_gives_memory_back_and_says_how_much(live: Live) -> None:
    pid = await live.spin(steps=100_000, busy_ms=1, memory_bytes=300 * MIB)
    await live.until(pid, lambda proc: proc.progress.get("step", 0) >= 2)
    await live.kernel.upkeep.measure()
    free = live.kernel.core.m.ledger.free("sim0")
    answer = await live.ask(p.Pause(pid, release=True))
    assert answer["state"] == "paused"
    assert answer["freed_bytes"] == 300 * MIB
    assert answer["seconds"] >= 0
    assert live.kernel.core.m.ledger.free("sim0") >= free + 300 * MIB
    step = live.proc(pid).checkpoint["step"]
    await live.ask(p.Resume(pid))
    await live.until(pid, lambda proc: proc.progress.get("step", 0) > step)


@in_kernel
async def test_a_dry_run_says_who_would_go_and_when(live: Live) -> None:
    first = await live.spin(steps=100_000, busy_ms=1, memory_bytes=700 * MIB)
    await live.until(first, lambda proc: proc.progress.get("step", 0) >= 2)
    told = await live.ask(p.Submit("spin", {"memory_bytes": 100 * MIB}, dry_run=True))
    assert (told["fits_now"], told["starts"]["at"], told["would_move_out"]) == (True, "now", [])
    told = await live.ask(
        p.Submit("spin", {"memory_bytes": 700 * MIB}, cls="interactive", dry_run=True)
    )
    assert [v["pid"] for v in told["would_move_out"]] == [first]
    assert told["starts"]["at"] == "soon"
    told = await live.ask(p.Submit("spin", {"memory_bytes": 700 * MIB}, dry_run=True))
    assert told["starts"]["at"] == "when memory is free"


@in_kernel
async def test_checkpoint_answers_when_it_is_on_disk(live: Live) -> None:
    pid = await live.spin(steps=1000)
    await live.until(pid, lambda proc: proc.progress.get("step", 0) >= 2)
    answer = await live.ask(p.Checkpoint(pid))
    assert answer["step"] >= 2
    assert os.path.isdir(answer["folder"])  # noqa: ASYNC240


@in_kernel
async def test_explain_tells_the_whole_story_and_what_would_help(live: Live) -> None:
    first = await live.spin(steps=1000, memory_bytes=700 * MIB)
    second = await live.spin(steps=1, memory_bytes=700 * MIB)
    told = await live.ask(p.Explain(second))
    assert told["reason"] == "memory"
    assert told["queue_place"] == 0
    assert any(f"llmos pause --release {first}" in line for line in told["advice"])
    assert [line["what"] for line in told["story"]][:2] == ["planning", "waiting"]
    await live.ask(p.Kill(first))
    await live.wait(second)


@in_kernel
async def test_events_are_numbered_and_can_be_followed(live: Live) -> None:
    since = live.kernel.dmesg.seq
    pid = await live.spin(steps=2)
    await live.wait(pid)
    found = await live.ask(p.Events(since))
    mine = [e["what"] for e in found if e["pid"] == pid]
    assert mine[:3] == ["started", "granted", "loaded"]
    assert mine[-1] == "exited"
    numbers = [e["seq"] for e in found]
    assert numbers == list(range(since + 1, since + 1 + len(found)))
    assert await live.ask(p.Events(numbers[-1])) == []


@in_kernel
async def test_the_programs_are_described_with_their_arguments(live: Live) -> None:
    manifest = await live.ask(p.Programs())
    assert manifest["errors"] == []
    assert {"infer", "pretrain", "finetune", "gan", "spin"} <= set(manifest["programs"])
    assert "models" in manifest["services"]
    assert {a["name"] for a in manifest["programs"]["spin"]["args"]} >= {"steps", "busy_ms"}


@in_kernel
async def test_a_dry_run_predicts_and_leaves_nothing(live: Live) -> None:
    before = set(live.kernel.core.m.procs)
    plan = await live.ask(p.Submit("spin", {"memory_bytes": 64 * MIB}, dry_run=True))
    assert plan["total_bytes"] >= 64 * MIB
    assert (plan["device"], plan["fits_now"]) == ("sim0", True)
    assert set(live.kernel.core.m.procs) == before


@in_kernel
async def test_wait_gives_up_when_told_to(live: Live) -> None:
    pid = await live.spin(steps=10_000)
    with pytest.raises(TimedOut, match=f"process {pid} is still"):
        await live.ask(p.Wait(pid, 0.01))


NOT_TEXT: Any = 5
WRONG: list[tuple[p.Request, type[LlmosError], str]] = [
    (p.Submit("spn"), NoSuchThing, "no program 'spn'"),
    (p.Submit("spin", {"stps": 3}), BadArgument, "no argument --stps"),
    (p.Submit("spin", {"steps": "3"}), BadArgument, "--steps is a whole number"),
    (p.Submit("spin", {"steps": -1}), BadArgument, "--steps is at least 0"),
    (p.Submit("spin", {"exit_status": 256}), BadArgument, "--exit-status is at most 255"),
    (p.Submit("spin", nice=20), BadArgument, "nice is -20 to 19"),
    (p.Submit("spin", cls="urgent"), BadArgument, "class is one of"),
    (p.Submit("spin", restart="maybe"), BadArgument, "restart is no, on-failure"),
    (p.Submit("spin", device="cuda0"), NoSuchThing, "no device 'cuda0'"),
    (p.Submit("spin", env={"A": NOT_TEXT}), BadArgument, "env"),
    (p.Submit("spin", {"memory_bytes": 2 * 1024 * MIB}), NoMemory, "sim0 has"),
    (p.Submit("infer", {"model": "toi", "prompt": "x"}), NoSuchThing, "no model 'toi'"),
    (p.Submit("infer", {"model": "/no/where", "prompt": "x"}), NoSuchThing, "no model folder"),
    (p.Submit("pretrain", {"data": "/x", "out": "../up"}), BadArgument, "not a name"),
    (p.Kill(99_999), NoSuchProcess, "no process 99999"),
    (p.Pause(99_999), NoSuchProcess, "no process 99999"),
    (p.Resume(99_999), NoSuchProcess, "no process 99999"),
    (p.Renice(99_999, 0), NoSuchProcess, "no process 99999"),
    (p.Wait(99_999), NoSuchProcess, "no process 99999"),
    (p.Explain(99_999), NoSuchProcess, "no process 99999"),
    (p.Ps(pid=99_999), NoSuchProcess, "no process 99999"),
    (p.Attach(99_999), NoSuchProcess, "no process 99999"),
    (p.Logs(99_999), NoSuchProcess, "no process 99999"),
    (p.Checkpoint(99_999), NoSuchProcess, "no process 99999"),
    (p.Send(99_999, {}), NoSuchProcess, "no process 99999"),
    (p.Call("nobody.there"), NoSuchThing, "no service 'nobody'"),
    (p.Call("models.nothing"), NoSuchThing, "no call 'nothing'"),
    (p.Services("freeze", "models"), BadArgument, "action is one of ls, reload, start, stop"),
    (p.Services("stop", "models"), NotAllowed, "cannot be stopped"),
    (p.Call("models.shw", {"name": "toy"}), NoSuchThing, "no call 'shw'"),
    (p.Call("models.show"), BadArgument, "models.show needs name"),
    (p.Call("models.show", {"name": 3}), BadArgument, "models.show: name is text, not 3"),
    (p.Call("models.show", {"nme": "toy"}), BadArgument, "models.show has no argument 'nme'"),
    (p.Call("models.ls", {}, -1.0), BadArgument, "models.ls: the limit of a call is a time"),
    (p.Services("restart", "modles"), NoSuchThing, "no service 'modles'"),
]


@pytest.mark.parametrize(("request_", "error", "says"), WRONG, ids=lambda v: str(v)[:60])
def test_what_makes_no_sense_is_refused_with_one_line_and_leaves_nothing(
    live: Live, request_: p.Request, error: type[LlmosError], says: str
) -> None:
    async def go() -> None:
        before = set(live.kernel.core.m.procs)
        folders = sorted(os.listdir(live.path / "procs"))
        with pytest.raises(error) as caught:
            await live.ask(request_)
        assert says in caught.value.message
        assert "\n" not in caught.value.message
        assert set(live.kernel.core.m.procs) == before
        assert sorted(os.listdir(live.path / "procs")) == folders

    live.run(go())


@in_kernel
async def test_a_near_name_is_suggested(live: Live) -> None:
    for request, near in (
        (p.Submit("spn"), "spin"),
        (p.Submit("spin", {"stps": 3}), "--steps"),
        (p.Submit("infer", {"model": "toi", "prompt": "x"}), "toy"),
        (p.Services("restart", "modles"), "models"),
    ):
        with pytest.raises(LlmosError) as caught:
            await live.ask(request)
        assert near in caught.value.hint


@in_kernel
async def test_a_plan_that_fails_is_the_answer_and_nothing_stays(live: Live) -> None:
    seen: list[int] = []
    driver: Any = live.kernel.drivers["sim"]
    driver.plan = lambda ticket, entry, args: seen.append(ticket)
    try:
        asked = live.talk.begin(p.Submit("spin"))
        await wait_until(lambda: bool(seen))
        (pid,) = (q.pid for q in live.kernel.core.m.procs.values() if q.state is State.PLANNING)
        watching = [live.talk.begin(p.Wait(pid)), live.talk.begin(p.Attach(pid))]
        await wait_until(lambda: any(len(c._tasks) == 3 for c in live.kernel.clients))
        error = BadInput("the file is empty", "give another").to_wire()
        live.kernel.planner.planned(seen[0], None, error)
        with pytest.raises(BadInput, match="the file is empty"):
            await live.talk.answer(asked)
        for number in watching:
            with pytest.raises(NoSuchProcess):
                await live.talk.answer(number)
        with pytest.raises(NoSuchProcess):
            await live.ask(p.Ps(pid=pid))
    finally:
        del driver.plan


@in_kernel
async def test_an_attached_process_ends_with_its_client(live: Live) -> None:
    async with await live.other() as talk:
        pid = (await talk.ask(p.Submit("spin", {"steps": 100_000}, attached=True)))["pid"]
        stays = (await talk.ask(p.Submit("spin", {"steps": 100_000})))["pid"]
        await live.until_state(pid, State.RUNNING, State.READY)
        talk.send({"id": 0, "bye": True})
        await talk.writer.drain()
    assert (await live.wait(pid))["exit_status"] == 129
    assert live.proc(stays).live


@in_kernel
async def test_a_client_that_goes_while_its_process_is_planned_leaves_no_trouble(
    live: Live,
) -> None:
    driver, held = live.kernel.drivers["sim"], []
    real = driver.plan
    driver.plan = lambda *order: held.append(order)  # type: ignore[method-assign]
    try:
        async with await live.other() as talk:
            talk.begin(p.Submit("spin", {"steps": 100_000, "memory_bytes": 11}, attached=True))
            talk.begin(p.Submit("spin", {"steps": 3, "memory_bytes": 12}))
            await wait_until(lambda: len(held) == 2)
            talk.send({"id": 0, "bye": True})
        gone, stays = sorted(
            q.pid for q in live.kernel.core.m.procs.values() if q.state == "planning"
        )
        await wait_until(lambda: not live.proc(gone).live)
    finally:
        driver.plan = real  # type: ignore[method-assign]
    for order in held:
        driver.plan(*order)
    assert (await live.wait(stays))["exit_status"] == 0
    assert live.proc(gone).exit_status == 129


@in_kernel
async def test_a_process_that_fails_says_why(live: Live) -> None:
    pid = await live.spin(steps=10, fail_at=3)
    ended = await live.wait(pid)
    assert ended["exit_status"] == 1
    assert "RuntimeError: told to fail" in ended["reason"]


@in_kernel
async def test_on_failure_restarts_what_failed_and_explain_counts_it(live: Live) -> None:
    pid = await live.spin(steps=10, fail_at=3, restart="on-failure")
    proc = await live.until_state(pid, State.BACKOFF)
    assert proc.restarts == 1
    again = await live.until(pid, lambda q: q.restarts == 2)
    assert again.state is State.BACKOFF
    assert (await live.ask(p.Kill(pid)))["exit_status"] == 143


@in_kernel
async def test_a_far_alarm_survives_a_near_one(live: Live) -> None:
    """A restart that is due in a second comes, though slices end all the time meanwhile."""
    a = await live.spin(steps=100_000, busy_ms=1)
    b = await live.spin(steps=100_000, busy_ms=1)
    pid = await live.spin(steps=10, fail_at=1, restart="on-failure", cls="interactive")
    await live.until(pid, lambda q: q.restarts == 1)
    await live.until(pid, lambda q: q.restarts == 2)
    assert live.proc(a).live
    assert live.proc(b).live


@in_kernel
async def test_many_clients_ask_at_once_and_each_gets_its_own_answers(live: Live) -> None:
    async def one(number: int) -> None:
        async with await live.other() as talk:
            args = {"steps": 1, "busy_ms": 0.1, "exit_status": number}
            pids = [await talk.ask(p.Submit("spin", args)) for _ in range(3)]
            for pid in pids:
                assert (await talk.ask(p.Wait(pid["pid"])))["exit_status"] == number

    await asyncio.gather(*(one(n) for n in range(16)))


@in_kernel
async def test_one_client_may_have_many_calls_open(live: Live) -> None:
    pid = await live.spin(steps=10_000)
    waits = [live.talk.begin(p.Wait(pid)) for _ in range(50)]
    assert await live.ask(p.Ping()) is None
    await live.ask(p.Kill(pid))
    answers: list[Any] = [await live.talk.answer(n) for n in waits]
    assert {a["exit_status"] for a in answers} == {143}


@in_kernel
async def test_a_cancelled_wait_leaves_nothing_open(live: Live) -> None:
    pid = await live.spin(steps=10_000)
    talk: Talk = await live.other()
    async with talk:
        number = talk.begin(p.Wait(pid))
        client = await _client_of(live, talk)
        await wait_until(lambda: number in client._tasks)
        talk.send({"id": number, "cancel": True})
        await wait_until(lambda: number not in client._tasks)
        assert await talk.ask(p.Ping()) is None


async def _client_of(live: Live, talk: Talk) -> Any:
    await talk.ask(p.Ping())
    (client,) = (c for c in live.kernel.clients if c._tasks)
    return client
