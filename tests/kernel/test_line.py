"""The line for memory: order, buckets, and a model that keeps no buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.line import Line


def test_the_order_is_class_then_place_then_age() -> None:
    line = Line()
    line.add(3, 1, (5.0,), (100,))
    line.add(2, 1, (5.0,), (100,))
    line.add(9, 0, (99.0,), (100,))
    line.add(4, 1, (1.0,), (7,))
    assert list(line) == [9, 4, 2, 3]
    assert [line.before(pid) for pid in (9, 4, 2, 3)] == [0, 1, 2, 3]


def test_one_head_for_each_need_and_the_next_when_it_leaves() -> None:
    line = Line()
    for pid in (1, 2, 3):
        line.add(pid, 1, (float(pid),), (100,))
    line.add(4, 1, (2.5,), (7,))
    assert list(line.heads()) == [1, 4], "who stands behind 1 needs the same as 1"
    seen = []
    for pid in line.heads():
        seen.append(pid)
        if pid in (1, 2):
            line.pop(pid)
    assert seen == [1, 2, 4, 3]


def test_a_new_place_counts_at_once() -> None:
    line = Line()
    line.add(1, 1, (1.0,), (100,))
    line.add(2, 1, (2.0,), (100,))
    line.add(1, 1, (3.0,), (100,))
    line.check()
    assert list(line.heads()) == [2]
    line.rebuild({1: (0.0,)})
    assert list(line.heads()) == [1]
    line.check()


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
            line.add(pid, cls, (float(place),), (need,))
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
