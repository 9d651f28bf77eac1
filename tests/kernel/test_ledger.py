"""The books of memory: foreign + promised + free = capacity, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.errors import NoMemory
from llmos.kernel.ledger import MARGIN_BYTES, SYSTEM_PID, Ledger

CAPACITY = 10_000_000_000


def books() -> Ledger:
    ledger = Ledger()
    ledger.add_device("a", "sim", CAPACITY)
    ledger.add_device("b", "sim", CAPACITY)
    return ledger


def private(nbytes: int, kind: str = "activations") -> dict[str, Any]:
    return {"kind": kind, "bytes": nbytes, "shared": ""}


def mapped(key: str, nbytes: int) -> dict[str, Any]:
    return {"kind": "weights", "bytes": nbytes, "shared": key}


def test_a_promise_is_taken_and_given_back() -> None:
    ledger = books()
    ledger.reserve(("a",), 1, [private(100), private(50, "kv"), private(5, "kv")])
    assert ledger.free("a") == CAPACITY - 155
    assert ledger.memory_of(1) == (155, 0, 0, {"activations": 100, "kv": 55})
    ledger.release(1)
    ledger.release(1)
    assert ledger.free("a") == CAPACITY
    assert ledger.memory_of(1) == (0, 0, 0, {})


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    ledger = books()
    ledger.reserve(("a",), 1, [private(CAPACITY - 10)])
    with pytest.raises(NoMemory, match="wanted 11 bytes, 10 are free"):
        ledger.reserve(("a",), 2, [private(11)])
    assert ledger.free("a") == 10
    ledger.reserve(("a",), 2, [private(10)])
    ledger.check()


def test_a_shared_file_is_counted_once_until_the_last_one_leaves() -> None:
    ledger = books()
    for pid in (1, 2, 3):
        ledger.reserve(("a",), pid, [mapped("f", 1000), private(1)])
    assert ledger.promised("a") == 1003
    assert ledger.need("a", [mapped("f", 1000)]) == 0
    assert ledger.need("b", [mapped("f", 1000)]) == 1000, "another device has its own"
    for pid, left in ((1, 1002), (2, 1001), (3, 0)):
        ledger.release(pid)
        assert ledger.promised("a") == left


def test_can_ever_reserve_counts_the_system_but_nobody_else() -> None:
    ledger = books()
    ledger.adopt(("a",), SYSTEM_PID, [private(0, "system")])
    ledger.measure(SYSTEM_PID, "a", 1000, False)
    ledger.reserve(("a",), 1, [private(CAPACITY - 5000)])
    assert ledger.can_ever_reserve("a", [private(CAPACITY - 1000)])
    assert not ledger.can_ever_reserve("a", [private(CAPACITY - 999)])
    assert ledger.can_ever_reserve("b", [private(CAPACITY)])


def test_a_measurement_above_the_promise_raises_it_at_once() -> None:
    ledger = books()
    ledger.reserve(("a",), 1, [private(1000)])
    ledger.measure(1, "a", 2_000_000, settled=False)
    assert ledger.promised("a") == ledger.with_margin(2_000_000) == 2_200_000 + MARGIN_BYTES


def test_a_measurement_below_the_promise_lowers_it_only_when_settled() -> None:
    ledger = books()
    ledger.reserve(("a",), 1, [private(5_000_000_000), private(1_000_000_000, "kv")])
    ledger.measure(1, "a", 1_000_000_000, settled=False)
    assert ledger.promised("a") == 6_000_000_000
    ledger.measure(1, "a", 1_000_000_000, settled=True)
    assert ledger.promised("a") == ledger.with_margin(1_000_000_000)
    kinds = ledger.memory_of(1)[3]
    assert kinds["activations"] == pytest.approx(5 * kinds["kv"], rel=1e-6)
    ledger.measure(1, "a", 10, settled=True)
    assert ledger.promised("a") == ledger.with_margin(1_000_000_000), "the peak counts"


def test_free_may_be_negative_when_others_take_what_was_promised() -> None:
    ledger = books()
    ledger.reserve(("a",), 1, [private(CAPACITY)])
    ledger.observe("a", 0, 500)
    assert ledger.free("a") == -500
    assert ledger.books("a")["free_bytes"] == -500


def test_who_is_unknown_is_not_measured() -> None:
    ledger = books()
    ledger.measure(99, "a", 1000, settled=True)
    assert ledger.promised("a") == 0


def test_the_holders_are_named_largest_first() -> None:
    ledger = books()
    for pid, nbytes in ((1, 10), (2, 30), (3, 20)):
        ledger.reserve(("a",), pid, [private(nbytes)])
    assert ledger.holders("a") == [(2, 30), (3, 20), (1, 10)]


sizes = st.integers(0, CAPACITY)
segments = st.lists(
    st.one_of(
        st.builds(private, sizes, st.sampled_from(["activations", "kv", "weights"])),
        # The size of a file is a fact: the same for all who map it.
        st.sampled_from([mapped("f", 1_000_000_000), mapped("g", 2_000_000_000)]),
    ),
    max_size=4,
)
devices = st.sampled_from("ab")
pids = st.integers(0, 6)
happenings = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), devices, pids, segments),
        st.tuples(st.just("release"), pids),
        st.tuples(st.just("measure"), pids, devices, sizes, st.booleans()),
        st.tuples(st.just("observe"), devices, sizes, sizes),
    ),
    max_size=60,
)


@given(happenings)
def test_the_books_add_up_whatever_happens(script: list[tuple[Any, ...]]) -> None:
    ledger, held = books(), dict[int, tuple[str, list[dict[str, Any]]]]()
    for what, *values in script:
        if what == "reserve":
            device, pid, wanted = values
            if pid in held:
                continue
            need, free = ledger.need(device, wanted), ledger.free(device)
            try:
                ledger.reserve((device,), pid, wanted)
            except NoMemory:
                assert need > free
            else:
                held[pid] = (device, wanted)
        elif what == "release":
            ledger.release(values[0])
            held.pop(values[0], None)
        else:
            getattr(ledger, what)(*values)
        ledger.check()
        for device in "ab":
            shown = ledger.books(device)
            total = shown["foreign_bytes"] + shown["promised_bytes"] + shown["free_bytes"]
            assert total == shown["capacity_bytes"] == CAPACITY
            assert sum(s["bytes"] for s in shown["segments"]) == shown["promised_bytes"]
            assert all(s["bytes"] >= 0 for s in shown["segments"])
            files = {s["shared"] for d, w in held.values() if d == device for s in w if s["shared"]}
            assert len([s for s in shown["segments"] if s["shared"]]) == len(files)
    for pid in list(held):
        ledger.release(pid)
    assert ledger.promised("a") == ledger.promised("b") == 0
