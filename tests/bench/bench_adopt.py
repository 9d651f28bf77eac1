"""How long nobody answers after `kill -9` of the kernel, and until all workers are adopted.

    python tests/bench/bench_adopt.py [--workers 1 10 50] [--runs 5]

A home with so many endless processes, one with the device and the others held or waiting for their
turn. The kernel is killed and started again at once; printed are, as medians: the start of an
interpreter that imports nothing (the peer), the first call that the new kernel answers, and the
moment at which every worker has shaken hands. All workers must be those of before.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmos.kernel import protocol as p
from support.real import LIMIT_S, Machine, wait_until


def rows(m: Machine) -> list[dict[str, object]]:
    return [r for r in m.ask(p.Ps()) if r["role"] == "process"]


def all_up(m: Machine, count: int) -> bool:
    states = [r["state"] for r in rows(m)]
    return len(states) == count and set(states) <= {"running", "ready", "preempted"}


def adopted(m: Machine) -> bool:
    return not m.ask(p.Status())["adopting"]


def once(m: Machine) -> tuple[float, float]:
    """-> seconds from the kill to the first answer, and to the last handshake."""
    before = sorted(str(r["worker_id"]) for r in rows(m))
    m.kill_kernel()
    began = time.perf_counter()
    m.boot()
    answered = time.perf_counter() - began
    wait_until(lambda: adopted(m), "all to be adopted")
    took = time.perf_counter() - began
    assert sorted(str(r["worker_id"]) for r in rows(m)) == before, "workers were lost"
    return answered, took


def bare_start() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-S", "-c", ""], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    bare = statistics.median(bare_start() for _ in range(args.runs))
    sys.stdout.write(f"an interpreter without anything: {bare * 1e3:.0f} ms\n")
    for count in args.workers:
        m = Machine("--device", "cpu0:memory=12GiB")
        try:
            m.boot()
            for _ in range(count):
                m.submit(steps=0, busy_ms=5)
            wait_until(lambda: all_up(m, count), f"{count} workers", LIMIT_S)  # noqa: B023
            found = [once(m) for _ in range(args.runs)]
            answered, took = (statistics.median(x) for x in zip(*found, strict=True))
            sys.stdout.write(
                f"{count:>3} workers: first answer {answered * 1e3:.0f} ms, "
                f"all adopted {took * 1e3:.0f} ms (worst {max(t for _, t in found) * 1e3:.0f})\n"
            )
            sys.stdout.flush()
        finally:
            m.dispose()


if __name__ == "__main__":
    main()
