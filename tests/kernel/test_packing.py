"""Packing: two together only where that was measured to help, and what is measured."""

from __future__ import annotations

import pytest

from llmos.kernel import events as ev
from llmos.kernel.packing import TRIAL_S, VERDICT_S, Packing
from llmos.kernel.process import Class
from support.toy import Toy


def known(packing: Packing) -> None:
    for key in ("a", "b"):
        packing.worked_alone(key, 100, 10.0)


@pytest.mark.parametrize(("beside", "helps"), [(7.0, True), (5.0, False), (5.25, False)])
def test_the_verdict_is_the_sum_of_the_normalised_rates(beside: float, helps: bool) -> None:
    packing = Packing()
    assert not packing.allows("a", "b", 0.0), "there is nothing to compare with"
    known(packing)
    assert packing.allows("a", "b", 0.0), "to find out"
    packing.begin("b", "a", 0.0)
    for one, other in (("a", "b"), ("b", "a")):
        assert packing.judge("a", "b", 0.0) is None
        packing.worked_beside(one, other, int(beside * TRIAL_S * 4), TRIAL_S * 4)
    assert packing.judge("b", "a", 1.0) == pytest.approx(2 * beside / 10.0, abs=0.05)
    assert packing.allows("a", "b", 2.0) is helps
    assert packing.allows("a", "b", 2.0 + VERDICT_S), "it is asked for again after a while"


def test_a_process_can_be_beside_its_like() -> None:
    packing = Packing()
    packing.worked_alone("a", 100, 10.0)
    packing.begin("a", "a", 0.0)
    packing.worked_beside("a", "a", 60, 10.0)
    assert packing.judge("a", "a", 0.0) == pytest.approx(1.2)


def test_verdicts_outlive_a_kernel() -> None:
    packing, later = Packing(), Packing()
    known(packing)
    known(later)
    packing.sums[("a", "b")] = (0.8, 100.0)
    later.restore(packing.to_wire())
    assert not later.allows("b", "a", 101.0)


def two(lanes: int, of_each: int) -> tuple[Toy, int, int]:
    toy = Toy(lanes=lanes)
    pids = [
        toy.submit(steps=100_000, step_s=0.1, profile_key=f"k{n}", lanes=of_each) for n in range(2)
    ]
    toy.run(20)
    return toy, *pids


def test_two_of_one_lane_are_tried_together_and_apart_when_it_does_not_help() -> None:
    toy, a, b = two(lanes=2, of_each=1)
    q = toy.core.m.devices["sim0"]
    sums = dict(toy.core.m.packing.sums)
    assert ("k0", "k1") in sums
    # In the toy nobody slows the other down: together they do twice the work.
    assert sums["k0", "k1"][0] == pytest.approx(2.0, abs=0.1)
    assert len(q.leases) == 2
    toy.core.m.packing.sums[("k0", "k1")] = (0.9, toy.now)
    toy.core.m.touch(toy.core.m.workers[toy.worker(a)])
    toy.do(ev.Clock())
    toy.run(5)
    assert len(q.leases) == 1
    shares = [toy.proc(p).device_seconds for p in (a, b)]
    assert sum(shares) == pytest.approx(q.busy_s)


def test_those_that_use_every_lane_take_turns() -> None:
    toy, _, _ = two(lanes=2, of_each=0)
    assert toy.core.m.packing.sums == {}
    toy, _, _ = two(lanes=2, of_each=2)
    assert toy.core.m.packing.sums == {}


def test_an_interactive_process_has_the_device_alone() -> None:
    toy, a, b = two(lanes=2, of_each=1)
    chat = toy.submit(steps=50, step_s=0.1, cls=Class.INTERACTIVE, profile_key="c", lanes=1)
    toy.run(0.1)
    q = toy.core.m.devices["sim0"]
    assert list(q.leases) == [toy.worker(chat)]
    assert {toy.state(p) for p in (a, b)} == {"preempted"}
    toy.run(10)
    assert len(q.leases) == 2
