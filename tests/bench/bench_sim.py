"""Simulated policies on the Philly clusters, beside recorded baselines; and how fast it goes.

    python tests/bench/bench_sim.py DATA [--policy NAME]...     DATA: philly/, baselines.csv

`blind` is the mean JCT over the best of the baselines that know no length, `srtf` over the
oracle.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import sys
import time
from pathlib import Path

from llmos.kernel import config
from llmos.kernel.process import Class
from llmos.kernel.sched import SLICE_S
from llmos.kernel.settings import Settings
from llmos.kernel.sim import report
from llmos.kernel.sim.devices import parse_devices
from llmos.kernel.sim.jobs import SimJob, in_order
from llmos.kernel.sim.traces.detect import read_trace
from llmos.kernel.sim.traces.source import ReadOptions
from llmos.kernel.sim.world import Choices, Outcome, World

CLUSTERS = {"ed69ec": 8, "103959": 22, "0e4a51": 43, "ee9e8c": 130}
BLIND = ("FIFO", "FIFO+skip", "MLFQ2", "MLFQ6", "FAIR")

# The baselines move at once and let everybody pass who fits: so does the core here.
LIKE_THE_BASELINES = Settings(
    passing_s=1e12, aging_s=1e12, min_residency_s=0.0, residency_moves=0.0
)


def run(
    jobs: list[SimJob], devices: int, policy: str, settings: Settings, slice_s: float = 0.5
) -> tuple[Outcome, float]:
    made = config.policy_of(config.Config(Path(), policy=policy, slice_s=slice_s))
    began = time.perf_counter()
    choices = Choices(oracle=policy == "sjf")
    outcome = World(jobs, parse_devices([f"{devices}xgpu-16G"]), made, choices, settings).run()
    return outcome, time.perf_counter() - began


def philly(data: Path, policies: list[str]) -> None:
    with (data / "baselines.csv").open() as file:
        known = [r for r in csv.DictReader(file) if float(r["resume_cost_s"]) == 0]
    print(f"{'cluster':8} {'policy':9} {'as':9} {'JCT':>9} {'blind':>6} {'srtf':>6} {'s':>6}")
    for cluster, devices in CLUSTERS.items():
        mean = {r["policy"]: float(r["mean_jct_s"]) for r in known
                if r["trace"] == f"philly:{cluster}"}  # fmt: skip
        blind = min(mean[p] for p in BLIND)
        options = ReadOptions(cluster=cluster)
        jobs = in_order(read_trace(str(data / "philly" / "philly.csv.gz"), options).jobs)
        for policy in policies:
            for name, settings in (("baseline", LIKE_THE_BASELINES), ("live", Settings())):
                outcome, took = run(jobs, devices, policy, settings)
                jct = report.figures(policy, outcome).jct_mean_s
                print(f"{cluster:8} {policy:9} {name:9} {jct:9.0f} {jct / blind:6.3f} "
                      f"{jct / mean['SRTF']:6.3f} {took:6.1f}", flush=True)  # fmt: skip


def speed(n: int, policy: str, memory: int, slice_s: float = 0.5) -> None:
    """Synthetic jobs at 95 % load on 64 devices, lengths lognormal; small memory: in turns."""
    rng = random.Random(0)
    lengths = [rng.lognormvariate(4, 1.5) for _ in range(n)]
    gap = math.fsum(lengths) / n / 64 / 0.95
    at, jobs = 0.0, []
    for length in lengths:
        at += rng.expovariate(1 / gap)
        jobs.append(SimJob(at, length, memory_bytes=memory))
    batch = {Class.BATCH: slice_s, Class.IDLE: slice_s}
    outcome, took = run(jobs, 64, policy, Settings(slices={**SLICE_S, **batch}), slice_s)
    each = f"{outcome.events:,} events of {took / outcome.events * 1e6:.1f} us"
    print(f"{n:,} jobs under {policy}, slices of {slice_s:g} s: {took:.1f} s, {each}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--jobs", type=int, default=100_000)
    given = parser.parse_args()
    if not given.speed_only:
        philly(given.data, given.policy or ["fifo", "las", "siblings", "sjf"])
    speed(given.jobs, "fifo", 0)
    speed(given.jobs // 20, "rr", 4_000_000_000)
    speed(given.jobs, "rr", 4_000_000_000, slice_s=10.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
