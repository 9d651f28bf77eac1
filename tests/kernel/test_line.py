"""The line for memory: order, buckets, and a model that keeps no buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.line import Line, Need


def test_the_order_is_class_then_place_then_age() -> None:
    line = Line()
    line.add(3, 1, (5.0,), Need(100))
    line.add(2, 1, (5.0,), Need(100))
    line.add(9, 0, (99.0,), Need(100))
    line.add(4, 1, (1.0,), Need(7))
    assert list(line) == [9, 4, 2, 3]
    assert [line.before(pid) for pid in (9, 4, 2, 3)] == [0, 1, 2, 3]


def test_one_head_for_each_need_and_the_next_when_it_leaves() -> None:
    line = Line()
    for pid in (1, 2, 3):
        line.add(pid, 1, (float(pid),), Need(100))
    line.add(4, 1, (2.5,), Need(7))
    assert list(line.heads()) == [1, 4], "who stands behind 1 needs the same as 1"
    seen = []
    for pid in line.heads():
        seen.append(pid)
        if pid in (1, 2):
            line.pop(pid)
    assert seen == [1, 2, 4, 3]


def test_a_new_place_counts_at_once() -> None:
    line = Line()
    line.add(1, 1, (1.0,), Need(100))
    line.add(2, 1, (2.0,), Need(100))
    line.add(1, 1, (3.0,), Need(100))
    line.check()
    assert list(line.heads()) == [2]
    line.rebuild({1: (0.0,)})
    assert list(line.heads()) == [1]
    line.check()


def test_who_is_above_the_bound_is_left_out_unless_late() -> None:
    line = Line()
    for pid in range(1, 11):
        line.add(pid, 1, (float(pid),), Need(100 * pid), late_at=float(pid))
    line.add(11, 1, (0.5,), Need(5000, 1, ("a device",)))
    asked = []

    def bound(cls: int, gang: int) -> int:
        asked.append((cls, gang))
        return 350

    assert list(line.heads(0.0, bound)) == [11, 1, 2, 3, 10], "and one of each kind"
    assert asked == [(1, 1)]
    assert list(line.heads(5.0, bound)) == [11, 1, 2, 3, 4, 5, 10], "4 and 5 are late now"
    line.add(5, 1, (5.0,), Need(500), late_at=9.0)
    line.pop(4)
    assert list(line.heads(5.0, bound)) == [11, 1, 2, 3, 5, 10], "a bucket stays until it is empty"
    line.add(12, 0, (1.0,), Need(9000))
    assert next(line.heads(5.0, bound)) == 12
    assert asked[-1] == (0, 1), "the most urgent makes room for all who come after it"


def test_what_is_closed_is_not_tried_any_more() -> None:
    line, closed, seen = Line(), set[int](), []
    for pid in range(1, 9):
        line.add(pid, 1 + pid % 2, (float(pid),), Need(pid))
    line.add(9, 1, (99.0,), Need(1, 1, ("a device",)))
    for pid in line.heads(0.0, lambda cls, gang: 100, closed):
        seen.append(pid)
        closed |= {1} if pid == 4 else set()
    assert seen == [2, 4, 9, 1, 3, 5, 7]


def test_places_that_are_left_behind_are_swept_out() -> None:
    line = Line()
    for n in range(10_000):
        line.add(n % 3, 1, (float(n),), Need(7))
    assert len(line._buckets[1, Need(7)].ranks) < 100
    line.check()
    assert list(line) == [1, 2, 0]


happenings = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "pop", "pass"]),
        st.integers(1, 12),
        st.integers(0, 2),
        st.integers(0, 5),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(happenings)
def test_it_is_a_sorted_list_whatever_comes(script: list[tuple[str, int, int, int, int]]) -> None:
    line, model = Line(), dict[int, tuple[tuple[float, ...], int]]()
    for what, pid, cls, place, need in script:
        if what == "add":
            line.pop(pid)
            line.add(pid, cls, (float(place),), Need(need))
            model[pid] = ((cls, place, pid), need + 10 * cls)
        elif what == "pop":
            line.pop(pid)
            model.pop(pid, None)
        else:
            firsts = list(line.heads())
            by_need: dict[int, int] = {}
            for p in sorted(model, key=lambda p: model[p][0]):
                by_need.setdefault(model[p][1], p)
            assert firsts == sorted(by_need.values(), key=lambda p: model[p][0])
        line.check()
        assert list(line) == sorted(model, key=lambda p: model[p][0])
