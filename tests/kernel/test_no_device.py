"""Processes that need no device: in no line, never held, charged to nobody; and engines that are
loaded before anybody uses them."""

from __future__ import annotations

import pytest

from llmos.kernel import events as ev
from llmos.kernel.calls import users_of
from llmos.kernel.errors import BadArgument, IllegalMove
from llmos.kernel.process import Class, Process, Role, State
from support.live import Live, in_kernel
from support.toy import Toy


def submit(toy: Toy, steps: int = 10, **more: object) -> int:
    return toy.submit(steps=steps, nbytes=0, gang=0, **more)


def test_it_runs_beside_whoever_has_the_device() -> None:
    toy = Toy(capacity=100)
    training = toy.submit(steps=1000, nbytes=100, cls=Class.INTERACTIVE)
    toy.run(1)
    pid = submit(toy, steps=5)
    toy.run(0.1)
    assert (toy.state(pid), toy.state(training)) == (State.RUNNING, State.RUNNING)
    toy.run(1)
    proc = toy.proc(pid)
    assert (proc.exit_status, proc.device_seconds, proc.devices) == (0, 0.0, ())
    assert toy.proc(training).preemptions == 0
    assert not [o for o in toy.orders if isinstance(o, ev.Hold)]


def test_it_is_paused_by_its_end_and_begins_again() -> None:
    toy = Toy()
    pid = submit(toy, steps=1000)
    toy.run(1)
    toy.do(ev.PauseAsked(pid))
    toy.run(0.1)
    assert (toy.state(pid), toy.proc(pid).worker_id) == (State.PAUSED, "")
    toy.do(ev.ResumeAsked(pid))
    toy.run(0.1)
    assert toy.state(pid) is State.RUNNING
    toy.do(ev.PauseAsked(pid))
    toy.do(ev.ResumeAsked(pid))  # its worker has not ended yet
    toy.run(0.1)
    assert toy.state(pid) is State.RUNNING
    with pytest.raises(IllegalMove, match="needs no device"):
        toy.do(ev.ReniceAsked(pid, 5))
    toy.do(ev.KillAsked(pid, 15))
    toy.run(0.1)
    assert toy.proc(pid).exit_status == 143


def test_a_shutdown_ends_it_and_the_next_kernel_goes_on_with_it() -> None:
    toy = Toy()
    pid = submit(toy, steps=1000)
    toy.run(1)
    toy.do(ev.ShutdownAsked())
    toy.run(0.1)
    assert (toy.state(pid), toy.core.m.workers) == (State.WAITING, {})
    later = Toy()
    proc = toy.proc(pid)
    later.core.restore(proc)
    for order in later.core.resume_all(later.now):
        later._carry_out(order)
    later.run(0.1)
    assert later.state(pid) is State.RUNNING


def test_on_a_full_disk_it_waits_for_room() -> None:
    toy = Toy()
    toy.do(ev.DiskTold("it is full"))
    pid = submit(toy, steps=2)
    toy.run(1)
    assert (toy.state(pid), toy.proc(pid).reason) == (State.WAITING, "disk")
    toy.do(ev.DiskTold(""))
    toy.run(1)
    assert toy.state(pid) is State.EXITED


def test_one_that_dies_goes_by_its_restart_policy() -> None:
    toy = Toy()
    pid = submit(toy, steps=1000, restart="on-failure")
    toy.run(1)
    toy.die(pid)
    assert toy.state(pid) is State.BACKOFF
    toy.run(60)
    assert toy.state(pid) is State.RUNNING


# ---- engines before their guests ----


def is_loaded(toy: Toy, pid: int) -> bool:
    worker = toy.core.m.workers.get(toy.worker(pid))
    return worker is not None and worker.loaded


def test_an_engine_is_loaded_before_it_has_a_guest_and_then_lets_go_of_the_device() -> None:
    toy = Toy()
    training = toy.submit(steps=1000)
    toy.run(1)
    engine = toy.load()
    toy.run(1)
    assert is_loaded(toy, engine)
    assert (toy.state(engine), toy.state(training)) == (State.WAITING, State.RUNNING)
    guest = toy.submit_guest("m", tokens=5)
    toy.run(1)
    assert toy.proc(guest).exit_status == 0
    assert toy.proc(guest).engine_pid == engine
    toy.run(11)
    assert toy.state(engine) is State.EXITED


def test_the_longest_keep_alive_counts_and_can_be_changed() -> None:
    toy = Toy()
    engine = toy.load(keep_s=-1)
    toy.run(1)
    toy.submit_guest("m", tokens=2)
    toy.run(1000)
    assert is_loaded(toy, engine), "a guest with less does not shorten it"
    toy.do(ev.KeepAsked(engine, 5.0))
    toy.run(4)
    assert is_loaded(toy, engine)
    toy.run(2)
    assert toy.state(engine) is State.EXITED
    short = toy.submit_guest("n", tokens=2)
    toy.core.m.engine_of(toy.proc(short))
    toy.run(1)
    other = toy.proc(short).engine_pid
    longer = Process(
        next(toy._pids), "infer", {"tokens": 2, "turns": False, "keep_alive_s": 100.0}, "u", 0,
        toy.now, role=Role.GUEST, engine_key="n",
    )  # fmt: skip
    toy.do(ev.Submitted(longer))
    toy.run(50)
    assert toy.state(other) is not State.EXITED
    toy.run(60)
    assert toy.state(other) is State.EXITED


@pytest.fixture(scope="module")
def live() -> object:
    made = Live()
    made.run(made.boot())
    yield made
    made.run(made.down())
    made.dispose()


@in_kernel
async def test_the_kernel_knows_who_uses_a_folder(live: Live) -> None:
    pid = await live.guest(max_tokens=100_000)
    path = str(live.path / "models" / "toy")
    users = users_of(live.kernel, path)
    assert [u["role"] for u in users] == ["engine", "guest"]
    assert users[1]["pid"] == pid
    assert users_of(live.kernel, path + "x") == []
    assert users_of(live.kernel, str(live.path / "models")) == users
    await live.clean()
    assert users_of(live.kernel, path) == []


@in_kernel
async def test_what_needs_no_device_takes_none(live: Live) -> None:
    for option in ({"device": "sim0"}, {"deadline_s": 5.0}):
        with pytest.raises(BadArgument, match="pull needs no device"):
            await live.submit("pull", source="smollm2", **option)


@in_kernel
async def test_submitting_an_engine_twice_is_one_engine(live: Live) -> None:
    first = await live.submit("engine", model="toy", keep_alive_s=60.0)
    await live.until(first, lambda p: p.started_at is not None)
    again = await live.submit("engine", model="toy", keep_alive_s=-1.0)
    assert again == first
    assert live.proc(first).args["keep_alive_s"] == -1.0
    guest = await live.guest()
    assert live.proc(guest).engine_pid == first
    await live.clean()
