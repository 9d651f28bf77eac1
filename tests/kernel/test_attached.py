"""The file of attached guests: who was handed out and has not ended is found again."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel import attached
from llmos.kernel.attached import AttachedGuests


def opened(path: Path) -> AttachedGuests:
    guests = AttachedGuests(path)
    guests.open()
    return guests


def test_who_has_ended_is_gone(tmp_path: Path) -> None:
    guests = opened(tmp_path / "attached")
    guests.add(1, b"one")
    guests.add(2, b"two")
    guests.drop(1)
    guests.drop(9)
    assert AttachedGuests(tmp_path / "attached").open() == {2: b"two"}


def test_what_was_torn_at_the_end_costs_one_guest(tmp_path: Path) -> None:
    path = tmp_path / "attached"
    guests = opened(path)
    guests.add(1, b"one")
    guests.add(2, b"two")
    path.write_bytes(path.read_bytes()[:-1])
    assert AttachedGuests(path).open() == {1: b"one"}
    assert AttachedGuests(path).open() == {1: b"one"}, "the torn end is gone"


def test_a_damaged_file_is_no_reason_not_to_boot(tmp_path: Path) -> None:
    path = tmp_path / "attached"
    for data in (b"\xff" * 64, b"\x00\x00\x00\x01\x07", b"\x00\x00\x00\x03\x92\x01\x02"):
        path.write_bytes(data)
        guests = opened(path)
        guests.add(3, b"three")
        assert AttachedGuests(path).open() == {3: b"three"}


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=60))
def test_the_file_says_what_the_calls_have_said(calls: list[tuple[int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attached"
        guests, expected = opened(path), {}
        for number, (pid, comes) in enumerate(calls):
            if comes:
                row = b"%d" % number
                guests.add(pid, row)
                expected[pid] = row
            else:
                guests.drop(pid)
                expected.pop(pid, None)
        assert guests.pids() == expected.keys()
        assert AttachedGuests(path).open() == expected


def test_it_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "attached"
    guests = opened(path)
    for pid in range(1, 5 * attached.KEPT_ENDED):
        guests.add(pid, b"x" * 100)
        guests.drop(pid)
    assert path.stat().st_size < 2 * attached.KEPT_ENDED * 130
