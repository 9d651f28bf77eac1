"""The simulation: schedules worked out by hand, a second scheduler to compare with, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel.errors import BadArgument
from llmos.kernel.policies.base import Policy
from llmos.kernel.policies.eevdf import Eevdf
from llmos.kernel.policies.fifo import Fifo
from llmos.kernel.policies.las import LeastAttained
from llmos.kernel.policies.rr import RoundRobin
from llmos.kernel.policies.siblings import Siblings
from llmos.kernel.policies.sjf import ShortestFirst
from llmos.kernel.process import Class
from llmos.kernel.settings import Settings
from llmos.kernel.sim import main, report
from llmos.kernel.sim.devices import parse_devices
from llmos.kernel.sim.jobs import SimJob
from llmos.kernel.sim.world import Choices, Outcome, World

NEVER = Settings(passing_s=1e12, aging_s=1e12, min_residency_s=0.0, residency_moves=0.0)


def simulate(
    jobs: list[SimJob], devices: str = "1xsim-8GiB", policy: Policy | None = None,
    choices: Choices | None = None, core: Settings = NEVER,
) -> Outcome:  # fmt: skip
    chosen = choices or Choices(check=True)
    return World(jobs, parse_devices([devices]), policy or Fifo(), chosen, core).run()


def ends(outcome: Outcome) -> list[float | None]:
    return [r.ended_at and round(r.ended_at, 6) for r in outcome.runs]


def test_first_come_first_served() -> None:
    outcome = simulate([SimJob(0, 10), SimJob(1, 5), SimJob(20, 1)])
    assert ends(outcome) == [10, 15, 21]
    found = report.figures("fifo", outcome)
    assert found.jct_mean_s == pytest.approx((10 + 14 + 1) / 3)
    assert found.utilisation == pytest.approx(16 / 21)
    assert found.wait_mean_s == pytest.approx(9 / 3)


def test_a_gang_waits_for_all_of_its_devices() -> None:
    outcome = simulate([SimJob(0, 10), SimJob(1, 5, devices=2), SimJob(2, 3)], "2xsim-8GiB")
    assert ends(outcome) == [10, 15, 5]  # the third passes the gang: one device is free


def test_moving_out_costs_a_resume() -> None:
    jobs = [SimJob(0, 100), SimJob(10, 5)]
    choices = Choices(oracle=True, resume_s=3, check=True)
    outcome = simulate(jobs, policy=ShortestFirst(), choices=choices)
    assert ends(outcome) == [108, 15]
    assert outcome.runs[0].moves == 1


def test_a_move_out_waits_for_the_end_of_a_step() -> None:
    jobs = [SimJob(0, 100, step_s=4), SimJob(10, 5)]
    outcome = simulate(jobs, policy=ShortestFirst(), choices=Choices(oracle=True, check=True))
    assert ends(outcome) == [105, 17]


def test_two_that_fit_share_the_device_in_turns() -> None:
    jobs = [SimJob(0, 10, memory_bytes=1), SimJob(0, 10, memory_bytes=1)]
    outcome = simulate(jobs, policy=RoundRobin(0.5))
    assert ends(outcome) == [19.5, 20]


@pytest.mark.parametrize("comes", [5.0, 20.0, 29.0])
@pytest.mark.parametrize(("policy", "starts"), [(LeastAttained, 60.0), (Siblings, 30.0)])
def test_who_may_displace_does_so_on_time_whenever_it_comes(
    policy: type[Policy], starts: float, comes: float
) -> None:
    jobs = [SimJob(0, 5000), SimJob(comes, 50)]
    outcome = simulate(jobs, policy=policy(), core=Settings())
    assert outcome.runs[1].started_at == pytest.approx(starts)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 200), st.integers(1, 3)), min_size=1,
             max_size=25),
    st.sampled_from([RoundRobin, LeastAttained, Siblings, Eevdf]),
)  # fmt: skip
def test_whoever_is_moved_out_and_held_at_once_comes_to_an_end(
    drawn: list[tuple[int, int, int]], policy: type[Policy]
) -> None:
    jobs = sorted(
        (SimJob(float(at), float(lasts), memory_bytes=need * 3 << 30) for at, lasts, need in drawn),
        key=lambda job: job.submit_s,
    )
    quick = Settings(min_residency_s=1.0, residency_moves=0.0)
    outcome = simulate(jobs, "2xsim-10GiB", policy(5.0), core=quick)
    assert all(run.ended_at is not None for run in outcome.runs)
    assert sum(run.ran_s for run in outcome.runs) == pytest.approx(sum(j.duration_s for j in jobs))


def test_the_interactive_preempts() -> None:
    jobs = [SimJob(0, 10, memory_bytes=1),
            SimJob(2, 1, memory_bytes=1, cls=Class.INTERACTIVE)]  # fmt: skip
    outcome = simulate(jobs)
    assert ends(outcome) == [11, 3]
    assert outcome.runs[0].holds == 1


def test_a_job_that_never_fits_is_refused_and_the_rest_runs() -> None:
    outcome = simulate([SimJob(0, 1, devices=3), SimJob(0, 2)], "2xsim-8GiB")
    assert ends(outcome) == [None, 2]
    assert "3 devices" in outcome.runs[0].refused


def test_the_finish_time_ratio_by_hand() -> None:
    outcome = simulate([SimJob(0, 10), SimJob(0, 10)])
    # The first had the device for itself though two wanted it: 10 / (10 x 2). The second:
    # twice as long as alone, while 1.5 devices were wanted on average: 20 / (10 x 1.5).
    assert report.finish_time_ratios(outcome.runs, 1) == pytest.approx([0.5, 20 / 15])


def reference_fifo(jobs: list[SimJob], devices: int) -> list[float]:
    """First come, first served, who does not fit is passed. Another way to the same ends."""
    running: list[tuple[float, int]] = []  # end, job
    waiting: list[int] = []
    found = [0.0] * len(jobs)
    come = 0
    free = devices
    while come < len(jobs) or running:
        arrival = jobs[come].submit_s if come < len(jobs) else float("inf")
        end = min(running)[0] if running else float("inf")
        now = min(arrival, end)
        if end <= arrival:
            _, job = min(running)
            running.remove(min(running))
            free += jobs[job].devices
            found[job] = now
        else:
            waiting.append(come)
            come += 1
        for job in list(waiting):
            if jobs[job].devices <= free:
                free -= jobs[job].devices
                waiting.remove(job)
                running.append((now + jobs[job].duration_s, job))
    return found


@st.composite
def some_jobs(draw: st.DrawFn) -> list[SimJob]:
    """No two things happen at the same moment: their order would be a matter of taste."""
    n = draw(st.integers(1, 12))
    gaps = draw(st.lists(st.integers(1, 20), min_size=n, max_size=n))
    lengths = draw(st.lists(st.integers(1, 40), min_size=n, max_size=n))
    gangs = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    at, jobs = 0.0, []
    for k in range(n):
        at += gaps[k]
        jobs.append(SimJob(at + k * 0.001, lengths[k] + k * 0.0371, gangs[k]))
    return jobs


@pytest.mark.slow
@given(some_jobs())
@settings(max_examples=60, deadline=None)
def test_fifo_agrees_with_another_scheduler(jobs: list[SimJob]) -> None:
    assert ends(simulate(jobs, "3xsim-8GiB")) == pytest.approx(reference_fifo(jobs, 3), abs=1e-5)


@pytest.mark.slow
@given(some_jobs())
@settings(max_examples=20, deadline=None)
def test_a_simulation_is_the_same_twice(jobs: list[SimJob]) -> None:
    choices = Choices(oracle=True, resume_s=1.0)
    first, second = (simulate(jobs, "3xs-1GiB", ShortestFirst(), choices) for _ in range(2))
    assert ends(first) == ends(second)


@pytest.mark.parametrize("spec", ["", "8", "8xH100", "0xH100-80G", "8xH100-lots", "2xs-0G"])
def test_devices_that_make_no_sense(spec: str) -> None:
    with pytest.raises(BadArgument):
        parse_devices([spec])


def test_groups_of_devices() -> None:
    found = parse_devices(["2xH100-80G", "sim-8GiB"])
    assert [d.name for d in found] == ["h100-0", "h100-1", "sim-0"]
    assert [d.capacity_bytes for d in found] == [80 << 30] * 2 + [8 << 30]


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("submit_s,duration_s\n0,10\nx,1\n1,5\n")
    argv = ["--devices", "1xs-1GiB", "--policy", "fifo", "--policy", "rr"]
    figures, picture = tmp_path / "f.csv", tmp_path / "p.png"
    argv += [f"--csv={figures}", f"--picture={picture}", str(trace)]
    assert main.main(argv) == 0
    shown = capsys.readouterr()
    assert shown.err == f"llmos: {trace}:3: left out: submit_s is 'x', not a number\n"
    times, shares, legend = shown.out.split("\n\n")
    for part in (times, shares):
        assert [line.split()[0] for line in part.splitlines()] == ["policy", "fifo", "rr"]
    assert "worst ratio" in shares
    assert "worst ratio" in legend
    assert len(figures.read_text().splitlines()) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--policy", "fifi"], "there is no policy 'fifi'"),
        (["--csv", "/nowhere/x.csv"], "cannot write /nowhere/x.csv"),
        (["--devices", "x"], "'x' says no devices"),
        (["--job-memory", "2GiB"], "no job fits on these devices"),
    ],
)
def test_errors_are_one_line(
    extra: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("submit_s,duration_s\n0,10\n")
    assert main.main(["--devices", "1xs-1GiB", *extra, str(trace)]) == 1
    assert said in capsys.readouterr().err.splitlines()[0]
