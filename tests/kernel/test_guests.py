"""An engine with guests: processes that execute in the worker of another."""

from __future__ import annotations

import pytest

from llmos.kernel import events as ev
from llmos.kernel import guests
from llmos.kernel.errors import Busy, IllegalMove
from llmos.kernel.process import Class, State
from support.toy import Toy


def test_three_guests_share_one_engine() -> None:
    toy = Toy()
    guests = [toy.submit_guest(tokens=20) for _ in range(3)]
    toy.run(5)
    assert [toy.proc(g).exit_status for g in guests] == [0, 0, 0]
    assert len([o for o in toy.orders if isinstance(o, ev.StartWorker)]) == 1
    engine = toy.proc(1)
    assert (engine.state, engine.reason) == (State.WAITING, "idle")


def test_device_seconds_are_split_among_the_guests_by_tokens() -> None:
    toy = Toy()
    long, short = toy.submit_guest(tokens=100), toy.submit_guest(tokens=10)
    toy.run(5)
    assert toy.proc(long).device_seconds > 4 * toy.proc(short).device_seconds
    busy = toy.core.m.devices["sim0"].busy_s
    assert sum(p.device_seconds for p in toy.core.m.procs.values()) == pytest.approx(busy)


def test_a_batch_guest_never_rides_past_a_waiting_training() -> None:
    toy = Toy()
    training = toy.submit(steps=10_000, step_s=0.05)
    urgent = toy.submit_guest(tokens=200)
    batch = toy.submit_guest(tokens=200, cls=Class.BATCH)
    toy.run(1)
    assert toy.state(urgent) is State.RUNNING
    assert toy.proc(batch).progress == {}, "it got a token"
    assert toy.state(training) is State.PREEMPTED
    toy.run(30)
    assert toy.proc(urgent).exit_status == 0
    assert toy.proc(batch).exit_status == 0
    assert toy.proc(training).device_seconds > 10


def test_killing_a_guest_leaves_the_engine_and_the_others() -> None:
    toy = Toy()
    a, b = toy.submit_guest(tokens=100), toy.submit_guest(tokens=20)
    toy.run(0.2)
    toy.do(ev.KillAsked(a, 2))
    assert toy.proc(a).exit_status == 130
    toy.run(5)
    assert toy.proc(b).exit_status == 0
    assert toy.proc(1).live


def test_a_guest_that_waits_for_input_gives_the_device_back() -> None:
    toy = Toy()
    training = toy.submit(steps=10_000)
    chat = toy.submit_guest(tokens=1000)
    toy.run(0.5)
    worker = toy.worker(2)
    toy.do(ev.GuestIdle(worker, chat))
    toy.do(ev.WorkerIdle(worker, 1))
    toy.run(0.2)
    assert (toy.state(chat), toy.proc(chat).reason) == (State.WAITING, "input")
    assert toy.state(training) is State.RUNNING
    toy.do(ev.InputGiven(chat, {"prompt": "and?"}))
    toy.run(0.01)
    assert toy.state(chat) is State.RUNNING
    assert toy.state(training) is State.PREEMPTED


def test_an_idle_word_that_crossed_a_new_guest_counts_for_nothing() -> None:
    toy = Toy()
    toy.submit_guest(tokens=3)
    toy.run(0.03)
    worker = toy.worker(1)
    seen = toy.core.m.workers[worker].admits_sent
    late = toy.submit_guest(tokens=3)
    toy.do(ev.WorkerIdle(worker, seen - 1))
    assert toy.state(late) in (State.READY, State.RUNNING)
    toy.run(1)
    assert toy.proc(late).exit_status == 0


def test_an_idle_engine_leaves_after_keep_alive() -> None:
    toy = Toy()
    toy.submit_guest(tokens=3)
    toy.run(9)
    assert toy.proc(1).live
    toy.run(3)
    assert toy.proc(1).exit_status == 0
    again = toy.submit_guest(tokens=3)
    toy.run(1)
    assert toy.proc(again).exit_status == 0


def test_an_engine_whose_guest_is_killed_while_it_is_held_in_its_loading_leaves_too() -> None:
    toy = Toy()
    urgent = toy.submit(steps=1, nbytes=10, cls=Class.INTERACTIVE)
    toy.do(ev.PauseAsked(urgent))
    guest = toy.submit_guest(cls=Class.BATCH)
    toy.run(0.015)
    assert not toy.core.m.workers[toy.worker(guest - 1)].loaded
    toy.do(ev.ResumeAsked(urgent))
    toy.do(ev.KillAsked(guest, 15))
    toy.run(0.005)
    engine = toy.proc(guest - 1)
    assert (engine.state, engine.reason) == (State.WAITING, "idle")
    toy.run(20)
    assert engine.exit_status == 0


def test_the_memory_of_an_idle_engine_is_released_by_hand_and_that_of_one_in_use_is_not() -> None:
    toy = Toy()
    guest = toy.submit_guest(tokens=30)
    toy.run(0.1)
    with pytest.raises(IllegalMove, match="is an engine"):
        toy.do(ev.PauseAsked(1, release=True))
    toy.run(5)
    assert toy.proc(guest).exit_status == 0
    with pytest.raises(IllegalMove, match="is an engine"):
        toy.do(ev.PauseAsked(1))
    toy.do(ev.PauseAsked(1, release=True))
    toy.run(1)
    assert not toy.proc(1).live
    assert toy.core.m.ledger.promised("sim0") == 0


def test_an_idle_engine_makes_room_for_a_training() -> None:
    toy = Toy(capacity=250)
    toy.submit_guest(tokens=3)
    toy.run(1)
    training = toy.submit(nbytes=100, steps=1)
    toy.run(1)
    assert toy.proc(1).exit_status == 0
    assert "makes room" in toy.proc(1).reason
    assert toy.proc(training).exit_status == 0


def test_a_paused_guest_keeps_its_place_and_goes_on() -> None:
    toy = Toy()
    guest = toy.submit_guest(tokens=50)
    toy.run(0.1)
    toy.do(ev.PauseAsked(guest))
    assert toy.state(guest) is State.PAUSED
    rank = [o for o in toy.orders if isinstance(o, ev.Rank)]
    assert rank[-1].parked
    toy.do(ev.ResumeAsked(guest))
    toy.run(5)
    assert toy.proc(guest).exit_status == 0


def test_a_plan_that_fails_takes_the_guests_with_it() -> None:
    toy = Toy()
    from llmos.kernel.process import Process, Role

    engine = Process(50, "engine", {}, "u", 0, 0.0, role=Role.ENGINE, engine_key="k")
    guest = Process(51, "infer", {}, "u", 0, 0.0, role=Role.GUEST, engine_key="k")
    toy.do(ev.Submitted(guest, engine))
    toy.do(ev.PlanFailed(50, "broken"))
    assert toy.core.m.procs == {}
    assert toy.core.m.engines == {}


def test_input_that_comes_before_its_guest_was_handed_over_follows_it() -> None:
    toy = Toy()
    toy.submit(steps=10_000, cls=Class.INTERACTIVE)
    toy.run(0.5)
    guest = toy.submit_guest(tokens=3, turns=True, cls=Class.BATCH)
    toy.do(ev.InputGiven(guest, {"prompt": "first"}))
    toy.run(0.5)
    toy.do(ev.InputGiven(guest, {"prompt": "second"}))
    toy.do(ev.KillAsked(1, 9))
    toy.run(5)
    to_guest = [o for o in toy.orders if isinstance(o, ev.Admit | ev.Forward)]
    assert [type(o) for o in to_guest] == [ev.Admit, ev.Forward, ev.Forward]
    assert [o.message["prompt"] for o in to_guest[1:]] == ["first", "second"]  # type: ignore[union-attr]


def test_a_guest_that_was_idle_before_it_read_its_input_is_not() -> None:
    toy = Toy()
    guest = toy.submit_guest(tokens=3, turns=True)
    toy.run(5)
    assert toy.proc(guest).reason == "input"
    toy.do(ev.InputGiven(guest, {"prompt": "x"}))
    worker = toy.worker(1)
    toy.do(ev.GuestIdle(worker, guest, seen=1))
    assert toy.state(guest) is State.RUNNING, "it said so before it had read the input"
    toy.do(ev.GuestIdle(worker, guest, seen=2))
    assert toy.proc(guest).reason == "input"


def test_a_guest_that_joins_a_planned_engine_is_saved() -> None:
    toy = Toy()
    toy.submit_guest(tokens=1000)
    toy.run(0.5)
    second = toy.submit_guest(tokens=1000)
    assert ev.Save(second) in toy.orders


def test_what_the_last_step_cost_a_guest_is_saved_too() -> None:
    toy = Toy()
    first, guest = toy.submit_guest(tokens=1000), toy.submit_guest(tokens=1000)
    toy.run(0.5)
    worker = toy.worker(toy.proc(first).engine_pid)
    toy.do(ev.ProcessDone(worker, guest, 0, "", {}))
    before = toy.proc(guest).device_seconds
    toy.now += 0.01
    orders = toy.do(ev.Reported(worker, 1, None, {}, {guest: 1.0}))
    assert toy.proc(guest).device_seconds > before
    assert ev.Save(guest) in orders


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("up", [False, True])
def test_what_waits_for_a_guest_is_bounded_in_number(attached: bool, up: bool) -> None:
    toy = Toy()
    chat = toy.submit_guest(turns=True, tokens=3)
    toy.proc(chat).attached = attached
    toy.run(0.2)
    if not up:
        toy.die(toy.proc(chat).engine_pid, 139)
    for n in range(guests.MOST_INPUTS):
        toy.do(ev.InputGiven(chat, {"prompt": "x"}, f"k{n}"))
    for _ in range(5):
        toy.do(ev.InputGiven(chat, {"prompt": "x"}, "k7"))  # a client that sends it once more
        with pytest.raises(Busy, match="1,000 inputs"):
            toy.do(ev.InputGiven(chat, {"prompt": "x"}, "more"))
    engine = toy.core.m.engine_of(toy.proc(chat))
    assert engine is not None
    worker = toy.core.m.worker_of(engine)
    waiting = toy.core.m.early_input.get(chat, []) if worker is None else worker.unread
    assert len(waiting) == guests.MOST_INPUTS
    assert len(toy.proc(chat).inputs) == (0 if attached else guests.MOST_INPUTS)
    toy.run(30)  # all are answered
    assert toy.proc(chat).reason == "input"
    toy.do(ev.InputGiven(chat, {"prompt": "x"}, "more"))
    toy.do(ev.KillAsked(chat, 9))
    assert chat not in toy.core.m.input_bytes


def test_what_waits_for_a_guest_is_bounded_in_bytes_also_by_a_kernel_that_comes_later() -> None:
    toy = Toy()
    chat = toy.submit_guest(turns=True, tokens=3)
    half = {"prompt": "x" * (guests.MOST_INPUT_BYTES // 2)}
    toy.do(ev.InputGiven(chat, half, "a"))
    for _ in range(2):
        with pytest.raises(Busy, match="16 MiB"):
            toy.do(ev.InputGiven(chat, half, "b"))
        toy.core.m.input_bytes.clear()
    toy.do(ev.InputGiven(chat, {"prompt": "x"}, "c"))
    assert [held["key"] for held in toy.proc(chat).inputs] == ["a", "c"]


def resting_chat(toy: Toy) -> int:
    """A chat between two turns, in an engine that has nothing else to do."""
    chat = toy.submit_guest(tokens=1000)
    toy.run(0.5)
    worker = toy.worker(chat - 1)
    toy.do(ev.GuestIdle(worker, chat))
    toy.do(ev.WorkerIdle(worker, toy.core.m.workers[worker].admits_sent))
    toy.run(0.1)
    assert (toy.state(chat), toy.proc(chat).reason) == (State.WAITING, "input")
    return chat


def test_an_engine_whose_chats_rest_makes_room_and_comes_back_for_the_next_turn() -> None:
    toy = Toy()
    chat = resting_chat(toy)
    engine = chat - 1
    large = toy.submit(steps=200, nbytes=toy.core.m.ledger.capacity("sim0"))
    toy.run(2)
    assert toy.proc(large).progress, "it got the memory"
    assert (toy.state(engine), toy.proc(engine).reason) == (State.WAITING, "unloaded")
    assert (toy.state(chat), toy.proc(chat).reason) == (State.WAITING, "input")
    toy.do(ev.InputGiven(chat, {"prompt": "and?"}))
    assert (toy.state(chat), toy.proc(chat).reason) == (State.WAITING, "engine")
    toy.run(60)
    assert toy.proc(large).exit_status == 0
    assert toy.proc(chat).exit_status == 0, "it had its turn in the engine's next worker"
    assert toy.proc(chat).engine_pid == engine


def test_an_engine_whose_chats_rest_leaves_after_keep_alive_and_they_stay() -> None:
    toy = Toy()
    chat = resting_chat(toy)
    toy.run(12)
    assert toy.proc(chat - 1).reason == "unloaded"
    assert not toy.core.m.workers
    other = toy.submit_guest(tokens=3)
    toy.run(1)
    assert toy.proc(other).exit_status == 0
    assert toy.proc(other).engine_pid == chat - 1, "the same engine, loaded again"
    toy.run(12)
    toy.do(ev.KillAsked(chat, 15))
    toy.run(1)
    assert not toy.proc(chat - 1).live, "nobody needs it any more"
