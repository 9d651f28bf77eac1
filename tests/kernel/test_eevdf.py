"""EEVDF: shares, bounds and the books of lag."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.policies.runqueue import RunQueue
from llmos.kernel.process import NICE_WEIGHTS, weight_of


def test_the_weights_are_those_of_linux() -> None:
    assert len(NICE_WEIGHTS) == 40
    assert (weight_of(-20), weight_of(0), weight_of(19)) == (88761, 1024, 15)


def test_equal_weights_take_turns() -> None:
    q = RunQueue()
    for key in "ab":
        q.add(key, 1024, 0.5)
    order = []
    for _ in range(6):
        picked = q.pick()
        assert picked is not None
        order.append(picked)
        q.charge(picked, 0.5)
    assert sorted(order[:2]) == sorted(order[2:4]) == sorted(order[4:]) == ["a", "b"]


def test_nobody_is_picked_from_an_empty_queue() -> None:
    assert RunQueue().pick() is None


def test_who_slept_comes_back_without_a_stored_up_burst() -> None:
    q = RunQueue()
    q.add("a", 1024, 0.5)
    q.add("b", 1024, 0.5)
    lag = q.remove("b")
    for _ in range(100):
        q.charge("a", 0.5)
    q.add("b", 1024, 0.5, lag)
    assert abs(q.lag_s("b")) <= 0.5 + 1e-9


steps = st.lists(
    st.tuples(
        st.sampled_from(["run", "run", "run", "run", "add", "remove", "renice"]),
        st.integers(0, 7),
        st.integers(-20, 19),
        st.floats(0.001, 0.5),
    ),
    min_size=1,
    max_size=200,
)


@given(steps)
def test_lags_sum_to_zero_and_stay_bounded(script: list[tuple[str, int, int, float]]) -> None:
    """Whatever comes and goes: nobody is owed more than a request, and nothing is made up."""
    q, longest = RunQueue(), 0.5
    keys: set[str] = set()
    for what, number, nice, seconds in script:
        key = f"p{number}"
        if what == "add" and key not in keys:
            q.add(key, weight_of(nice), 0.5)
            keys.add(key)
        elif what == "remove" and key in keys:
            q.remove(key)
            keys.discard(key)
        elif what == "renice" and key in keys:
            q.set_weight(key, weight_of(nice))
        elif what == "run" and keys:
            picked = q.pick()
            assert picked in keys
            q.charge(picked, seconds)
        assert sum(q.lag_s(k) for k in keys) == pytest.approx(0, abs=1e-6)
    assert len(q) == len(keys)
    # Runs of any length: see the last test here.
    if all(what in ("run", "add") for what, *_ in script):
        assert all(abs(q.lag_s(k)) <= 2 * (longest + longest) for k in keys)


nices = st.lists(st.integers(-10, 10), min_size=2, max_size=8)


def serve(nices: list[int], run_s: float, rounds: int = 400) -> list[float]:
    """How far each is from its fair share, in seconds, after so many runs."""
    q = RunQueue()
    for n, nice in enumerate(nices):
        q.add(str(n), weight_of(nice), 0.5)
    got = dict.fromkeys(map(str, range(len(nices))), 0.0)
    for _ in range(rounds):
        key = q.pick()
        assert key is not None
        q.charge(key, run_s)
        got[key] += run_s
    weights = sum(map(weight_of, nices))
    fair = [rounds * run_s * weight_of(nice) / weights for nice in nices]
    return [got[str(n)] - share for n, share in enumerate(fair)]


@given(nices, st.integers(1, 20))
def test_shares_follow_the_weights_within_a_request(nices: list[int], runs: int) -> None:
    """The theorem: with requests of r seconds nobody is ever further than r from its share."""
    assert all(abs(off) <= 0.5 + 1e-6 for off in serve(nices, 0.5 / runs))


@given(nices, st.floats(0.01, 0.5))
def test_runs_of_any_length_keep_the_shares(nices: list[int], run_s: float) -> None:
    """A run that goes beyond its request costs a little more, and does not add up."""
    assert all(abs(off) <= 2 * (0.5 + run_s) for off in serve(nices, run_s))
