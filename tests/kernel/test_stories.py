"""Random lives of a machine: whatever comes, the books balance and everybody comes to an end.

`core.check()` runs after every event (support/toy.py). The scripts are drawn by hypothesis, so
that a failure is shown as the shortest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel import admission
from llmos.kernel import events as ev
from llmos.kernel.errors import BadRequest, NoMemory
from llmos.kernel.line import Line
from llmos.kernel.policies.base import Policy
from llmos.kernel.policies.siblings import Siblings
from llmos.kernel.process import Class, Role, State
from support.toy import Toy

MIB = 1024**2
ALL: list[type[Policy]] = [p.load() for p in entry_points(group="llmos.policies")]
CAPACITY = 1000 * MIB

classes = st.sampled_from(list(Class))
nices = st.integers(-20, 19)
which = st.integers(0, 9)
moments = st.sampled_from([0.0, 0.0005, 0.001, 0.005, 0.01, 0.03, 0.1, 0.6, 3.0])

actions = st.one_of(
    st.tuples(
        st.just("submit"), st.integers(1, 12), st.integers(0, 900), classes, nices,
        st.sampled_from(["no", "no", "on-failure", "always"]),
    ),
    st.tuples(st.just("guest"), st.sampled_from("mn"), st.integers(1, 12), classes, st.booleans()),
    st.tuples(st.just("fetch"), st.integers(1, 12), st.sampled_from(["no", "on-failure"])),
    st.tuples(st.just("load"), st.sampled_from("mn"), st.sampled_from([0.0, 5.0])),
    st.tuples(st.just("run"), moments),
    st.tuples(st.just("run"), moments),
    st.tuples(st.just("kill"), which, st.sampled_from([2, 9, 15])),
    st.tuples(st.just("pause"), which),
    st.tuples(st.just("resume"), which),
    st.tuples(st.just("renice"), which, nices),
    st.tuples(st.just("send"), which),
    st.tuples(st.just("die"), which, st.sampled_from([None, 1, 137])),
    st.tuples(st.just("measure"), which, st.integers(0, 1000), st.integers(0, 200)),
    st.tuples(st.just("checkpoint"), which),
)  # fmt: skip


class Story:
    def __init__(self, devices: int, policy: Policy | None = None, **settings: float) -> None:
        self.toy = Toy(CAPACITY, devices, policy, **settings)
        self.pids: list[int] = []

    def play(self, script: list[tuple[Any, ...]]) -> Story:
        for what, *values in script:
            try:
                getattr(self, what)(*values)
            except (BadRequest, NoMemory):
                self.toy.do(ev.Clock())  # as the kernel does: what was refused changed nothing
        return self

    def pid(self, number: int) -> int:
        return self.pids[number % len(self.pids)] if self.pids else 0

    def submit(self, steps: int, mib: int, cls: Class, nice: int, restart: str) -> None:
        made = self.toy.submit(steps, 0.1, mib * MIB, cls, nice, restart=restart)
        self.pids.append(made)

    def guest(self, model: str, tokens: int, cls: Class, turns: bool) -> None:
        made = self.toy.submit_guest(model, tokens, cls, turns=turns)
        self.pids += [p for p in self.toy.core.m.procs if p not in self.pids]
        assert made in self.pids

    def fetch(self, steps: int, restart: str) -> None:
        """A process that needs no device."""
        self.pids.append(self.toy.submit(steps, 0.1, 0, restart=restart, gang=0))

    def load(self, model: str, keep_s: float) -> None:
        pid = self.toy.load(model, keep_s)
        self.pids += [pid] if pid not in self.pids else []

    def run(self, seconds: float) -> None:
        self.toy.run(seconds)

    def kill(self, number: int, signal: int) -> None:
        self.toy.do(ev.KillAsked(self.pid(number), signal))

    def pause(self, number: int) -> None:
        self.toy.do(ev.PauseAsked(self.pid(number)))

    def resume(self, number: int) -> None:
        self.toy.do(ev.ResumeAsked(self.pid(number)))

    def renice(self, number: int, nice: int) -> None:
        self.toy.do(ev.ReniceAsked(self.pid(number), nice))

    def send(self, number: int) -> None:
        self.toy.do(ev.InputGiven(self.pid(number), {}))

    def die(self, number: int, status: int | None) -> None:
        if self.pids and self.toy.worker(self.pid(number)):
            self.toy.die(self.pid(number), status)

    def measure(self, number: int, mib: int, foreign_mib: int) -> None:
        found = {self.pid(number): mib * MIB} if self.pids else {}
        self.toy.do(ev.Measured("sim0", found, CAPACITY - mib * MIB, foreign_mib * MIB))

    def checkpoint(self, number: int) -> None:
        self.toy.do(ev.CheckpointAsked(self.pid(number)))

    def to_the_end(self) -> None:
        """Nothing foreign, nothing paused, no chat open: now everybody can finish."""
        for device in self.toy.core.m.devices:
            self.toy.do(ev.Measured(device, {}, CAPACITY, 0))
        for proc in list(self.toy.core.m.procs.values()):
            if proc.state is State.PAUSED:
                self.toy.do(ev.ResumeAsked(proc.pid))
            if proc.live and (proc.args.get("turns") or proc.restart == "always"):
                self.toy.do(ev.KillAsked(proc.pid, 15))
        self.toy.run(300)

    def balanced(self) -> None:
        m = self.toy.core.m
        assert m.workers == {}
        busy = sum(q.busy_s for q in m.devices.values())
        assert sum(p.device_seconds for p in m.procs.values()) == pytest.approx(busy, abs=1e-6)
        for device, queue in m.devices.items():
            assert queue.lease is None
            assert busy <= len(m.devices) * (self.toy.now - m.started_at) + 1e-6
            assert m.ledger.promised(device) == 0
            books = m.ledger.books(device)
            total = books["foreign_bytes"] + books["promised_bytes"] + books["free_bytes"]
            assert total == books["capacity_bytes"]


scripts = st.lists(actions, min_size=1, max_size=40)


@given(scripts, st.integers(1, 2))
def test_everybody_reaches_the_end_and_all_memory_comes_back(
    script: list[tuple[Any, ...]], devices: int
) -> None:
    story = Story(devices).play(script)
    story.to_the_end()
    procs = story.toy.core.m.procs.values()
    assert [(p.pid, p.state, p.reason) for p in procs if p.live] == []
    story.balanced()


@given(scripts, st.integers(1, 2))
def test_a_shutdown_at_any_moment_stops_all_and_keeps_what_is_not_done(
    script: list[tuple[Any, ...]], devices: int
) -> None:
    story = Story(devices).play(script)
    paused = {p.pid for p in story.toy.core.m.procs.values() if p.state is State.PAUSED}
    ended = {p.pid for p in story.toy.core.m.procs.values() if not p.live}
    story.toy.do(ev.ShutdownAsked())
    story.toy.run(30)
    story.balanced()
    for proc in story.toy.core.m.procs.values():
        if proc.role is Role.ENGINE:
            assert proc.state in (State.EXITED, State.WAITING, State.BACKOFF)
        elif proc.pid in ended:
            assert proc.state is State.EXITED
        elif proc.pid in paused:
            assert proc.state in (State.PAUSED, State.EXITED), "a person's pause is kept"
        else:
            assert proc.state in (State.WAITING, State.BACKOFF, State.EXITED)


@given(scripts)
def test_the_same_script_gives_the_same_story_twice(script: list[tuple[Any, ...]]) -> None:
    first, second = (Story(1).play(script) for _ in range(2))
    assert first.toy.orders == second.toy.orders
    stories = [[p.story for p in s.toy.core.m.procs.values()] for s in (first, second)]
    assert stories[0] == stories[1]


class AllTried(Line):
    """A line that leaves out nobody."""

    def heads(self, *left_out: Any) -> Iterator[int]:
        return super().heads()


hurried = {"passing_s": 0.3, "min_residency_s": 0.2, "residency_moves": 1.0, "aging_s": 5.0}
submits = st.tuples(
    st.just("submit"), st.integers(1, 12), st.integers(0, 900), classes, nices, st.just("no")
)


@pytest.mark.parametrize("policy", [None, *ALL], ids=lambda p: p.name if p else "default")
@given(st.lists(st.one_of(submits, submits, actions), min_size=4, max_size=40), st.integers(1, 3))
def test_to_leave_out_who_cannot_fit_changes_nothing(
    policy: type[Policy] | None, script: list[tuple[Any, ...]], devices: int
) -> None:
    stories = []
    with pytest.MonkeyPatch.context() as patch:
        for line in (Line(), AllTried()):
            story = Story(devices, policy() if policy else None, **hurried)
            story.toy.core.m.waiting = line
            stories.append(story.play(script))
            story.to_the_end()
            patch.setattr(admission._Pass, "_is_hopeless", lambda *_: False)
            patch.setattr(policy or Siblings, "in_order", False)
    assert stories[0].toy.orders == stories[1].toy.orders
