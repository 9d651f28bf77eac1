"""The gate: a hold takes effect where the worker looks, is told once, and ends with the lease."""

from __future__ import annotations

import threading
import timeit
from collections.abc import Iterator
from typing import Any

import pytest

from llmos.drivers.worker.gate import Gate
from support.real import wait_until
from support.streams import FakeStreams

LIMIT_S = 10.0


class Computing:
    """A thread that computes on a simulated device until it is told to end."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.queued_when_told: list[float] = []
        self.streams = FakeStreams()
        self.gate = Gate(self.post, self.streams)
        self.layers = 0
        self.over = False
        self.thread = threading.Thread(target=self.run)

    def post(self, message: dict[str, Any]) -> None:
        self.said.append(message)
        self.queued_when_told.append(self.streams.queued_s)

    def run(self) -> None:
        while not self.over:
            self.gate.boundary("layer")
            self.streams.launch(0.004, 0.0003)
            self.layers += 1

    def hold(self, number: int) -> None:
        assert self.gate.hears({"k": "hold", "n": number})

    def lease(self) -> None:
        assert not self.gate.hears({"k": "lease", "floor": 2})  # the worker wants it, too

    def until_held(self, number: int) -> None:
        wait_until(lambda: any(m["n"] == number for m in self.said), f"hold {number}", LIMIT_S)


@pytest.fixture
def work() -> Iterator[Computing]:
    computing = Computing()
    computing.thread.start()
    wait_until(lambda: computing.layers > 10, "some layers", LIMIT_S)
    yield computing
    computing.over = True
    computing.lease()
    computing.thread.join(LIMIT_S)
    assert not computing.thread.is_alive()


def test_held_is_said_when_the_queue_is_empty_and_nothing_is_queued_after_it(
    work: Computing,
) -> None:
    work.hold(1)
    work.until_held(1)
    layers = work.layers
    assert work.queued_when_told == [0.0]
    assert work.streams.queued_s == 0
    work.lease()
    wait_until(lambda: work.layers > layers, "it goes on", LIMIT_S)
    assert len(work.said) == 1
    assert work.said[0]["took_s"] >= 0
    assert 0.003 < work.said[0]["longest_s"] < 0.1
    assert len(work.gate.took_s()) == 1


def test_each_of_many_holds_is_said_once(work: Computing) -> None:
    for number in range(1, 50):
        work.hold(number)
        work.until_held(number)
        work.lease()
    assert [m["n"] for m in work.said] == list(range(1, 50))


def test_a_second_hold_of_the_held_is_answered_at_once(work: Computing) -> None:
    """A kernel that comes later does not know that an earlier one held it."""
    work.hold(1)
    work.until_held(1)
    work.hold(2)
    assert [m["n"] for m in work.said] == [1, 2]
    assert len(work.gate.took_s()) == 1  # the second cost nothing


def test_a_lease_that_comes_before_the_worker_looked_takes_the_hold_back() -> None:
    said: list[dict[str, Any]] = []
    gate = Gate(said.append, FakeStreams())
    gate.hears({"k": "hold", "n": 1})
    gate.hears({"k": "lease"})
    gate.boundary("layer")
    assert said == []


def test_whoever_is_away_is_held_at_once_and_returns_with_the_lease() -> None:
    said: list[dict[str, Any]] = []
    gate = Gate(said.append, FakeStreams())
    back = threading.Event()
    away = threading.Event()
    go = threading.Event()

    def wait() -> None:
        with gate.away():
            away.set()
            assert go.wait(LIMIT_S)
        back.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert away.wait(LIMIT_S)
    gate.hears({"k": "hold", "n": 7})
    assert [m["n"] for m in said] == [7]
    go.set()
    wait_until(lambda: gate._changed._waiters, "it waits for its lease", LIMIT_S)  # type: ignore[attr-defined]
    assert not back.is_set()
    gate.hears({"k": "lease"})
    thread.join(LIMIT_S)
    assert back.is_set()


def test_whoever_goes_away_while_asked_is_held_there() -> None:
    said: list[dict[str, Any]] = []
    streams = FakeStreams()
    gate = Gate(said.append, streams)
    streams.launch(0.5)
    gate.hears({"k": "hold", "n": 3})
    with gate.away():
        assert streams.queued_s == 0
        assert [m["n"] for m in said] == [3]
        gate.hears({"k": "lease"})


def test_backward_has_a_thread_of_its_own_and_is_held_in_it() -> None:
    said: list[dict[str, Any]] = []
    gate = Gate(said.append, FakeStreams())

    def step() -> None:
        backward = threading.Thread(target=gate.boundary, args=["layer backward"], daemon=True)
        backward.start()
        backward.join()  # as autograd does: one of the two works at a time

    gate.hears({"k": "hold", "n": 1})
    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    wait_until(lambda: [m["n"] for m in said] == [1], "it is held", LIMIT_S)
    assert thread.is_alive()
    gate.hears({"k": "lease"})
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_without_a_device_of_its_own_nothing_is_waited_for() -> None:
    gate = Gate(pytest.fail)
    assert not gate.active
    with gate.away():
        gate.boundary("layer")
    gate.check()


def test_looking_costs_next_to_nothing() -> None:
    """100 ns on a quiet machine; here against a call that does nothing, which is as noisy."""
    gate = Gate(pytest.fail)

    class Other:
        def __init__(self) -> None:
            self.asked = 0

        def check(self) -> None:
            if self.asked:
                raise AssertionError

    other = Other()
    ours = min(timeit.repeat(gate.check, number=20_000, repeat=15))
    plain = min(timeit.repeat(other.check, number=20_000, repeat=15))
    assert ours < 2 * plain
