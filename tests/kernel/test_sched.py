"""The time of one device: leases, slices and classes, and where every second goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.policies.base import Job
from llmos.kernel.process import Class
from llmos.kernel.sched import SLICE_S, Charge, Decision, DeviceQueue

GRANT_A = Decision("grant", "a")


def queue(*workers: str, cls: Class = Class.BATCH) -> DeviceQueue:
    q = DeviceQueue("d", 0.0)
    for worker in workers:
        q.enqueue(worker, cls, 0)
    return q


def test_an_empty_device_is_idle() -> None:
    q = queue()
    assert q.decide(1.0) == []
    assert q.charge(1.0) == []
    assert q.wake_at() is None
    assert q.busy_s == 0.0


def test_a_slice_ends_only_when_somebody_else_waits() -> None:
    q = queue("a")
    assert q.decide(0.0) == [GRANT_A]
    assert q.wake_at() is None
    q.charge(10.0)
    assert q.decide(10.0) == []
    q.enqueue("b", Class.BATCH, 0)
    wake = q.wake_at()
    assert wake is not None
    assert wake <= 10.0 + SLICE_S[Class.BATCH]
    q.charge(wake)
    assert q.decide(wake) == [Decision("hold", "a", "turn-ended", "b")]
    assert q.decide(wake) == [], "once is enough"


def test_until_the_driver_says_so_the_device_belongs_to_the_held_one() -> None:
    q = queue("a")
    q.decide(0.0)
    q.enqueue("b", Class.INTERACTIVE, 0)
    assert q.decide(1.0) == [Decision("hold", "a", "preempted", "b")]
    assert q.charge(1.25) == [Charge("a", 1.25)]
    q.released("a")
    assert q.decide(1.25) == [Decision("grant", "b")]


def test_an_equal_or_less_urgent_class_does_not_preempt() -> None:
    q = queue("a")
    q.decide(0.0)
    for cls in (Class.BATCH, Class.IDLE):
        q.enqueue(f"x{cls}", cls, -20)
        assert q.decide(0.1) == []


def test_who_gives_up_the_device_is_taken_off_it_and_who_leaves_is_not() -> None:
    q = queue("a")
    q.decide(0.0)
    q.dequeue("a")
    assert q.decide(0.1) == [Decision("hold", "a", "given up", "")]
    for leaves in ("leaving", "yielding"):
        q = queue("a")
        q.decide(0.0)
        q.dequeue("a", leaves)
        assert q.decide(0.1) == []


def test_one_that_yields_is_held_after_its_slice_when_somebody_waits() -> None:
    q = queue("a", "b")
    q.decide(0.0)
    q.dequeue("a", "yielding")
    assert q.decide(0.1) == []
    assert q.decide(0.6) == [Decision("hold", "a", "given up", "")]


def test_a_class_change_while_it_runs_counts_at_once() -> None:
    q = queue("a", "b")
    q.decide(0.0)
    q.rerank("a", Class.IDLE, 0)
    assert q.decide(0.1) == [Decision("hold", "a", "preempted", "b")]
    q = queue("a", "b")
    q.decide(0.0)
    q.rerank("b", Class.INTERACTIVE, 0)
    assert q.decide(0.1) == [Decision("hold", "a", "preempted", "b")]


def test_the_place_in_the_line_counts_the_more_urgent_too() -> None:
    q = queue("a", "b")
    q.enqueue("c", Class.INTERACTIVE, 0)
    q.enqueue("d", Class.IDLE, 0)
    assert [q.waiting_before(w) for w in "abcd"] == [2, 2, 0, 3]
    assert q.waiting_before("nobody") == 0


def test_the_load_is_that_of_the_last_seconds() -> None:
    q = queue("a")
    assert q.load(0.0) == 0.0
    q.decide(0.0)
    q.charge(1.0)
    assert q.load(1.0) == pytest.approx(1.0)
    q.released("a")
    q.dequeue("a")
    for second in range(2, 20):
        shown = q.load(float(second))
    assert shown == 0.0


happenings = st.lists(
    st.tuples(
        st.sampled_from(["enqueue", "dequeue", "rerank", "released", "time", "time", "time"]),
        st.sampled_from("abcd"),
        st.sampled_from(list(Class)),
        st.integers(-20, 19),
        st.floats(0.001, 1.0),
    ),
    max_size=80,
)


@given(happenings)
def test_busy_and_idle_seconds_are_the_uptime_and_every_one_is_charged_once(
    script: list[tuple[str, str, Class, int, float]],
) -> None:
    q, now = DeviceQueue("d", 0.0), 0.0
    paid, idle = 0.0, 0.0
    for what, worker, cls, nice, seconds in script:
        if what == "time":
            if q.lease is None:
                idle += seconds
            now += seconds
        elif what == "enqueue" and worker not in q:
            q.enqueue(worker, cls, nice)
        elif what == "dequeue":
            q.dequeue(worker)
        elif what == "rerank":
            q.rerank(worker, cls, nice)
        elif what == "released" and q.lease is not None and q.lease.holding:
            q.released(q.lease.worker_id)
        paid += sum(charge.seconds for charge in q.charge(now))
        q.check()
        q.decide(now)
        assert q.busy_s == pytest.approx(paid)
        assert q.busy_s + idle == pytest.approx(now)
        if q.lease is None:
            assert not any(w in q for w in "abcd"), "somebody waits for an idle device"


def test_the_kernel_is_never_asked_to_look_at_a_moment_that_has_passed() -> None:
    q = DeviceQueue("d", 0.0, batch_share=0.05)
    q.enqueue("i", Class.INTERACTIVE, 0)
    q.enqueue("a", Class.BATCH, 0)
    q.enqueue("b", Class.BATCH, 0)
    now = 0.0
    for _ in range(2000):
        q.charge(now)
        for decision in q.decide(now):
            if decision.what == "hold":
                q.released(decision.worker_id)
                q.decide(now)
        wake = q.wake_at()
        assert wake is None or wake > now
        now = wake or now + 1


def test_a_reserved_turn_is_nobodys_when_batch_has_gone() -> None:
    q = DeviceQueue("d", 0.0, batch_share=0.05)
    q.enqueue("i", Class.INTERACTIVE, 0)
    q.enqueue("a", Class.BATCH, 0)
    q.decide(0.0)
    q.charge(60.0)
    assert [d.why for d in q.decide(60.0)] == ["batch-share"]
    q.dequeue("a")
    q.released("i")
    assert [d.worker_id for d in q.decide(60.0)] == ["i"]
    q.enqueue("b", Class.BATCH, 0)
    assert q.best() == "i"


def test_a_deadline_cuts_no_turn_of_another_user() -> None:
    q = DeviceQueue("d", 0.0)
    q.enqueue("a", Class.BATCH, 0, Job("a", user="alice"))
    q.decide(0.0)
    q.enqueue("b", Class.BATCH, 0, Job("b", user="bob"))
    q.hurry("b", 5.0)
    q.charge(0.1)
    assert q.decide(0.1) == []
