"""The one table of moves, and what a process keeps of its own history."""

from __future__ import annotations

import itertools

import pytest

from llmos.kernel.errors import KernelBug
from llmos.kernel.process import MOVES, RUNNABLE, STORY_LINES, Class, Process, State

PAIRS = list(itertools.product(State, State))


def process(state: State = State.NEW) -> Process:
    return Process(7, "spin", {}, "u", 0, 0.0, state=state)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_move_is_made_if_and_only_if_the_table_has_it(before: State, after: State) -> None:
    proc = process(before)
    if after in MOVES[before]:
        proc.move(after, "because", 5.0, "memory")
        assert (proc.state, proc.reason) == (after, "memory")
        assert proc.story == [(5.0, str(after), "because")]
    else:
        with pytest.raises(KernelBug, match=f"cannot go from {before} to {after}"):
            proc.move(after, "because", 5.0)
        assert proc.state is before
        assert proc.story == []


def test_the_table_names_every_state_and_the_end_is_the_end() -> None:
    assert set(MOVES) == set(State)
    assert MOVES[State.EXITED] == frozenset()


def test_every_state_can_be_reached_and_every_state_can_end() -> None:
    reached, ways = {State.NEW}, [State.NEW]
    for state in ways:
        ways += [s for s in MOVES[state] if s not in reached and not reached.add(s)]  # type: ignore[func-returns-value]
    assert reached == set(State)
    assert all(State.EXITED in MOVES[s] for s in State if s is not State.EXITED)


def test_what_runs_can_be_paused_stopped_and_lose_its_worker() -> None:
    for state in RUNNABLE:
        assert {State.PAUSED, State.STOPPING, State.WAITING, State.BACKOFF} <= MOVES[state]


def test_a_long_story_keeps_its_beginning_and_its_end() -> None:
    proc = process()
    for n in range(5 * STORY_LINES):
        proc.tell(float(n), "line", str(n))
    assert len(proc.story) == STORY_LINES
    assert proc.story[0][2] == "0"
    assert proc.story[-1][2] == str(5 * STORY_LINES - 1)


def test_guests_rank_by_class_then_nice_then_age() -> None:
    a, b, c = process(), process(), process()
    a.cls, a.nice, a.pid = Class.BATCH, -20, 1
    b.cls, b.nice, b.pid = Class.INTERACTIVE, 19, 2
    c.cls, c.nice, c.pid = Class.INTERACTIVE, 19, 3
    assert sorted([a, c, b], key=Process.rank) == [b, c, a]


def test_what_ps_shows_has_the_promised_keys() -> None:
    row = process().to_wire()
    promised = (
        "pid ppid user program name state residency reason class nice device device_seconds "
        "started_at ended_at exit_status memory worker_id"
    )
    assert set(promised.split()) <= set(row)
    assert set(row["memory"]) == {"promised_bytes", "measured_bytes", "peak_bytes", "by_kind"}
    assert row["device"] is None
    assert row["worker_id"] is None
