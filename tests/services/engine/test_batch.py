"""Who gets tokens in a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.services.engine import batch
from llmos.services.engine.batch import Candidate, Pace, Rank, plan


def prompt(pid: int, pending: int, cls: int = 0, nice: int = 0, **more: object) -> Candidate:
    return Candidate(pid, Rank(cls, nice, pid), pending, **more)  # type: ignore[arg-type]


def decodes(pid: int, cls: int = 0, nice: int = 0, **more: object) -> Candidate:
    return prompt(pid, 0, cls, nice, **more)


def pieces(shares: list[batch.Share]) -> dict[int, int]:
    return {s.pid: s.piece for s in shares}


def slow() -> Pace:
    """100 tokens of prompts beside somebody who decodes."""
    return Pace(100 / batch.STEP_S)


def test_who_decodes_gets_a_token_and_a_prompt_a_piece() -> None:
    assert pieces(plan([decodes(1), prompt(2, 500), decodes(3)], slow())) == {1: 0, 3: 0, 2: 100}


def test_without_anybody_waiting_a_prompt_gets_a_large_piece() -> None:
    assert pieces(plan([prompt(2, 5000)], slow())) == {2: batch.MOST_PIECE}


def test_the_oldest_prompt_gets_half_and_the_shortest_the_rest() -> None:
    given = [prompt(1, 5000), prompt(2, 400), prompt(3, 30), decodes(9)]
    assert pieces(plan(given, slow())) == {9: 0, 1: 50, 3: 30, 2: 20}


def test_a_more_urgent_prompt_goes_before_all_others() -> None:
    given = [prompt(1, 5000), prompt(2, 80, nice=-5), prompt(3, 10, cls=1), decodes(9, cls=1)]
    assert pieces(plan(given, slow())) == {9: 0, 2: 80, 1: 20}


def test_who_is_exact_is_computed_alone_when_its_turn_comes() -> None:
    given = [
        decodes(1, last_served=5),
        decodes(2, last_served=5),
        decodes(3, last_served=4, exact=True),
    ]
    assert pieces(plan(given, slow())) == {3: 0}
    given = [
        decodes(1, last_served=5),
        decodes(2, last_served=5),
        decodes(3, last_served=6, exact=True),
    ]
    assert pieces(plan(given, slow())) == {1: 0, 2: 0}


def test_kinds_take_turns() -> None:
    given = [decodes(1, last_served=5), prompt(2, 9, last_served=4, kind="embedding")]
    assert pieces(plan(given, slow())) == {2: 9}


def test_beyond_the_rows_of_a_step_equals_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MOST_ROWS", 2)
    given = [decodes(1, last_served=7), decodes(2, last_served=6), decodes(3, last_served=5)]
    assert set(pieces(plan(given, slow()))) == {2, 3}
    assert set(pieces(plan([decodes(1, last_served=7, nice=-1), *given[1:]], slow()))) == {1, 3}


def test_the_pace_is_what_prompts_add_to_a_step() -> None:
    pace = Pace(1000)
    for _ in range(50):
        pace.took(0, 0.010)
        pace.took(200, 0.110)
    assert pace.tokens_per_s == pytest.approx(2000, rel=0.05)
    assert pace.piece(decoding=4) == pytest.approx(2000 * batch.STEP_S, rel=0.05)


def after(steps: list[tuple[int, float]], pace: Pace | None = None) -> Pace:
    pace = pace or Pace()
    for piece, seconds in steps:
        pace.took(piece, seconds)
    return pace


def test_a_pace_that_was_slow_is_not_so_for_ever() -> None:
    pace = after([(32, 0.2)] * 300)
    for _ in range(200):  # somebody always decodes, so that pieces are small
        piece = pace.piece(decoding=1)
        pace.took(0, 0.02)
        pace.took(piece, 0.02 + piece / 8000)
    assert pace.tokens_per_s == pytest.approx(8000, rel=0.2)


@pytest.mark.parametrize("true", [50, 8000])
def test_a_long_prompt_alone_teaches_as_much_as_it_can(true: float) -> None:
    pace = Pace()
    for _ in range(50):
        piece = pace.piece(decoding=0)
        pace.took(piece, 0.02 + piece / true)
    assert true / 2 <= pace.tokens_per_s <= 4 * true


def test_steps_that_contradict_each_other_do_not_carry_it_away() -> None:
    pace = after([(0, 0.08), (64, 0.064)] * 3000)  # the fuller step is the shorter one
    assert 500 < pace.tokens_per_s <= 4 * 1000.1


candidates = st.lists(
    st.builds(
        Candidate,
        pid=st.integers(1, 10**6),
        rank=st.builds(Rank, st.integers(0, 2), st.integers(-20, 19), st.integers(0, 99)),
        pending=st.integers(0, 5000),
        rows=st.integers(1, 8),
        last_served=st.integers(0, 99),
        exact=st.booleans(),
        kind=st.sampled_from(["text", "embedding"]),
    ),
    unique_by=lambda c: c.pid,
    max_size=20,
)


@given(candidates, st.floats(1, 1e6))
def test_a_step_has_work_whenever_somebody_waits(given: list[Candidate], rate: float) -> None:
    shares = plan(given, Pace(rate))
    assert bool(shares) == bool(given)
    by_pid = {c.pid: c for c in given}
    assert len({s.pid for s in shares}) == len(shares)
    for share in shares:
        c = by_pid[share.pid]
        assert (share.piece == 0) == (c.pending == 0)
        assert share.piece <= c.pending
    assert len({by_pid[s.pid].kind for s in shares}) <= 1
    if any(by_pid[s.pid].exact for s in shares):
        assert len(shares) == 1
    assert sum(s.piece for s in shares) <= batch.MOST_PIECE


@given(candidates)
def test_everybody_is_served_in_the_end(given: list[Candidate]) -> None:
    now = {c.pid: replace(c, rank=Rank(0, 0, c.rank.order)) for c in given}
    for step in range(100, 200 + 40 * len(now)):
        for share in plan(list(now.values()), Pace(1e5)):
            c = now[share.pid]
            now[share.pid] = replace(c, last_served=step, pending=c.pending - share.piece)
    assert all(c.last_served >= 100 and c.pending == 0 for c in now.values())
