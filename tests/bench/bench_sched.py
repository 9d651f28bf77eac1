"""What scheduling costs, and how fair it is. No torch, no worker: the core with plain events.

    python tests/bench/bench_sched.py [--seconds 600]

1. Cost of a pick, of an admission and of ordering the whole line anew, with 100, 10,000 and
   100,000 processes.
2. Share error: eight processes of mixed nice with steps from 3 ms to 0.5 s on one device, over
   windows of 60 s and 10 s of virtual time, against their weights.
3. Finish-time ratio under `eevdf`: a process's time to its end over what it would have had with
   its equal share all the time (Themis, NSDI 2020), on random jobs that arrive over time.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable

from llmos.kernel.ledger import Ledger
from llmos.kernel.line import Line, Need
from llmos.kernel.policies.base import Job
from llmos.kernel.policies.eevdf import Eevdf, Shares
from llmos.kernel.process import Class, weight_of
from llmos.kernel.sched import DeviceQueue

SIZES = (100, 10_000, 100_000)


def timed(what: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call, sorted."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        what()
        took.append(time.perf_counter() - began)
    return sorted(took)


def show(label: str, took: list[float], unit: str = "us") -> None:
    scale = {"us": 1e6, "ms": 1e3}[unit]
    p50, p99 = took[len(took) // 2] * scale, took[int(len(took) * 0.99)] * scale
    print(f"  {label:<34} {p50:9.1f} {unit} median {p99:9.1f} {unit} p99")


def costs(count: int) -> None:
    rng = random.Random(7)
    print(f"{count:,} processes")
    turns = Shares(0.5)
    for n in range(count):
        weight = float(weight_of(rng.randint(-10, 10)))
        turns.add(Job(f"w{n}", weight, f"u{n % 7}", request_s=rng.uniform(0.01, 0.5)))

    def pick() -> None:
        key = turns.pick()
        assert key is not None
        turns.charge(key, turns.left_s(key))

    show("pick the next, charge it (eevdf)", timed(pick, 20_000))

    line, ledger = Line(), Ledger()
    for n in range(64):
        ledger.add_device(f"d{n}", "sim", 80 * 2**30)
    for n in range(count):
        need = rng.choice((1, 2, 4, 8, 16)) * 2**30
        line.add(n, 1, (rng.random(),), Need(need))
    segments = [{"kind": "weights", "bytes": 2**30, "shared": ""}]
    pid = iter(range(count, 10**9))

    def admit() -> None:
        """One comes, the line is passed over once, it gets its memory; another's comes free."""
        new = next(pid)
        line.add(new, 1, (rng.random() / 1e6,), Need(2**30))
        for head in line.heads():
            found = ledger.with_free(2**30)
            if found:
                line.pop(head)
                ledger.reserve((found[0],), head, segments)
                ledger.release(head)
                break

    show("enter, pass over the line, admit", timed(admit, 5_000))
    places = {n: (rng.random(),) for n in line}
    show("order the whole line anew", timed(lambda: line.rebuild(places), 5), "ms")


def share_error(seconds: float) -> None:
    nices = (-10, -5, 0, 0, 3, 5, 10, 15)
    steps = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5)
    q = DeviceQueue("d", 0.0)
    for n, (nice, step_s) in enumerate(zip(nices, steps, strict=True)):
        q.enqueue(str(n), Class.BATCH, nice)
        q.predict(str(n), step_s)
    weights = [weight_of(nice) for nice in nices]
    marks: list[tuple[float, list[float]]] = []
    got, now = [0.0] * len(nices), 0.0
    hold = random.Random(3)
    while now < seconds:
        for charge in q.charge(now):
            got[int(charge.worker_id)] += charge.seconds
        marks.append((now, got.copy()))
        for decision in q.decide(now):
            if decision.what == "hold":
                now += hold.uniform(0.0004, 0.004)  # what a hold takes, measured
                for charge in q.charge(now):
                    got[int(charge.worker_id)] += charge.seconds
                q.released(decision.worker_id)
                q.decide(now)
        wake = q.wake_at()
        assert wake is not None
        now = max(wake, now)
    for window in (60.0, 10.0):
        worst = worst_error(marks, weights, window)
        print(f"  share error over windows of {window:2.0f} s: worst {worst:.2%} of the device")


def worst_error(
    marks: list[tuple[float, list[float]]], weights: list[int], window_s: float
) -> float:
    worst, start = 0.0, 0
    for now, got in marks:
        while marks[start + 1][0] <= now - window_s:
            start += 1
        since, before = marks[start]
        if now - since < window_s * 0.99:
            continue
        for n, weight in enumerate(weights):
            share = (got[n] - before[n]) / (now - since)
            worst = max(worst, abs(share - weight / sum(weights)))
    return worst


def finish_times(jobs: int, seed: int) -> list[float]:
    """Jobs on one device under eevdf -> time to the end over that of an exact equal share."""
    rng = random.Random(seed)
    arrive = sorted(rng.uniform(0, 20.0 * jobs) for _ in range(jobs))
    length = [rng.lognormvariate(3.0, 1.0) for _ in range(jobs)]
    fair = ideal(arrive, length)
    q = DeviceQueue("d", 0.0, Eevdf(0.5))
    left, ended, now, next_job = dict[str, float](), dict[int, float](), 0.0, 0
    while len(ended) < jobs:
        for charge in q.charge(now):
            left[charge.worker_id] -= charge.seconds
        for key in [k for k, s in left.items() if s <= 1e-9]:
            del left[key]
            ended[int(key)] = now
            q.released(key)
            q.forget(key)
        while next_job < jobs and arrive[next_job] <= now + 1e-9:
            left[str(next_job)] = length[next_job]
            q.enqueue(str(next_job), Class.BATCH, 0)
            next_job += 1
        for decision in q.decide(now):
            if decision.what == "hold":
                q.released(decision.worker_id)
                q.decide(now)
        moments = [arrive[next_job]] if next_job < jobs else []
        if q.lease is not None:
            moments.append(now + left[q.lease.worker_id])
            wake = q.wake_at()
            moments += [wake] if wake is not None else []
        now = max(now, min(moments, default=now))
    return [(ended[n] - arrive[n]) / fair[n] for n in range(jobs)]


def ideal(arrive: list[float], length: list[float]) -> list[float]:
    """Seconds from arrival to end under exact processor sharing."""
    left, ended, now, n = dict[int, float](), dict[int, float](), 0.0, 0
    while len(ended) < len(arrive):
        until = arrive[n] if n < len(arrive) else float("inf")
        if left:
            until = min(until, now + min(left.values()) * len(left))
        for k in left:
            left[k] -= (until - now) / len(left)
        now = until
        for k in [k for k, s in left.items() if s <= 1e-9]:
            ended[k] = now - arrive[k]
            del left[k]
        if n < len(arrive) and arrive[n] <= now:
            left[n] = length[n]
            n += 1
    return [ended[k] for k in range(len(arrive))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600.0, help="of virtual time, for shares")
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for count in SIZES:
        costs(count)
    print("fairness")
    share_error(given.seconds)
    ratios = [r for seed in range(20) for r in finish_times(60, seed)]
    unfair = sum(r > 1.2 for r in ratios) / len(ratios)
    print(f"  finish-time ratio, {len(ratios)} jobs: median {statistics.median(ratios):.3f}, "
          f"worst {max(ratios):.3f}, above 1.2: {unfair:.2%}")  # fmt: skip


if __name__ == "__main__":
    main()
