"""Workers that die, hang, talk nonsense or do not end: what becomes of whom, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel import events as ev
from llmos.kernel import restarts
from llmos.kernel.errors import BadArgument
from llmos.kernel.process import Process, Role, State
from support.toy import Toy


@pytest.mark.parametrize(
    ("text", "when", "limit"),
    [("no", "no", None), ("on-failure", "on-failure", restarts.LIMIT),
     ("on-failure:3", "on-failure", 3), ("always", "always", None)],
)  # fmt: skip
def test_policies_are_written_as_elsewhere(text: str, when: str, limit: int | None) -> None:
    assert restarts.parse(text) == restarts.Restart(when, limit)


@pytest.mark.parametrize("text", ["", "never", "no:3", "always:2", "on-failure:0", "on-failure:x"])
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(BadArgument, match="restart is no, on-failure"):
        restarts.parse(text)


@given(st.integers(1, 10**6), st.integers(1, 200))
def test_pauses_double_up_to_a_minute_and_are_spread(pid: int, failures: int) -> None:
    proc = Process(pid, "spin", {}, "u", 0, 0.0, failures=failures, restarts=failures)
    doubled = min(60.0, 2.0 ** (failures - 1))
    assert doubled <= restarts.pause_s(proc) <= doubled * 1.25


def fail(toy: Toy, pid: int, after_s: float = 1.0) -> None:
    """Let it come up, kill it, and wait until it comes again or has ended."""
    toy.run(after_s)
    toy.die(pid, 139)
    due = toy.proc(pid).next_start_at
    if toy.state(pid) is State.BACKOFF and due is not None:
        toy.run(due - toy.now + 0.01)


def test_what_fails_again_and_again_is_given_up() -> None:
    toy = Toy()
    pid = toy.submit(steps=10_000, restart="on-failure:2")
    for _ in range(3):
        fail(toy, pid)
    proc = toy.proc(pid)
    assert (proc.state, proc.exit_status, proc.restarts) == (State.EXITED, 139, 2)
    assert proc.reason == "its worker was killed by SIGSEGV; given up after 2 restarts in a row"


def test_who_worked_for_long_before_it_failed_begins_to_count_anew() -> None:
    toy = Toy()
    pid = toy.submit(steps=10**6, restart="on-failure:1")
    for _ in range(4):
        toy.run(restarts.STABLE_S)
        fail(toy, pid)
    assert toy.proc(pid).live
    assert toy.proc(pid).restarts == 4


def test_guests_of_an_engine_that_dies_are_served_by_its_next_worker() -> None:
    toy = Toy()
    guests = [toy.submit_guest(tokens=100), toy.submit_guest(tokens=100)]
    toy.run(0.5)
    engine = toy.proc(guests[0]).engine_pid
    first = toy.worker(engine)
    toy.die(engine, 137)
    assert [toy.state(g) for g in guests] == [State.WAITING, State.WAITING]
    assert toy.state(engine) is State.BACKOFF
    toy.run(10)
    assert [toy.proc(g).exit_status for g in guests] == [0, 0]
    started = [o.worker_id for o in toy.orders if isinstance(o, ev.StartWorker)]
    assert len(started) == 2
    assert started[0] == first
    admitted = [(o.worker_id, o.pid) for o in toy.orders if isinstance(o, ev.Admit)]
    assert admitted == [(w, g) for w in started for g in guests]


def test_an_engine_that_dies_at_each_start_ends_with_its_guests() -> None:
    toy = Toy()
    guest = toy.submit_guest(tokens=1000)
    engine = toy.proc(guest).engine_pid
    for _ in range(restarts.ENGINE_LIMIT + 1):
        fail(toy, engine, 0.02)
    for pid in (engine, guest):
        assert toy.state(pid) is State.EXITED
        assert "given up after 3 restarts in a row" in toy.proc(pid).reason
    assert toy.proc(guest).exit_status == 1


def test_an_engine_that_somebody_kills_is_not_started_again() -> None:
    toy = Toy()
    guest = toy.submit_guest(tokens=1000)
    toy.run(0.5)
    toy.do(ev.KillAsked(toy.proc(guest).engine_pid, 15))
    toy.run(1)
    assert "was killed by SIGTERM" in toy.proc(guest).reason
    assert toy.core.m.workers == {}


def test_input_that_a_dead_engine_may_not_have_read_goes_to_the_next() -> None:
    toy = Toy()
    guest = toy.submit_guest(tokens=3, turns=True)
    toy.run(1)
    toy.do(ev.InputGiven(guest, {"prompt": "read"}))
    toy.run(1)
    toy.do(ev.InputGiven(guest, {"prompt": "perhaps"}))
    toy.die(toy.proc(guest).engine_pid)
    toy.do(ev.InputGiven(guest, {"prompt": "later"}))
    toy.run(2)
    forwarded = [(o.worker_id, o.key, o.message["prompt"])
                 for o in toy.orders if isinstance(o, ev.Forward)]  # fmt: skip
    first, second = forwarded[0][0], forwarded[-1][0]
    assert [(w, p) for w, _, p in forwarded] == [
        (first, "read"), (first, "perhaps"), (second, "perhaps"), (second, "later"),
    ]  # fmt: skip
    assert forwarded[1][1] == forwarded[2][1], "by its key the next engine knows it"
    assert len({key for _, key, _ in forwarded}) == 3


class Silent(Toy):
    """Its workers load and then do nothing."""

    def _begin(self, worker: str) -> None:
        pass


def signals(toy: Toy) -> list[int]:
    return [o.signal for o in toy.orders if isinstance(o, ev.Signal)]


def test_a_worker_without_a_sign_of_life_is_ended_and_restarted() -> None:
    toy = Silent(hang_s=100.0)
    pid = toy.submit(restart="on-failure")
    toy.run(90)
    assert toy.state(pid) is State.RUNNING
    toy.do(ev.Alive(toy.worker(pid)))
    toy.run(95)
    assert toy.state(pid) is State.RUNNING, "it had moved"
    toy.run(10)
    assert signals(toy) == [6]
    assert toy.proc(pid).restarts == 1
    assert "gave no sign of life for 10" in next(r.why for r in toy.records if r.what == "backoff")


def test_one_that_is_held_is_not_to_blame() -> None:
    toy = Silent(hang_s=100.0)
    pid = toy.submit()
    toy.run(50)
    toy.do(ev.PauseAsked(pid))
    toy.run(10_000)
    toy.do(ev.ResumeAsked(pid))
    toy.run(40)
    assert toy.state(pid) is State.RUNNING
    toy.run(20)
    assert (toy.state(pid), toy.proc(pid).exit_status) == (State.EXITED, 134)


def test_who_said_that_it_never_hangs_is_left_alone() -> None:
    toy = Silent(hang_s=100.0)
    pid = toy.submit(hang_s=0.0)
    toy.run(10_000)
    assert toy.state(pid) is State.RUNNING


def test_a_bound_of_its_own_holds_where_nobody_else_is_watched() -> None:
    toy = Silent(hang_s=0.0)
    watched, other = toy.submit(hang_s=50.0), toy.submit()
    toy.run(1000)
    assert toy.proc(watched).exit_status == 134
    assert toy.proc(other).live


class Deaf(Silent):
    """Its workers take no signal but KILL."""

    def _carry_out(self, o: ev.Order) -> None:
        if not isinstance(o, ev.Signal) or o.signal == 9:
            super()._carry_out(o)


def test_who_does_not_end_when_it_is_asked_to_is_made_to() -> None:
    toy = Deaf()
    pid, engine = toy.submit(), toy.proc(toy.submit_guest()).engine_pid
    toy.run(1)
    toy.do(ev.KillAsked(pid, 15))
    toy.do(ev.KillAsked(engine, 2))
    toy.run(9.9)
    assert [toy.proc(p).live for p in (pid, engine)] == [True, True]
    toy.run(0.5)
    assert (toy.proc(pid).exit_status, toy.proc(pid).reason) == (143, "killed by SIGTERM")
    assert not toy.proc(engine).live
    assert signals(toy) == [15, 2, 9, 9]


def test_who_comes_to_no_safepoint_goes_on_from_its_checkpoint() -> None:
    class Stubborn(Toy):
        def _stop(self, worker: str) -> None:
            pass

    toy = Stubborn(hang_s=100.0, capacity=150)
    stubborn = toy.submit(steps=10**6, step_s=1.0, restart="on-failure")
    toy.run(60)
    toy.do(ev.PauseAsked(stubborn, release=True))
    toy.run(599)
    assert signals(toy) == []
    toy.run(10)
    assert signals(toy) == [6]
    assert toy.core.m.workers == {}
    assert toy.proc(stubborn).state is State.PAUSED


def test_a_worker_that_talks_nonsense_is_ended() -> None:
    toy = Toy()
    pid = toy.submit()
    toy.run(0.2)
    toy.do(ev.Misspoke(toy.worker(pid), "KeyError('k')"))
    toy.run(1)
    assert toy.proc(pid).role is Role.PROCESS
    assert "said what makes no sense: KeyError" in toy.proc(pid).reason


class Slow(Toy):
    """Its workers come to no safepoint while anybody waits."""

    def _stop(self, worker: str) -> None:
        pass


@pytest.mark.parametrize(("status", "restart"), [(137, "no"), (143, "on-failure"), (137, "always")])
def test_what_is_killed_in_a_shutdown_goes_on_at_the_next_boot(status: int, restart: str) -> None:
    toy = Slow()
    pids = [toy.submit(steps=10_000, step_s=1.0, restart=restart) for _ in range(2)]
    toy.run(1)
    toy.do(ev.ShutdownAsked())
    for pid in pids:
        toy.die(pid, status)
        assert (toy.state(pid), toy.proc(pid).restarts) == (State.WAITING, 0)


def test_one_whose_memory_found_no_way_back_does_not_stop_the_shutdown() -> None:
    class Full(Toy):
        def _carry_out(self, o: ev.Order) -> None:
            if isinstance(o, ev.MoveIn):
                self._post(0.05, o.worker_id, ev.MoveFailed(o.worker_id, "no room"))
            else:
                super()._carry_out(o)

    toy = Full(moves_to="host")
    pid = toy.submit(steps=10_000)
    toy.run(1)
    toy.do(ev.PauseAsked(pid, release=True))
    toy.run(1)
    toy.do(ev.ResumeAsked(pid))
    toy.run(0.2)
    assert toy.state(pid) is State.BACKOFF
    toy.do(ev.ShutdownAsked())
    toy.run(10)
    assert toy.core.m.workers == {}


def test_attached_guests_of_a_dead_engine_end_with_the_kernel() -> None:
    toy = Toy()
    guest = toy.submit_guest(tokens=1000)
    toy.proc(guest).attached = True
    toy.run(0.2)
    toy.die(toy.proc(guest).engine_pid, 139)
    toy.do(ev.ShutdownAsked())
    toy.run(5)
    assert (toy.state(guest), toy.proc(guest).exit_status) == (State.EXITED, 143)


def test_an_engine_whose_last_guest_has_left_is_not_started_again() -> None:
    toy = Toy()
    guest = toy.submit_guest(tokens=1000)
    toy.run(0.2)
    engine = toy.proc(guest).engine_pid
    toy.die(engine, 139)
    toy.do(ev.KillAsked(guest, 15))
    toy.run(2)
    assert (toy.state(engine), toy.proc(engine).exit_status) == (State.EXITED, 0)
    assert sum(isinstance(o, ev.StartWorker) for o in toy.orders) == 1
