"""Replay traces through the core in virtual time: `llmos sim` runs this.

python -P -m llmos.kernel.sim.main --devices 8xH100-80G [--policy NAME]... TRACE...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from llmos.kernel import config
from llmos.kernel.errors import BadInput, LlmosError
from llmos.kernel.settings import Settings
from llmos.kernel.sim import picture, report
from llmos.kernel.sim.devices import SimDevice, parse_devices
from llmos.kernel.sim.jobs import SimJob, Trace, in_order, scale_arrivals
from llmos.kernel.sim.traces.detect import read_trace
from llmos.kernel.sim.traces.jitter import read_jitter
from llmos.kernel.sim.traces.source import ReadOptions
from llmos.kernel.sim.world import Choices, Outcome, World
from llmos.kernel.units import parse_bytes

BROKEN_SHOWN = 3


def main(argv: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    try:
        simulate(given)
    except LlmosError as exc:
        say(f"llmos: {exc.message}")
        if exc.hint:
            say(f"  {exc.hint}")
        return 1
    return 0


def simulate(given: argparse.Namespace) -> None:
    devices = parse_devices(given.devices)
    policies = list(dict.fromkeys(given.policy or [config.Config(Path()).policy]))
    for name in policies:
        config.policy_of(config.Config(Path(), policy=name))  # a wrong name: before the work
    if given.picture:
        picture.check(given.picture)
    if given.csv:
        report.check_folder(given.csv)
    jobs = _jobs(given)
    outcomes: dict[str, Outcome] = {}
    rows = []
    for name in policies:
        outcome = outcomes[name] = _run(given, name, jobs, devices)
        rows.append(report.figures(name, outcome))
    sys.stdout.write("\n".join((*report.table(rows), "", *report.LEGEND)) + "\n")
    if given.csv:
        report.write_csv(given.csv, rows)
    if given.picture:
        title = f"{len(jobs):,} jobs on {' and '.join(given.devices)}"
        picture.draw(given.picture, outcomes, title)


def _run(
    given: argparse.Namespace, policy: str, jobs: Sequence[SimJob], devices: Sequence[SimDevice]
) -> Outcome:
    memory = parse_bytes(given.job_memory) if given.job_memory else 0
    choices = Choices(memory, given.resume_cost, given.oracle, given.check)
    configured = config.Config(Path(), policy=policy, slice_s=given.slice)
    made = config.policy_of(configured)
    settings = replace(config.settings_of(configured), passing_s=given.passing, aging_s=given.aging)
    outcome = World(jobs, devices, made, choices, settings).run()
    refused = [r for r in outcome.runs if r.refused]
    if len(refused) == len(jobs):
        raise BadInput(f"no job fits on these devices: {refused[0].refused}")
    if refused:
        why = f"can never run here, first: {refused[0].refused}"
        say(f"llmos: {policy}: {len(refused):,} jobs {why}")
    if outcome.failed_policy:
        why = outcome.failed_policy
        say(f"llmos: {policy} failed and was replaced by the default: {why}")
    return outcome


def _jobs(given: argparse.Namespace) -> list[SimJob]:
    """The jobs of all traces on one clock."""
    names = {f.name for f in fields(ReadOptions)}
    sizes = {n: parse_bytes(v) for n in ("kv_bytes", "weights_bytes") if (v := getattr(given, n))}
    told = {n: v for n, v in vars(given).items() if n in names and v is not None} | sizes
    traces = [read_trace(path, ReadOptions(**told)) for path in given.trace]
    for trace in traces:
        warn(trace)
    jobs = in_order(job for trace in traces for job in in_order(trace.jobs))
    jobs = jobs[: given.limit or None]
    if given.jitter:
        jitter = read_jitter(given.jitter, given.seed)
        jobs = [replace(j, duration_s=j.duration_s * jitter.slowdown(j.devices)) for j in jobs]
    return scale_arrivals(jobs, given.scale_arrivals)


def warn(trace: Trace) -> None:
    """Say what of a file is not used, and why."""
    for broken in trace.broken[:BROKEN_SHOWN]:
        say(f"llmos: {trace.path}:{broken.line}: left out: {broken.why}")
    if len(trace.broken) > BROKEN_SHOWN:
        say(f"llmos: {trace.path}: {len(trace.broken):,} broken rows were left out")
    for why, n in trace.left_out.items():
        say(f"llmos: {trace.path}: {n:,} rows left out: {why}")


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="llmos-sim", allow_abbrev=False)
    p.add_argument("trace", nargs="+")
    p.add_argument("--devices", action="append", required=True)
    p.add_argument("--policy", action="append")
    for name in ("csv", "picture", "job-memory", "jitter", "cluster", "throughputs", "gpu",
                 "tokens", "kv-bytes", "weights-bytes"):  # fmt: skip
        p.add_argument(f"--{name}")
    for name in ("limit", "seed"):
        p.add_argument(f"--{name}", type=int, default=0)
    for name in ("prefill-rate", "decode-rate", "requests-per-s"):
        p.add_argument(f"--{name}", type=float)
    p.add_argument("--scale-arrivals", type=float, default=1.0)
    p.add_argument("--resume-cost", type=float, default=0.0)
    p.add_argument("--passing", type=float, default=Settings().passing_s)
    p.add_argument("--aging", type=float, default=Settings().aging_s)
    p.add_argument("--slice", type=float, default=config.Config(Path()).slice_s)
    p.add_argument("--oracle", action="store_true")
    p.add_argument("--check", action="store_true")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
