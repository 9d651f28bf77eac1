"""Little work in flight: on a simulated device, with layers of any length."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.worker.pace import IN_FLIGHT_S, MOST_BOUNDARIES, SEGMENT_S, Pacer
from support.streams import FakeStreams

LAUNCH_S = 0.0003  # a layer's kernels, from python


def steps(streams: FakeStreams, pacer: Pacer, layers: list[float], count: int) -> float:
    """`count` passes over layers of these lengths -> the most that was queued at a boundary."""
    most = 0.0
    for _ in range(count):
        for number, device_s in enumerate(layers):
            pacer.boundary(f"layer {number}")
            most = max(most, streams.queued_s)
            streams.launch(device_s, LAUNCH_S)
    return most


@pytest.mark.parametrize("layer_s", [0.0005, 0.0025, 0.005, 0.009])
def test_what_is_queued_stays_within_the_budget(layer_s: float) -> None:
    streams = FakeStreams()
    pacer = Pacer(streams)
    layers = [layer_s] * 24
    steps(streams, pacer, layers, 20)  # it has learned
    most = steps(streams, pacer, layers, 20)
    # What the last segments were longer than expected by, and the one that is open.
    assert most <= IN_FLIGHT_S + 2 * max(layer_s, 2 * SEGMENT_S)


@pytest.mark.parametrize("layer_s", [0.0005, 0.0025, 0.005, 0.009])
def test_the_device_does_not_run_dry(layer_s: float) -> None:
    streams = FakeStreams()
    pacer = Pacer(streams)
    steps(streams, pacer, [layer_s] * 24, 20)
    streams.idle_s = 0.0
    began_s = streams.now_s
    steps(streams, pacer, [layer_s] * 24, 20)
    assert streams.idle_s <= 0.001 * (streams.now_s - began_s)


def test_nothing_is_queued_behind_a_layer_that_is_longer_than_the_budget() -> None:
    streams = FakeStreams()
    pacer = Pacer(streams)
    layers = [0.002, 0.002, 0.040, 0.002]
    steps(streams, pacer, layers, 20)
    assert steps(streams, pacer, layers, 20) <= IN_FLIGHT_S
    assert pacer.longest_s == pytest.approx(0.040, rel=0.2)


def test_the_first_steps_of_a_model_nobody_knows_are_short_too() -> None:
    streams = FakeStreams()
    assert steps(streams, Pacer(streams), [0.004] * 24, 1) <= 3 * 0.004 + 1e-9


def test_short_layers_share_a_mark_so_that_marks_cost_little() -> None:
    streams = FakeStreams()
    pacer = Pacer(streams)
    layers = [0.0001] * 64
    steps(streams, pacer, layers, 50)
    before, began_s = streams._made, streams.now_s
    steps(streams, pacer, layers, 50)
    per_second = (streams._made - before) / (streams.now_s - began_s)
    assert per_second <= 2 / SEGMENT_S
    assert max(pacer._covers.values()) <= MOST_BOUNDARIES


def test_a_model_that_becomes_slower_is_noticed_at_once_and_a_faster_one_soon() -> None:
    streams = FakeStreams()
    pacer = Pacer(streams)
    for layer_s, count in ((0.001, 20), (0.010, 3), (0.001, 40)):
        steps(streams, pacer, [layer_s] * 12, count)
        assert pacer.longest_s < 6 * layer_s
        assert pacer.longest_s >= layer_s


def test_after_a_pause_nothing_is_left_and_the_pause_is_no_work() -> None:
    streams = FakeStreams()
    pacer = Pacer(streams)
    steps(streams, pacer, [0.004] * 6, 5)
    pacer.empty()
    assert streams.queued_s == 0
    assert not streams.alive
    streams.now_s += 100.0
    steps(streams, pacer, [0.004] * 6, 5)
    assert pacer.longest_s < 0.05


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.00001, 0.05), min_size=1, max_size=12), st.integers(1, 12))
def test_marks_are_neither_lost_nor_used_after_they_were_given_back(
    layers: list[float], count: int
) -> None:
    streams = FakeStreams()
    pacer = Pacer(streams)
    steps(streams, pacer, layers, count)
    # Each open segment has one mark that is its own, the last end is the next begin.
    assert len(streams.alive) == len(pacer._queue) + 1
    pacer.empty()
    assert not streams.alive
