"""Kill -9 of a worker, of the zygote and of the kernel: who dies, who goes on, to which bits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llmos.kernel import protocol as p
from support.real import Machine, is_stopped, machine, wait_until

pytestmark = [pytest.mark.fault, pytest.mark.slow]

STEPS, BUSY_MS = 80, 8.0


@pytest.fixture(scope="module")
def m() -> Iterator[Machine]:
    """One machine for all: whoever is killed, it must be whole again for the next."""
    with machine("--device", "cpu0:memory=2GiB") as made:
        yield made


Curve = list[tuple[int, float]]


def curve(m: Machine, pid: int) -> Curve:
    """The checksum of the state after each step, in the order of the records."""
    return [(r["step"], r["metrics"]["checksum"]) for r in m.records(pid)]


@pytest.fixture(scope="module")
def undisturbed(m: Machine) -> Curve:
    """What the run comes to when nobody touches it."""
    pid = m.submit(steps=STEPS, busy_ms=0.1, seed=3)
    assert m.end_of(pid)["exit_status"] == 0
    return curve(m, pid)


def run(m: Machine, **more: Any) -> int:
    return m.submit(steps=STEPS, busy_ms=BUSY_MS, seed=3, **more)


def check_whole(m: Machine, pid: int, undisturbed: Curve) -> None:
    """No step lost, none doubled, the same bits in each."""
    ended = m.end_of(pid)
    assert ended["exit_status"] == 0, ended
    restored = [r["step"] for r in m.records(pid, "restored")]
    for record, calm in zip(curve(m, pid), undisturbed, strict=True):
        assert record == calm, f"the first that differs; restored at {restored}"
    assert ended["result"]["checksum"] == undisturbed[-1][1]


def test_a_killed_worker_takes_only_its_own_process_with_it(m: Machine, undisturbed: Curve) -> None:
    victim, other = run(m), run(m)
    m.until_step(victim, 2)
    os.kill(m.worker_of(victim), signal.SIGKILL)
    ended = m.end_of(victim)
    assert ended["exit_status"] == 137
    assert "SIGKILL" in ended["reason"]
    check_whole(m, other, undisturbed)


def test_a_held_worker_can_be_killed_from_outside(m: Machine) -> None:
    pid = run(m)
    m.until_step(pid, 2)
    m.ask(p.Pause(pid))
    worker = m.worker_of(pid)
    assert is_stopped(worker)
    os.kill(worker, signal.SIGKILL)
    assert m.end_of(pid)["exit_status"] == 137


def test_a_killed_worker_is_restarted_from_its_checkpoint(m: Machine, undisturbed: Curve) -> None:
    pid = run(m, restart="on-failure")
    m.until_step(pid, 5)
    saved = m.ask(p.Checkpoint(pid))["step"]
    m.until_step(pid, saved + 5)
    os.kill(m.worker_of(pid), signal.SIGKILL)
    ended = m.end_of(pid)
    assert (ended["exit_status"], ended["result"]["checksum"]) == (0, undisturbed[-1][1])
    assert m.row(pid)["restarts"] == 1
    assert [r["step"] for r in m.records(pid, "restored")] == [saved]


def test_a_stopped_process_goes_on_to_the_same_bits(m: Machine, undisturbed: Curve) -> None:
    """Paused in the middle of a step, and resumed: SIGSTOP changes no bit."""
    pid = run(m)
    for step in (3, 15, 40):
        m.until_step(pid, step)
        m.ask(p.Pause(pid))
        assert is_stopped(m.worker_of(pid))
        m.ask(p.Resume(pid))
    check_whole(m, pid, undisturbed)


def test_a_killed_kernel_is_followed_by_one_that_adopts_the_running_worker(
    m: Machine, undisturbed: Curve
) -> None:
    pid = run(m)
    m.until_step(pid, 10)
    worker, zygote, id_ = m.worker_of(pid), m.zygote, m.row(pid)["worker_id"]
    m.kill_kernel()
    m.boot()
    wait_until(lambda: m.row(pid)["state"] == "running", "the worker to go on")
    assert m.worker_of(pid) == worker
    assert m.row(pid)["worker_id"] == id_
    assert m.zygote == zygote, "the zygote is adopted too"
    check_whole(m, pid, undisturbed)


def test_a_killed_kernel_is_followed_by_one_that_adopts_the_held_workers(
    m: Machine, undisturbed: Curve
) -> None:
    runs, paused = run(m), run(m)
    for pid in (runs, paused):
        m.until_step(pid, 3)
    m.ask(p.Pause(paused))
    workers = {pid: m.worker_of(pid) for pid in (runs, paused)}
    assert is_stopped(workers[paused])
    m.kill_kernel()
    m.boot()
    check_whole(m, runs, undisturbed)
    assert m.row(paused)["state"] == "paused", "a person's pause outlives the kernel"
    wait_until(lambda: is_stopped(workers[paused]), "the paused worker to be held again")
    m.ask(p.Resume(paused))
    check_whole(m, paused, undisturbed)


@pytest.mark.long
def test_a_run_that_ends_while_no_kernel_is_there_is_not_lost(
    m: Machine, undisturbed: Curve
) -> None:
    pid = run(m)
    m.until_step(pid, STEPS - 40)
    worker = m.worker_of(pid)
    m.kill_kernel()
    wait_until(lambda: not os.path.exists(f"/proc/{worker}"), "the run to end alone")
    m.boot()
    check_whole(m, pid, undisturbed)


def test_a_worker_killed_while_no_kernel_is_there_is_told_by_its_signal(m: Machine) -> None:
    pid = run(m)
    m.until_step(pid, 3)
    worker = m.worker_of(pid)
    m.kill_kernel()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{worker}"), "the zygote to reap it")
    m.boot()
    assert m.end_of(pid)["exit_status"] == 137


@pytest.mark.long
def test_a_killed_zygote_is_replaced_and_its_workers_go_on(m: Machine, undisturbed: Curve) -> None:
    pid = run(m)
    m.until_step(pid, 5)
    worker, zygote = m.worker_of(pid), m.zygote
    os.kill(zygote, signal.SIGKILL)
    check_whole(m, pid, undisturbed)
    assert not os.path.exists(f"/proc/{worker}")
    # What is asked of the new one while it comes up is answered when it is up.
    assert m.end_of(m.submit(steps=1))["exit_status"] == 0
    assert m.zygote != zygote


@pytest.mark.long
def test_a_worker_that_dies_after_its_zygote_is_still_accounted_for(m: Machine) -> None:
    pid = run(m)
    m.until_step(pid, 2)
    worker = m.worker_of(pid)
    os.kill(m.zygote, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    assert m.end_of(pid)["exit_status"] == 137
    wait_until(m.zygote_is_ready, "a new zygote")


@pytest.mark.long
def test_a_plan_that_its_zygote_does_not_live_to_make_is_answered(m: Machine) -> None:
    """The client hears of it, or the new zygote makes the plan: it never waits for ever."""
    wait_until(m.zygote_is_ready, "the zygote")
    zygote = m.zygote
    os.kill(zygote, signal.SIGSTOP)

    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(m.submit(steps=1, memory_bytes=4711))
        except Exception as exc:  # noqa: BLE001  whatever it is, it is the answer
            answers.append(exc)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: "planning" in m.ask(p.Status())["processes"], "the plan to be asked for")
    os.kill(zygote, signal.SIGKILL)
    asking.join(60)
    assert answers, "the client still waits"
    if isinstance(answers[0], int):
        assert m.end_of(answers[0])["exit_status"] == 0
    else:
        assert "zygote" in str(answers[0])
    wait_until(m.zygote_is_ready, "a new zygote")


def test_what_is_killed_in_the_moment_it_starts_is_gone(m: Machine) -> None:
    for _ in range(3):
        pid = m.submit(steps=100_000)
        assert m.ask(p.Kill(pid, 15))["exit_status"] == 143
    wait_until(lambda: not [r for r in m.ask(p.Ps()) if r["role"] == "process"], "all to be gone")


@pytest.mark.long
def test_the_terminating_signal_is_a_shutdown_after_which_a_boot_goes_on(
    m: Machine, undisturbed: Curve
) -> None:
    pid = run(m)
    m.until_step(pid, 5)
    assert m.process is not None
    m.process.terminate()
    assert m.process.wait(60) == 0
    m.check_nobody_is_left()
    m.boot()
    check_whole(m, pid, undisturbed)


def test_nothing_of_a_dead_worker_stays_in_the_home(m: Machine) -> None:
    wait_until(lambda: not [r for r in m.ask(p.Ps()) if r["role"] == "process"], "all to be gone")
    assert os.listdir(m.home / "w") == []


def states_of(m: Machine, pids: list[int]) -> list[int]:
    """The OS pids of the workers of some processes."""
    return [m.worker_of(pid) for pid in pids]


@pytest.mark.long
def test_workers_that_no_kernel_comes_for_wait_at_a_safepoint(undisturbed: Curve) -> None:
    """One was held, one ran: both write a checkpoint, wait, and end at the same bits."""
    with machine("--device", "cpu0:memory=2GiB", config="alone_s = 1") as m:
        # Long enough to be met in the middle, however fast the machine is.
        pids = [m.submit(steps=STEPS, busy_ms=60, seed=3) for _ in range(2)]
        for pid in pids:
            m.until_step(pid, 3)
        workers = states_of(m, pids)
        m.kill_kernel()
        for pid in pids:
            note = m.home / "procs" / str(pid) / "stream"
            wait_until(lambda f=note: b"no kernel: waits at step" in f.read_bytes(), "it to wait")
        assert not any(map(is_stopped, workers))
        m.boot()
        for pid in pids:
            check_whole(m, pid, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("kernel_too", [False, True])
def test_the_death_of_the_zygote_leaves_nobody_frozen_and_nobody_free(
    undisturbed: Curve, kernel_too: bool
) -> None:
    with machine("--device", "cpu0:memory=2GiB", config="alone_s = 1") as m:
        paused, runs = run(m), run(m)
        m.until_step(paused, 2)
        m.ask(p.Pause(paused))
        worker = m.worker_of(paused)
        step = m.step(paused)
        os.kill(m.zygote, signal.SIGKILL)
        if kernel_too:
            m.kill_kernel()
            wait_until(lambda: not is_stopped(worker), "it to be let go")
            m.boot()
        wait_until(lambda: is_stopped(worker), "it to be held again")
        check_whole(m, runs, undisturbed)
        assert m.row(paused)["state"] == "paused"
        if not kernel_too:
            assert m.step(paused) <= step + 1
        m.ask(p.Resume(paused))
        check_whole(m, paused, undisturbed)


@pytest.mark.long
def test_a_kernel_that_follows_at_once_waits_for_the_zygote_of_the_one_before() -> None:
    with machine("--device", "cpu0:memory=2GiB") as m:
        for _ in range(3):  # before the first has loaded
            m.kill_kernel()
            m.boot()
        wait_until(m.zygote_is_ready, "a zygote")

        def zygotes() -> list[int]:
            return [p for p, who in m._who().items() if "drivers.worker.zygote" in who]

        wait_until(lambda: zygotes() == [m.zygote], "whoever came second to have ended")
        assert m.end_of(m.submit(steps=1))["exit_status"] == 0
