"""Policies: the same small contract for all of them, and what each is for."""

from __future__ import annotations

import math
from importlib.metadata import entry_points

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.policies.base import Job, Place, Policy, Turns
from llmos.kernel.policies.eevdf import Eevdf, Shares
from llmos.kernel.policies.fifo import Fifo
from llmos.kernel.policies.gittins import Member, indices
from llmos.kernel.policies.guarded import Guarded
from llmos.kernel.policies.las import LeastAttained
from llmos.kernel.policies.rr import RoundRobin
from llmos.kernel.policies.siblings import Siblings
from llmos.kernel.policies.sjf import ShortestFirst

ALL: list[type[Policy]] = [p.load() for p in entry_points(group="llmos.policies")]


def job(key: str, **more: object) -> Job:
    made = Job(key)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def order(turns: Turns) -> list[str]:
    """Who would go, one after the other."""
    found: list[str] = []
    while (key := turns.pick(found)) is not None:
        found.append(key)
    return found


def test_those_that_ship_are_found_by_name() -> None:
    assert {p.name for p in ALL} >= {"eevdf", "fifo", "las", "rr", "siblings", "sjf"}


happenings = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "remove", "run", "run", "renice", "request"]),
        st.integers(0, 6),
        st.floats(0.001, 2.0),
    ),
    max_size=80,
)


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.name)
@given(happenings)
def test_turns_keep_their_contract_whatever_comes(
    cls: type[Policy], script: list[tuple[str, int, float]]
) -> None:
    turns, here = cls(0.5).turns(), set[str]()
    for what, number, x in script:
        key = f"w{number}"
        if what == "add" and key not in here:
            here.add(key)
            turns.add(job(key, user=f"u{number % 2}", submitted_at=x, predicted_s=100 * x))
        elif what == "remove" and key in here:
            here.discard(key)
            turns.remove(key)
        elif key in here and what == "renice":
            turns.renice(key, 1024 * x)
        elif key in here and what == "request":
            turns.request(key, x)
        elif what == "run" and here:
            picked = turns.pick()
            assert picked in here
            turns.charge(picked, min(x, turns.left_s(picked)))
        turns.check()
        assert len(turns) == len(here)
        assert sorted(order(turns)) == sorted(here)
        assert all(turns.left_s(k) > 0 for k in here)


def test_first_come_first_served_runs_to_the_end() -> None:
    turns = Fifo().turns()
    turns.add(job("b", submitted_at=2.0))
    turns.add(job("a", submitted_at=1.0))
    turns.charge("a", 1e6)
    assert order(turns) == ["a", "b"]
    assert turns.left_s("a") == math.inf


def test_round_robin_gives_everybody_a_slice_in_turn() -> None:
    turns = RoundRobin(0.5).turns()
    for key in "abc":
        turns.add(job(key, request_s=0.5))
    seen = []
    for _ in range(6):
        key = turns.pick()
        assert key is not None
        seen.append(key)
        turns.charge(key, turns.left_s(key))
    assert seen == ["a", "b", "c", "a", "b", "c"]


def test_the_shortest_goes_first_and_the_unknown_last() -> None:
    turns = ShortestFirst(0.5).turns()
    turns.add(job("unknown", submitted_at=0.0))
    turns.add(job("long", predicted_s=100.0))
    turns.add(job("short", predicted_s=5.0))
    assert order(turns) == ["short", "long", "unknown"]
    assert ShortestFirst().displaces(job("a", predicted_s=4.0), job("b", predicted_s=10.0))
    assert not ShortestFirst().displaces(job("a", predicted_s=8.0), job("b", predicted_s=10.0))
    assert not ShortestFirst().displaces(job("a"), job("b", predicted_s=10.0))


def test_who_has_had_little_goes_before_who_has_had_much() -> None:
    policy = LeastAttained(0.5)
    new, old = job("new", submitted_at=9.0), job("old", attained_s=1e5)
    assert policy.place(new) < policy.place(old)
    assert policy.displaces(new, old)
    assert not policy.displaces(job("other"), new), "equals do not displace each other"
    assert policy.review_s(new) == pytest.approx(60.0)
    heavy = job("heavy", attained_s=100.0, weight=4096.0)
    assert policy.level(heavy) == 0, "a weight of four makes four seconds one"


def test_a_users_share_does_not_grow_with_its_processes() -> None:
    turns = Shares(0.5)
    for n in range(9):
        turns.add(job(f"many{n}", user="many", request_s=0.5))
    turns.add(job("one", user="one", request_s=0.5))
    got = {"many": 0.0, "one": 0.0}
    for _ in range(400):
        key = turns.pick()
        assert key is not None
        turns.charge(key, turns.left_s(key))
        got["one" if key == "one" else "many"] += 0.5
    assert got["one"] == pytest.approx(got["many"], abs=1.0)


@given(
    st.lists(st.integers(-10, 10), min_size=1, max_size=8),
    st.lists(st.floats(0.02, 0.5), min_size=8, max_size=8),
    st.integers(10, 300),
)
def test_no_lag_exceeds_the_longest_turn(nices: list[int], steps: list[float], runs: int) -> None:
    """One device, one class: whoever it is, however long its steps, it is never owed more."""
    from llmos.kernel.process import weight_of
    from llmos.kernel.sched import request_for

    turns = Shares(0.5)
    for n, nice in enumerate(nices):
        request = request_for(steps[n], 0.5)
        turns.add(job(str(n), weight=float(weight_of(nice)), request_s=request))
    for _ in range(runs):
        key = turns.pick()
        assert key is not None
        turns.charge(key, turns.left_s(key))
        assert all(abs(turns.lag_s(str(n))) <= 0.5 + 1e-6 for n in range(len(nices)))


def ended_after(policy: Siblings, family: str, seconds: list[float]) -> None:
    for n, ran_s in enumerate(seconds):
        key = f"{family}{n}"
        policy.arrived(job(key, family=family))
        policy.ended(job(key, family=family, attained_s=ran_s))


def test_a_job_is_expected_to_last_as_long_as_its_siblings_did() -> None:
    policy = Siblings(0.5)
    assert isinstance(policy.turns(), Shares)
    ended_after(policy, "short", [30.0] * 8)
    ended_after(policy, "long", [30_000.0] * 8)
    short, long = job("a", family="short"), job("b", family="long")
    assert policy.place(short) < policy.place(long)
    assert policy.displaces(short, long)
    assert not policy.displaces(long, short)
    assert not policy.displaces(short, job("c", family="short")), "those that are alike stay"


def test_who_has_outlived_its_siblings_is_expected_to_last() -> None:
    policy = Siblings(0.5)
    ended_after(policy, "f", [30.0] * 8)
    young, old = job("y", family="f", attained_s=10.0), job("o", family="f", attained_s=4000.0)
    assert policy.place(young) < policy.place(old)
    assert policy.review_s(old) == pytest.approx(96.0), "at the next doubling"


def test_it_says_whose_place_an_end_changes() -> None:
    policy = Siblings(0.5)
    for key in "abc":
        policy.arrived(job(key, family="f"))
    policy.arrived(job("x", family="other"))
    before = policy.place(job("c", family="f"))
    assert set(policy.ended(job("a", family="f", attained_s=5.0))) == {"b", "c"}
    assert policy.place(job("c", family="f")) != before


class Anew(Siblings):
    """Takes everything near an arrival as changed."""

    def _stale(self, member: Member) -> list[str]:
        for other in self._families[member.family].near(member.at):
            other.ranks_of = -1
        return super()._stale(member)


@given(
    st.lists(
        st.tuples(st.sampled_from(["arrive", "arrive", "grow", "end"]), st.integers(0, 11),
                  st.floats(0, 50)),
        max_size=60,
    )
)  # fmt: skip
def test_no_arrival_changes_a_place_before_there_is_something_to_learn(
    script: list[tuple[str, int, float]],
) -> None:
    lazy, anew = Siblings(0.5), Anew(0.5)
    jobs, places = dict[str, Job](), (dict[str, Place](), dict[str, Place]())
    for what, number, seconds in script:
        key = f"j{number}"
        if what == "arrive" and key not in jobs:
            jobs[key] = job(key, family="f" if number % 3 else "g")
        if key not in jobs:
            continue
        jobs[key].attained_s += seconds if what == "grow" else 0.0
        for policy, seen in zip((lazy, anew), places, strict=True):
            moved: list[str] = []
            if what == "grow":  # as it is when one in memory is looked at
                policy.displaces(jobs[key], jobs[key])
            elif what == "end":
                moved = list(policy.ended(jobs[key]))
            elif key not in seen:
                moved = [*policy.arrived(jobs[key]), key]
            seen.update((k, policy.place(jobs[k])) for k in moved if k in jobs)
        if what == "end":
            del jobs[key]
        assert places[0] == places[1]


def test_a_thousand_alike_that_come_before_the_first_has_run_move_nobody() -> None:
    policy = Siblings(0.5)
    for n in range(1000):
        moved = policy.arrived(job(f"j{n}", family="f"))
        assert list(moved) == [f"j{n}"]
        policy.place(job(f"j{n}", family="f"))


def test_a_long_history_is_forgotten_and_the_ranks_stay() -> None:
    policy = Siblings(0.5)
    ended_after(policy, "f", [30.0] * 500)
    rank = policy.place(job("z", family="f"))
    few = Siblings(0.5)
    ended_after(few, "f", [30.0] * 500)
    assert len(policy._members) < 150
    assert rank == few.place(job("z", family="f"))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 100)), min_size=1, max_size=12))
def test_the_index_is_the_best_ratio_of_all_stops(pairs: list[tuple[float, float]]) -> None:
    chances, seconds = [c for c, _ in pairs], [s for _, s in pairs]
    for i, found in enumerate(indices(chances, seconds)):
        every = [sum(seconds[i : j + 1]) / sum(chances[i : j + 1]) for j in range(i, len(chances))]
        assert found == pytest.approx(min(every))


def test_eevdf_moves_out_who_had_more_by_a_whole_stay() -> None:
    policy = Eevdf(0.5)
    assert policy.displaces(job("a"), job("b", attained_s=61.0))
    assert not policy.displaces(job("a"), job("b", attained_s=59.0))


class Wrong(Fifo):
    """Raises at its n-th question."""

    name = "wrong"
    after = 3

    def turns(self) -> Turns:
        outer = self

        class Turns(Shares):
            def pick(self, skip: object = ()) -> str | None:
                outer.after -= 1
                if outer.after < 0:
                    raise RuntimeError("no idea")
                return super().pick(skip)  # type: ignore[arg-type]

        return Turns(0.5)


def test_a_policy_that_raises_is_replaced_and_nobody_is_lost() -> None:
    said: list[str] = []
    policy = Guarded(Wrong(0.5), said.append)
    here, elsewhere = policy.turns(), policy.turns()
    for key in "abc":
        here.add(job(key))
        elsewhere.add(job(key))
    served = set()
    for _ in range(30):
        key = here.pick()
        assert key is not None
        here.charge(key, 0.5)
        served.add(key)
    assert served == set("abc")
    assert said == ["policy 'wrong' raised RuntimeError: no idea; the default goes on"]
    assert policy.broken
    assert elsewhere.pick() in set("abc"), "its other queues go over too"
    elsewhere.remove("a")
    assert len(elsewhere) == 2


def test_a_policy_that_picks_who_is_not_there_is_replaced() -> None:
    class Liar(Fifo):
        name = "liar"

        def turns(self) -> Turns:
            class Turns(Shares):
                def pick(self, skip: object = ()) -> str | None:
                    return "nobody"

            return Turns(0.5)

    said: list[str] = []
    turns = Guarded(Liar(), said.append).turns()
    turns.add(job("a"))
    assert turns.pick() == "a"
    assert "nobody" in said[0]


QUESTIONS = ("add", "remove", "charge", "pick", "left_s", "renice", "request", "may_run")


@pytest.mark.parametrize("question", QUESTIONS)
def test_turns_that_raise_at_any_question_lose_nobody(question: str) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError(question)

    class Broken(Fifo):
        name = "broken"

        def turns(self) -> Turns:
            made = Shares(0.5)
            setattr(made, question, broken)
            return made

    said: list[str] = []
    turns = Guarded(Broken(0.5), said.append).turns()
    for key in "abc":
        turns.add(job(key))
    turns.renice("a", 2048.0)
    turns.request("a", 0.1)
    turns.charge("a", 0.2)
    assert turns.left_s("a") > 0
    assert turns.may_run("b") in (True, False)
    turns.remove("c")
    turns.check()
    assert set(order(turns)) == {"a", "b"}
    assert len(turns) == 2
    assert said == [f"policy 'broken' raised ZeroDivisionError: {question}; the default goes on"]


@pytest.mark.parametrize(
    ("question", "wrong"),
    [("place", ("first",)), ("place", None), ("review_s", "soon"), ("arrived", 7), ("ended", 7)],
)
def test_an_answer_that_makes_no_sense_is_the_default_s_to_give(
    question: str, wrong: object
) -> None:
    said: list[str] = []
    inner = Fifo(0.5)
    setattr(inner, question, lambda *_: wrong)
    policy = Guarded(inner, said.append)
    asked = getattr(policy, question)(job("1", family="f"))
    assert asked is not None
    assert policy.broken
    assert len(said) == 1
