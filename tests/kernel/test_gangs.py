"""Gangs: several devices at once or none, held together, and never starved."""

from __future__ import annotations

import pytest

from llmos.kernel import events as ev
from llmos.kernel.errors import NoMemory
from llmos.kernel.policies.fifo import Fifo
from llmos.kernel.process import Class, State
from support.toy import Toy


def test_a_gang_gets_all_of_its_devices_or_none() -> None:
    toy = Toy(devices=2)
    one = toy.submit(steps=100_000, nbytes=950, device_wanted="sim0")
    gang = toy.submit(steps=10, nbytes=100, gang=2)
    assert toy.state(gang) is State.WAITING
    assert toy.core.m.ledger.promised("sim1") == 0, "nothing is promised on one of two"
    toy.do(ev.KillAsked(one, 15))
    toy.run(3)
    assert toy.proc(gang).exit_status == 0
    assert toy.proc(gang).device_seconds == pytest.approx(2 * 1.02, abs=0.1)


def test_more_devices_than_there_are_is_refused() -> None:
    toy = Toy(devices=2)
    with pytest.raises(NoMemory, match="wants 3 devices; there are 2"):
        toy.submit(gang=3)


def test_it_shares_each_device_with_others_and_nobody_starves() -> None:
    toy = Toy(devices=2)
    gang = toy.submit(steps=100_000, gang=2)
    singles = [toy.submit(steps=100_000, device_wanted=f"sim{n}") for n in range(2)]
    toy.run(120)
    got = toy.proc(gang).device_seconds / 2
    assert got == pytest.approx(60, rel=0.1)
    for pid in singles:
        assert toy.proc(pid).device_seconds == pytest.approx(60, rel=0.1)
    busy = sum(q.busy_s for q in toy.core.m.devices.values())
    assert busy == pytest.approx(240, rel=0.02), "no device waits for the other"


def test_it_does_not_take_more_than_its_share_where_it_is_crowded() -> None:
    toy = Toy(devices=2, capacity=10_000)
    gang = toy.submit(steps=100_000, gang=2)
    for _ in range(3):
        toy.submit(steps=100_000, device_wanted="sim1")
    toy.run(200)
    assert toy.proc(gang).device_seconds / 2 == pytest.approx(50, rel=0.15)


def test_an_interactive_process_on_one_device_holds_all_of_it() -> None:
    toy = Toy(devices=2)
    gang = toy.submit(steps=100_000, gang=2)
    toy.run(1)
    chat = toy.submit(steps=20, cls=Class.INTERACTIVE, device_wanted="sim1")
    toy.run(0.1)
    assert toy.state(gang) is State.PREEMPTED
    assert toy.core.m.devices["sim0"].leases == {}
    toy.run(5)
    assert toy.proc(chat).exit_status == 0
    assert toy.state(gang) is State.RUNNING


def test_two_gangs_on_the_same_devices_take_turns() -> None:
    toy = Toy(devices=3)
    gangs = [toy.submit(steps=100_000, gang=2) for _ in range(3)]
    toy.run(120)
    got = [toy.proc(g).device_seconds / 2 for g in gangs]
    # Three pairs of three devices: two of them always share one.
    assert min(got) > 20
    assert sum(got) * 2 == pytest.approx(sum(q.busy_s for q in toy.core.m.devices.values()))


def test_pause_kill_and_death_leave_no_device_behind() -> None:
    toy = Toy(devices=2)
    gang = toy.submit(steps=100_000, gang=2)
    single = toy.submit(steps=100_000)
    toy.run(2)
    toy.do(ev.PauseAsked(gang))
    toy.run(1)
    assert toy.state(gang) is State.PAUSED
    used = toy.proc(gang).device_seconds
    toy.run(5)
    assert toy.proc(gang).device_seconds == used
    toy.do(ev.ResumeAsked(gang))
    toy.run(2)
    assert toy.proc(gang).device_seconds > used
    toy.die(gang, 9)
    toy.run(1)
    assert not toy.proc(gang).live
    assert all(q.reserved_for == "" for q in toy.core.m.devices.values())
    assert toy.state(single) is State.RUNNING
    assert sum(toy.core.m.ledger.free(f"sim{n}") for n in range(2)) == 1900


def test_a_gang_that_waits_long_keeps_devices_as_they_come_free() -> None:
    toy = Toy(devices=2, policy=Fifo(), passing_s=60.0)
    running = [toy.submit(steps=100_000, nbytes=900, device_wanted=f"sim{n}") for n in range(2)]
    gang = toy.submit(steps=10, nbytes=500, gang=2)
    toy.run(61)
    late = toy.submit(steps=10, nbytes=90)
    assert toy.state(late) is State.WAITING, "it would pass"
    for pid in running:
        toy.do(ev.KillAsked(pid, 15))
        toy.run(0.1)
    toy.run(5)
    assert toy.proc(gang).exit_status == 0
    assert toy.proc(late).exit_status == 0


def test_the_share_of_batch_is_a_gangs_too() -> None:
    toy = Toy(devices=2, batch_share=0.05)
    gang = toy.submit(steps=100_000, gang=2)
    toy.run(1)
    before = toy.proc(gang).device_seconds
    toy.submit(steps=100_000, cls=Class.INTERACTIVE, device_wanted="sim0")
    toy.run(120)
    got = (toy.proc(gang).device_seconds - before) / 2 / 120
    assert 0.03 < got < 0.07
