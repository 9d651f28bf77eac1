"""What one user may have: who waits with the reason `quota`, until when, and who does not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel import events as ev
from llmos.kernel import quota
from llmos.kernel.errors import NoMemory
from llmos.kernel.process import Process, State
from llmos.kernel.usage import PIECES, Usage
from support.toy import Toy

ANN, BOB = 1001, 1002


def toy_with(capacity: int = 400, **settings: Any) -> Toy:
    return Toy(capacity=capacity, margin_share=0, margin_bytes=0, **settings)


def test_a_user_waits_for_his_own_processes_and_for_nobody_elses() -> None:
    toy = toy_with(user_memory=0.5)
    first, second = (toy.submit(steps=20, uid=ANN) for _ in range(2))
    third, other = toy.submit(steps=20, uid=ANN), toy.submit(steps=20, uid=BOB)
    toy.run(0.5)
    assert (toy.state(third), toy.proc(third).reason) == (State.WAITING, "quota")
    assert toy.worker(other), "the same need of another user is not held up by it"
    assert quota.held_bytes(toy.core.m, ANN, "sim0") == 200
    toy.run(30)
    assert [toy.proc(p).exit_status for p in (first, second, third, other)] == [0] * 4


def test_who_waits_for_his_quota_keeps_no_device_from_others() -> None:
    toy = toy_with(user_memory=0.5)
    toy.submit(steps=100_000, nbytes=150, uid=ANN)
    over = toy.submit(steps=10, nbytes=100, uid=ANN)
    toy.run(toy.core.m.settings.passing_s + 10)
    other = toy.submit(steps=1000, nbytes=200, uid=BOB)
    toy.run(1)
    assert toy.proc(over).reason == "quota"
    assert toy.worker(other)


def test_what_no_quota_ever_lets_in_is_refused_with_the_limit() -> None:
    toy = toy_with(user_memory=0.5)
    with pytest.raises(NoMemory, match=r"one user may have 0\.0 GiB of sim0"):
        toy.submit(nbytes=201, uid=ANN)
    assert toy.core.m.by_user == {}


def test_without_quotas_nothing_is_kept_back() -> None:
    toy = toy_with()
    toy.submit(nbytes=400, steps=1000, uid=ANN)
    toy.run(1)
    assert toy.core.m.usage.users() == []


def test_a_users_device_seconds_end_and_come_back_with_the_window() -> None:
    toy = toy_with(user_device_s=5, user_window_s=240)
    long, other = toy.submit(steps=200, uid=ANN), toy.submit(steps=100, uid=BOB)
    toy.run(9)
    assert toy.proc(long).reason == "device" or toy.state(long) is State.RUNNING
    toy.run(6)
    proc = toy.proc(long)
    assert (proc.state, proc.reason) == (State.READY, "quota")
    assert proc.device_seconds == pytest.approx(5, abs=0.6)
    used = proc.device_seconds
    queued = toy.submit(steps=10, uid=ANN)
    toy.run(60)
    assert proc.device_seconds == used
    assert (toy.state(queued), toy.proc(queued).reason) == (State.WAITING, "quota")
    assert 0 < quota.opens_in(toy.core.m, ANN) < 240
    assert "5 of 5 device-seconds" in quota.why(toy.core.m, ANN)
    toy.run(quota.opens_in(toy.core.m, ANN) + 6)
    assert proc.device_seconds > used
    toy.run(5000)
    assert [toy.proc(p).exit_status for p in (long, queued, other)] == [0, 0, 0]


def test_a_guest_over_its_quota_is_left_out_and_the_others_are_served() -> None:
    toy = toy_with(capacity=1000, user_device_s=0.5, user_window_s=240)
    over, other = toy.submit_guest(tokens=500, uid=ANN), toy.submit_guest(tokens=30, uid=BOB)
    toy.run(3)
    assert toy.proc(other).exit_status == 0
    assert (toy.state(over), toy.proc(over).reason) == (State.READY, "quota")
    assert over in toy._parked
    toy.run(240 * 20)
    assert toy.proc(over).exit_status == 0


def test_killing_one_that_waits_for_its_quota_ends_it() -> None:
    toy = toy_with(user_device_s=1, user_window_s=240)
    pid = toy.submit(steps=1000, uid=ANN)
    toy.run(3)
    assert toy.proc(pid).reason == "quota"
    toy.do(ev.KillAsked(pid, 15))
    toy.run(1)
    assert toy.proc(pid).exit_status == 143


def test_the_processes_of_a_user_are_those_that_live() -> None:
    toy = toy_with(capacity=1000)
    first, guest = toy.submit(steps=2, uid=ANN), toy.submit_guest(tokens=3, uid=ANN)
    assert set(toy.core.m.by_user[ANN]) == {first, guest}
    toy.run(10)
    assert ANN not in toy.core.m.by_user
    ended = Process(99, "spin", {}, "u", ANN, 0.0, state=State.EXITED, exit_status=0)
    toy.core.restore(ended)
    assert ANN not in toy.core.m.by_user


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.001, 10)), max_size=60),
    st.floats(0.5, 200),
)
def test_the_window_forgets_what_is_old_and_nothing_that_is_new(
    charges: list[tuple[float, float]], allowed: float
) -> None:
    window = 100.0
    usage, now, all_of_them = Usage(window), 1e9, []
    for after, seconds in charges:
        now += after
        usage.add(1, seconds, now)
        all_of_them.append((now, seconds))
    used = usage.used(1, now)
    recent = sum(s for at, s in all_of_them if at > now - window * (1 - 1 / PIECES))
    older = sum(s for at, s in all_of_them if at > now - window)
    assert recent - 1e-6 <= used <= older + 1e-6
    opens_at = usage.below_at(1, allowed, now)
    assert now <= opens_at <= now + window
    copy = Usage(window)
    copy.restore(usage.to_wire())
    assert copy.used(1, now) == pytest.approx(used)
    assert usage.used(1, opens_at) < allowed + 1e-6
