"""Making room: who is moved out for whom, what it costs, and that it comes back."""

from __future__ import annotations

import pytest

from llmos.kernel import events as ev
from llmos.kernel.errors import IllegalMove
from llmos.kernel.policies.eevdf import Eevdf
from llmos.kernel.policies.fifo import Fifo
from llmos.kernel.policies.rr import RoundRobin
from llmos.kernel.process import Class, Residency, State
from support.toy import Toy


def stories(toy: Toy, pid: int) -> list[str]:
    return [what for _, what, _ in toy.proc(pid).story]


def test_a_training_goes_to_disk_for_an_interactive_process_and_comes_back() -> None:
    toy = Toy(capacity=100)
    training = toy.submit(steps=50)
    toy.run(2)
    chat = toy.submit(steps=5, cls=Class.INTERACTIVE)
    assert toy.state(training) is State.STOPPING
    toy.run(0.1)
    assert toy.state(chat) in (State.STARTING, State.RUNNING)
    assert (toy.state(training), toy.proc(training).residency) == (State.WAITING, Residency.DISK)
    toy.run(20)
    assert toy.proc(chat).exit_status == 0
    assert toy.proc(training).exit_status == 0
    assert toy.proc(training).moves == 1
    assert "moved-out" in stories(toy, training)


def test_on_a_device_with_a_host_the_worker_lives_on_without_its_memory() -> None:
    toy = Toy(capacity=100, moves_to="host")
    training = toy.submit(steps=50, nbytes=90)
    toy.run(2)
    worker = toy.worker(training)
    chat = toy.submit(steps=5, nbytes=90, cls=Class.INTERACTIVE)
    toy.run(0.2)
    assert toy.proc(training).residency is Residency.HOST
    assert toy.worker(training) == worker
    assert toy.state(chat) is State.RUNNING
    assert toy.core.m.ledger.promised("sim0") == 90 + 10, "its context stays"
    toy.run(20)
    assert toy.proc(training).exit_status == 0
    assert toy.worker(training) == ""
    assert toy.core.m.ledger.promised("sim0") == 0


def test_the_way_out_is_paid_by_who_asked_for_it() -> None:
    toy = Toy(capacity=100)
    training = toy.submit(steps=1000, step_s=5.0)
    toy.run(2)
    chat = toy.submit(steps=1, cls=Class.INTERACTIVE)
    before = toy.proc(training).device_seconds
    assert before == pytest.approx(2.0, abs=0.02)
    toy.run(0.1)
    assert toy.proc(training).device_seconds == before
    assert toy.proc(chat).device_seconds > 0


def test_what_is_cheapest_to_bring_back_goes_and_no_more_than_needed() -> None:
    toy = Toy(capacity=300)
    big, small = toy.submit(nbytes=200, steps=1000), toy.submit(nbytes=100, steps=1000)
    toy.run(2)
    toy.submit(nbytes=100, steps=5, cls=Class.INTERACTIVE)
    toy.run(0.1)
    assert toy.proc(small).moves == 1
    assert toy.proc(big).moves == 0


def test_a_paused_one_goes_before_one_that_runs_and_stays_paused() -> None:
    toy = Toy(capacity=200)
    paused, running = toy.submit(steps=1000), toy.submit(steps=1000)
    toy.run(2)
    toy.do(ev.PauseAsked(paused))
    toy.run(0.1)
    toy.submit(steps=5, cls=Class.INTERACTIVE)
    toy.run(0.5)
    assert (toy.state(paused), toy.proc(paused).residency) == (State.PAUSED, Residency.DISK)
    assert toy.proc(running).moves == 0
    toy.do(ev.ResumeAsked(paused))
    toy.run(300)
    assert toy.proc(paused).exit_status == 0


def test_an_idle_class_goes_for_batch_and_batch_never_for_idle() -> None:
    toy = Toy(capacity=100)
    idle = toy.submit(steps=1000, cls=Class.IDLE)
    toy.run(31)
    batch = toy.submit(steps=1000)
    toy.run(0.5)
    assert toy.proc(idle).moves == 1
    assert toy.state(batch) is State.RUNNING
    toy.run(1000)
    assert toy.proc(batch).moves == 0


def test_what_writes_no_checkpoints_is_never_moved_to_disk() -> None:
    toy = Toy(capacity=100)
    script = toy.submit(steps=1000)
    toy.proc(script).has_checkpoint = False
    toy.run(2)
    chat = toy.submit(steps=5, cls=Class.INTERACTIVE)
    toy.run(50)
    assert toy.state(chat) is State.WAITING
    assert toy.state(script) is State.RUNNING


@pytest.mark.parametrize("policy", [RoundRobin, Eevdf])
def test_equals_that_do_not_fit_together_take_turns_in_memory(policy: type[Eevdf]) -> None:
    toy = Toy(capacity=100, policy=policy())
    pids = [toy.submit(steps=100_000) for _ in range(3)]
    toy.run(1200)
    got = [toy.proc(p).device_seconds for p in pids]
    assert sum(got) == pytest.approx(1200, rel=0.02)
    assert max(got) < 1.5 * min(got)
    assert sum(toy.proc(p).moves for p in pids) <= 1200 / 30


def test_who_goes_for_an_urgent_one_makes_room_for_who_comes_after_it() -> None:
    toy = Toy(capacity=1100, policy=RoundRobin())
    toy.proc(toy.submit(steps=100_000, nbytes=100)).has_checkpoint = False
    old = toy.submit(steps=100_000, nbytes=500)
    toy.run(25)
    young = toy.submit(steps=100_000, nbytes=300)
    toy.run(10)
    toy.submit(nbytes=1050)
    after = toy.submit(nbytes=900, steps=10)
    assert toy.state(old) in (State.RUNNING, State.READY), "the young one may stay: no use"
    toy.submit(nbytes=450, cls=Class.INTERACTIVE, steps=5)
    assert toy.state(young) is State.STOPPING, "the cheapest to bring back"
    assert toy.state(old) is State.STOPPING, f"with the young one gone it is enough for {after}"


def test_first_come_first_served_moves_nobody() -> None:
    toy = Toy(capacity=100, policy=Fifo())
    first, second = toy.submit(steps=2000), toy.submit(steps=10)
    toy.run(150)
    assert toy.state(second) is State.WAITING
    assert toy.proc(first).moves == 0


def test_moving_never_takes_more_than_a_tenth_of_the_time() -> None:
    toy = Toy(capacity=100, policy=RoundRobin(), min_residency_s=0.0)
    pids = [toy.submit(steps=100_000) for _ in range(2)]
    toy.run(5)
    for pid in pids:
        toy.proc(pid).move_s = 20.0
    before = sum(toy.proc(p).moves for p in pids)
    toy.run(1000)
    assert sum(toy.proc(p).moves for p in pids) - before <= 1000 / 200 + 1


def test_release_gives_the_memory_back_and_resume_brings_it() -> None:
    toy = Toy()
    pid = toy.submit(steps=100)
    toy.run(2)
    toy.do(ev.PauseAsked(pid, release=True))
    toy.run(0.1)
    assert (toy.state(pid), toy.proc(pid).residency) == (State.PAUSED, Residency.DISK)
    assert toy.core.m.ledger.free("sim0") == 1000
    toy.do(ev.ResumeAsked(pid))
    toy.run(60)
    assert toy.proc(pid).exit_status == 0


def test_release_of_one_that_is_paused_already() -> None:
    toy = Toy(moves_to="host")
    pid = toy.submit(steps=100)
    toy.run(2)
    toy.do(ev.PauseAsked(pid))
    toy.run(0.1)
    toy.do(ev.PauseAsked(pid, release=True))
    toy.run(0.5)
    assert (toy.state(pid), toy.proc(pid).residency) == (State.PAUSED, Residency.HOST)
    toy.do(ev.ResumeAsked(pid))
    toy.run(60)
    assert toy.proc(pid).exit_status == 0


def test_release_is_refused_where_it_would_lose_work() -> None:
    toy = Toy()
    pid = toy.submit(steps=100)
    toy.proc(pid).has_checkpoint = False
    toy.run(2)
    with pytest.raises(IllegalMove, match="writes no checkpoints"):
        toy.do(ev.PauseAsked(pid, release=True))
    assert toy.state(pid) is State.RUNNING
    guest = toy.submit_guest(tokens=1000)
    toy.run(1)
    with pytest.raises(IllegalMove, match="engine"):
        toy.do(ev.PauseAsked(guest, release=True))


@pytest.mark.parametrize("moves_to", ["disk", "host"])
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.03, 0.2])
def test_kill_in_the_middle_of_a_move_leaves_nothing(moves_to: str, after_s: float) -> None:
    toy = Toy(capacity=100, moves_to=moves_to)
    training = toy.submit(steps=1000, nbytes=90)
    toy.run(2)
    chat = toy.submit(steps=3, nbytes=90, cls=Class.INTERACTIVE)
    toy.run(after_s)
    toy.do(ev.KillAsked(training, 15))
    toy.run(10)
    assert not toy.proc(training).live
    assert toy.proc(chat).exit_status == 0
    assert toy.core.m.ledger.free("sim0") == 100


@pytest.mark.parametrize("moves_to", ["disk", "host"])
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.2])
def test_a_worker_that_dies_on_its_way_out_is_restarted(moves_to: str, after_s: float) -> None:
    toy = Toy(capacity=100, moves_to=moves_to)
    training = toy.submit(steps=50, nbytes=90, restart="on-failure")
    toy.run(2)
    toy.submit(steps=3, nbytes=90, cls=Class.INTERACTIVE)
    toy.run(after_s)
    if toy.worker(training):
        toy.die(training, 137)
    toy.run(60)
    assert toy.proc(training).exit_status == 0
    assert toy.core.m.ledger.free("sim0") == 100


def coming_back(capacity: int = 100) -> tuple[Toy, int]:
    """A process whose memory is on its way from the host to the device."""
    toy = Toy(capacity=capacity, moves_to="host")
    pid = toy.submit(steps=1000, nbytes=80)
    toy.run(2)
    toy.do(ev.PauseAsked(pid, release=True))
    toy.run(0.5)
    toy.do(ev.ResumeAsked(pid))
    assert toy.state(pid) is State.STARTING
    return toy, pid


def test_pause_and_resume_while_it_comes_back_promise_it_once() -> None:
    toy, pid = coming_back()
    toy.do(ev.PauseAsked(pid))
    toy.do(ev.ResumeAsked(pid))
    toy.run(1)
    assert toy.state(pid) is State.RUNNING
    assert toy.core.m.ledger.promised("sim0") == 80
    toy, pid = coming_back()
    with pytest.raises(IllegalMove, match="on its way back"):
        toy.do(ev.PauseAsked(pid, release=True))


def test_a_move_that_finds_no_room_is_tried_again_later_and_the_books_stay_right() -> None:
    toy, pid = coming_back()
    worker = toy.worker(pid)
    toy.do(ev.MoveFailed(worker, "cuda0 has no room"))
    assert toy.state(pid) is State.BACKOFF
    assert toy.core.m.ledger.promised("sim0") == 10
    toy.run(6)
    assert toy.state(pid) is State.RUNNING
    assert toy.core.m.ledger.promised("sim0") == 80


def test_a_move_out_that_finds_no_room_is_said_and_the_process_goes_on() -> None:
    toy = Toy(capacity=100, moves_to="host")
    training = toy.submit(steps=50, nbytes=90)
    toy.run(2)
    toy.submit(steps=3, nbytes=90, cls=Class.INTERACTIVE)
    toy.do(ev.MoveFailed(toy.worker(training), "the host has no room"))
    assert toy.proc(training).move_error == "the host has no room"
    assert toy.state(training) in (State.READY, State.RUNNING)


def test_a_shutdown_ends_what_is_on_the_host_with_its_checkpoint() -> None:
    toy = Toy(capacity=100, moves_to="host")
    training = toy.submit(steps=1000, nbytes=90)
    toy.run(2)
    toy.submit(steps=10_000, nbytes=90, cls=Class.INTERACTIVE)
    toy.run(1)
    assert toy.proc(training).residency is Residency.HOST
    toy.do(ev.ShutdownAsked())
    toy.run(5)
    assert toy.core.m.workers == {}
    assert toy.proc(training).checkpoint is not None


def test_an_adopted_worker_that_is_away_is_brought_back_before_it_runs() -> None:
    toy, pid = coming_back()
    worker, segments = toy.worker(pid), toy.proc(pid).segments
    later = Toy(capacity=100, moves_to="host")
    proc = toy.proc(pid)
    proc.state, proc.segments = State.RUNNING, segments
    later.core.restore(proc)
    later.core.adopt(pid, worker, ("sim0",), set())
    orders = later.do(ev.WorkerUp(worker, 7, loaded=True, away=True, left_bytes=10))
    assert [type(o).__name__ for o in orders if "Move" in type(o).__name__] == ["MoveIn"]
    assert not any(isinstance(o, ev.Grant) for o in orders)
    later.run(0.2)
    assert later.state(pid) is State.RUNNING
    assert later.core.m.ledger.promised("sim0") == 80
