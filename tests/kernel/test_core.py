"""The core as its users know it: what is asked, and what becomes of it."""

from __future__ import annotations

import pytest

from llmos.kernel import events as ev
from llmos.kernel.errors import BadArgument, IllegalMove, NoMemory, NoSuchProcess
from llmos.kernel.policies.base import Job, Place
from llmos.kernel.policies.fifo import Fifo
from llmos.kernel.process import Class, Process, Residency, State
from support.toy import Toy


def test_a_process_goes_from_submit_to_exit() -> None:
    toy = Toy()
    pid = toy.submit(steps=3)
    assert toy.state(pid) is State.STARTING
    toy.run(5)
    proc = toy.proc(pid)
    assert (proc.state, proc.exit_status) == (State.EXITED, 0)
    assert [what for _, what, _ in proc.story] == [
        "planning", "waiting", "starting", "ready", "running", "loaded", "exited",
    ]  # fmt: skip
    assert proc.device_seconds == pytest.approx(0.32, abs=0.01)
    assert toy.core.m.ledger.free("sim0") == 1000


def test_what_can_never_fit_is_refused_and_leaves_nothing() -> None:
    toy = Toy(capacity=1000)
    with pytest.raises(NoMemory, match="sim0 has"):
        toy.submit(nbytes=1001)
    assert toy.core.m.procs == {}
    assert ev.Forget(1) in toy.do(ev.Clock())


def test_a_process_waits_for_memory_until_it_is_really_free() -> None:
    toy = Toy(capacity=150)
    first, second = toy.submit(steps=5), toy.submit(steps=5)
    assert (toy.state(second), toy.proc(second).reason) == (State.WAITING, "memory")
    toy.do(ev.KillAsked(first, 15))
    assert toy.core.m.ledger.free("sim0") == 50, "the worker still lives"
    toy.run(0.002)
    assert toy.state(first) is State.EXITED
    assert toy.state(second) is State.STARTING


def test_a_smaller_process_passes_one_that_does_not_fit_but_not_for_ever() -> None:
    toy = Toy(capacity=150, policy=Fifo(), passing_s=60.0)
    toy.submit(steps=10_000)
    large = toy.submit(nbytes=100)
    small = toy.submit(nbytes=10, steps=1)
    assert toy.state(small) is State.STARTING
    toy.run(61)
    late = toy.submit(nbytes=10, steps=1)
    assert toy.state(late) is State.WAITING, "the large one has waited long enough"
    assert toy.state(large) is State.WAITING


def test_one_that_could_not_even_fit_with_all_others_gone_closes_the_device_too() -> None:
    toy = Toy(capacity=1000, policy=Fifo(), passing_s=60.0)
    toy.submit(steps=10_000, nbytes=500)
    large = toy.submit(nbytes=900)
    toy.run(30)
    toy.submit(nbytes=950)
    toy.run(31)
    late = toy.submit(nbytes=10, steps=1)
    assert toy.state(late) is State.WAITING, "the first of the large ones has waited long enough"
    assert toy.state(large) is State.WAITING
    alarms = [pid for _, pid, _ in toy.core.m.alarms if pid]
    assert len(alarms) == len(set(alarms)), "of each waiting one the next moment, no more"


def test_an_interactive_process_takes_the_device_at_once() -> None:
    toy = Toy()
    training = toy.submit(steps=1000, step_s=10.0)
    toy.run(1)
    assert toy.state(training) is State.RUNNING
    chat = toy.submit(steps=3, cls=Class.INTERACTIVE)
    toy.run(0.015)
    assert toy.state(chat) is State.RUNNING
    assert toy.state(training) is State.PREEMPTED
    assert toy.proc(training).preemptions == 1
    assert [(r.what, r.pid, r.by) for r in toy.records if r.what == "preempted"] == [
        ("preempted", training, chat)
    ]
    toy.run(1)
    assert toy.state(training) is State.RUNNING


def test_an_idle_process_runs_only_when_nobody_else_wants_to() -> None:
    toy = Toy()
    idle = toy.submit(steps=1000, cls=Class.IDLE)
    toy.run(1)
    batch = toy.submit(steps=20)
    toy.run(1)
    assert toy.state(idle) is State.PREEMPTED
    before = toy.proc(idle).device_seconds
    toy.run(0.5)
    assert toy.proc(idle).device_seconds == before
    toy.run(3)
    assert toy.state(batch) is State.EXITED
    assert toy.state(idle) is State.RUNNING


def test_nice_decides_the_shares() -> None:
    toy = Toy()
    a = toy.submit(steps=10_000, nice=0)
    b = toy.submit(steps=10_000, nice=5)
    toy.run(120)
    share = toy.proc(a).device_seconds / toy.proc(b).device_seconds
    assert share == pytest.approx(1024 / 335, rel=0.05)


def test_renice_acts_on_what_runs() -> None:
    toy = Toy()
    a, b = toy.submit(steps=10_000), toy.submit(steps=10_000)
    toy.run(20)
    before = (toy.proc(a).device_seconds, toy.proc(b).device_seconds)
    toy.do(ev.ReniceAsked(a, -5))
    toy.run(60)
    got = [toy.proc(p).device_seconds - s for p, s in zip((a, b), before, strict=True)]
    assert got[0] / got[1] == pytest.approx(3121 / 1024, rel=0.05)
    with pytest.raises(BadArgument):
        toy.do(ev.ReniceAsked(a, 20))


def test_pause_holds_and_resume_goes_on() -> None:
    toy = Toy()
    pid = toy.submit(steps=100)
    toy.run(1)
    toy.do(ev.PauseAsked(pid))
    toy.run(1)
    assert (toy.state(pid), toy.proc(pid).residency) == (State.PAUSED, Residency.DEVICE)
    used = toy.proc(pid).device_seconds
    toy.run(5)
    assert toy.proc(pid).device_seconds == used
    toy.do(ev.ResumeAsked(pid))
    toy.run(20)
    assert toy.proc(pid).exit_status == 0


def test_pause_before_the_start_and_in_the_start() -> None:
    toy = Toy(capacity=100)
    toy.submit(steps=5)
    waiting = toy.submit(steps=5)
    toy.do(ev.PauseAsked(waiting))
    toy.run(5)
    assert toy.state(waiting) is State.PAUSED
    toy.do(ev.ResumeAsked(waiting))
    assert toy.state(waiting) is State.STARTING
    toy.do(ev.PauseAsked(waiting))
    toy.run(5)
    assert toy.state(waiting) is State.PAUSED
    toy.do(ev.ResumeAsked(waiting))
    toy.run(5)
    assert toy.proc(waiting).exit_status == 0


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.5])
def test_kill_ends_a_process_wherever_it_is(after_s: float) -> None:
    toy = Toy()
    pid = toy.submit(steps=1000)
    toy.run(after_s)
    toy.do(ev.KillAsked(pid, 9))
    toy.run(1)
    assert toy.proc(pid).exit_status == 137
    assert toy.core.m.ledger.free("sim0") == 1000
    with pytest.raises(IllegalMove):
        toy.do(ev.KillAsked(pid, 9))


def test_a_pid_that_is_not_there_is_named() -> None:
    with pytest.raises(NoSuchProcess, match="99"):
        Toy().do(ev.KillAsked(99, 15))


def test_a_signal_that_ends_nothing_is_refused() -> None:
    toy = Toy()
    pid = toy.submit()
    with pytest.raises(BadArgument):
        toy.do(ev.KillAsked(pid, 28))


def test_a_worker_that_dies_takes_only_its_process_with_it() -> None:
    toy = Toy()
    a, b = toy.submit(steps=1000), toy.submit(steps=20)
    toy.run(0.5)
    toy.die(a, 139)
    toy.run(5)
    assert toy.proc(a).exit_status == 139
    assert "SIGSEGV" in toy.proc(a).reason
    assert toy.proc(b).exit_status == 0


def test_on_failure_restarts_with_growing_pauses() -> None:
    toy = Toy()
    pid = toy.submit(steps=1000, restart="on-failure")
    pauses = []
    for _ in range(3):
        toy.run(0.5)
        toy.die(pid, 137)
        assert toy.state(pid) is State.BACKOFF
        pause = (toy.proc(pid).next_start_at or 0) - toy.now
        pauses.append(int(pause))
        toy.run(pause + 0.1)
        assert toy.state(pid) in (State.STARTING, State.READY, State.RUNNING)
    assert pauses == [1, 2, 4]


def test_shutdown_stops_one_after_the_other_and_keeps_what_is_not_done() -> None:
    toy = Toy()
    a, b = toy.submit(steps=1000), toy.submit(steps=1000)
    toy.run(2)
    toy.do(ev.PauseAsked(b))
    toy.run(0.1)
    toy.do(ev.ShutdownAsked())
    toy.run(1)
    assert toy.core.m.workers == {}
    assert (toy.state(a), toy.proc(a).residency) == (State.WAITING, Residency.DISK)
    assert (toy.state(b), toy.proc(b).residency) == (State.PAUSED, Residency.DISK)
    checkpoint = toy.proc(a).checkpoint
    assert checkpoint is not None
    assert checkpoint["step"] > 0


def test_two_devices_work_at_the_same_time() -> None:
    toy = Toy(devices=2, capacity=100)
    a, b = toy.submit(steps=100), toy.submit(steps=100)
    toy.run(1)
    assert {toy.proc(a).device, toy.proc(b).device} == {"sim0", "sim1"}
    assert toy.state(a) is toy.state(b) is State.RUNNING


def test_the_measured_peak_replaces_the_promise() -> None:
    mib = 1024**2
    toy = Toy(capacity=10_000 * mib)
    pid = toy.submit(steps=100, nbytes=4000 * mib)
    toy.run(1)
    toy.do(ev.Measured("sim0", {pid: 1000 * mib}, 9000 * mib, 0))
    assert toy.proc(pid).memory.promised_bytes == 1164 * mib
    assert toy.proc(pid).memory.peak_bytes == 1000 * mib
    toy.do(ev.Measured("sim0", {pid: 500 * mib}, 9000 * mib, 0))
    assert toy.proc(pid).memory.promised_bytes == 1164 * mib, "the peak counts, not the moment"


def test_who_waits_too_long_for_one_device_does_not_close_another() -> None:
    toy = Toy(capacity=150, devices=2, passing_s=60.0)
    toy.submit(steps=100_000, device_wanted="sim1")
    toy.submit(nbytes=100, device_wanted="sim1")
    toy.run(61)
    elsewhere = toy.submit(nbytes=100, device_wanted="sim0")
    assert toy.state(elsewhere) is State.STARTING


def test_a_process_whose_device_went_with_an_earlier_kernel_waits_alone() -> None:
    toy = Toy()
    segments = [{"kind": "activations", "bytes": 1, "shared": ""}]
    lost, too_large, fits = (
        Process(pid, "spin", {"steps": 1, "step_s": 0.1}, "u", 0, 1.0, state=State.WAITING)
        for pid in (1, 2, 3)
    )
    lost.device_wanted = "sim9"
    lost.segments, fits.segments = segments, segments
    too_large.segments = [{**segments[0], "bytes": 10_000}]
    for proc in (lost, too_large, fits):
        toy.core.restore(proc)
    toy.core.resume_all(toy.now)
    assert (lost.state, lost.reason) == (State.WAITING, "device")
    assert (too_large.state, too_large.reason) == (State.WAITING, "memory")
    assert fits.state is State.STARTING, "neither can ever start: nobody waits behind them"


def test_steps_are_timed_without_the_load_and_counted_from_the_checkpoint() -> None:
    toy = Toy()
    pid = toy.submit(steps=1000, step_s=0.1)
    toy.run(5)
    assert toy.core.m.workers[toy.worker(pid)].step_s == pytest.approx(0.1, rel=0.01)
    assert toy.proc(pid).predicted_s == pytest.approx(95, rel=0.02)
    toy.do(ev.PauseAsked(pid, release=True))
    toy.run(1)
    toy.do(ev.ResumeAsked(pid))
    toy.run(3)
    assert toy.core.m.workers[toy.worker(pid)].step_s == pytest.approx(0.1, rel=0.01)


def test_a_deadline_sets_few_alarms() -> None:
    toy = Toy()
    pid = toy.submit(steps=100_000, step_s=0.01)
    toy.run(0.5)
    toy.do(ev.ReniceAsked(pid, deadline_at=toy.now + 1e5))
    toy.run(20)
    assert len(toy.core.m.alarms) < 50


def test_turns_do_not_fill_the_story() -> None:
    toy = Toy()
    a, _ = toy.submit(steps=10_000), toy.submit(steps=10_000)
    toy.run(60)
    told = [what for _, what, _ in toy.proc(a).story]
    assert told == ["planning", "waiting", "starting", "ready", "running", "loaded"]
    toy.submit(steps=5, cls=Class.INTERACTIVE)
    toy.run(5)
    assert "preempted" in [w for p in (1, 2) for _, w, _ in toy.proc(p).story]


def test_when_a_policy_breaks_those_that_wait_stand_in_the_order_of_the_default() -> None:
    class Backwards(Fifo):
        def place(self, job: Job) -> Place:
            if job.attained_s or len(toy.core.m.waiting) >= 3:
                raise RuntimeError("no more")
            return (-job.submitted_at,)

    toy = Toy(capacity=100, policy=Backwards())
    toy.submit(steps=10_000)
    pids = []
    for _ in range(4):
        toy.run(1)
        pids.append(toy.submit(steps=10))
    assert [r.what for r in toy.records if r.what == "policy-failed"] == ["policy-failed"]
    assert list(toy.core.m.waiting) == pids, "not the newest first, as it was"
