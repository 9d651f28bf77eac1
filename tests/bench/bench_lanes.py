"""Two trainings on two cores: in turns, side by side on a core each, or with one thread each.

    python tests/bench/bench_lanes.py [--seconds 6] [--rounds 3]

A training's threads are part of its arithmetic, so two of them can be side by side in two ways:
each bound to one core with both of its threads (waiting passively for each other), or started with
one thread. Printed is the sum of their throughputs over that of one with the whole machine; 1 is
what taking turns gives. The regimes of a round follow each other, so that noise hits all alike.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time

import torch

TRAINING = """
import os, sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
cores = [int(c) for c in sys.argv[2].split(",")]
os.sched_setaffinity(0, cores)
from torch import nn
torch.manual_seed(0)
width, seq, batch, vocab = 128, 128, int(sys.argv[3]), 2048
layer = lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
body = [layer() for _ in range(4)]
model = nn.Sequential(nn.Embedding(vocab, width), *body, nn.Linear(width, vocab))
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.randint(0, vocab, (batch, seq))
def step():
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
step()
print("ready", flush=True)
while True:
    step()
    print("s", end="", flush=True)
"""


class Run:
    def __init__(self, threads: int, cores: list[int], batch: int, passive: bool) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"}
        if passive:
            env |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(threads), ",".join(map(str, cores)), str(batch)],
            stdout=subprocess.PIPE, env=env, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.process.stdout.readline()
        os.set_blocking(self.process.stdout.fileno(), False)

    def steps(self) -> int:
        """How many since the last time."""
        assert self.process.stdout is not None
        return len(self.process.stdout.read() or b"")

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


def rate(runs: list[Run], seconds: float, turns: bool = False) -> float:
    """Steps per second of all together."""
    for run in runs:
        run.steps()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        if turns:
            for at, run in enumerate(runs):
                runs[1 - at].signal(signal.SIGSTOP)
                run.signal(signal.SIGCONT)
                time.sleep(0.5)
        else:
            time.sleep(0.1)
    total = sum(run.steps() for run in runs)
    return total / (time.perf_counter() - began)


def measure(
    threads: int, apart: bool, count: int, batch: int, given: argparse.Namespace,
    passive: bool = False,
) -> float:  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))[:2]
    bound = [[c] for c in cores] if apart else [cores, cores]
    runs = [Run(threads, bound[n], batch, passive) for n in range(count)]
    try:
        return rate(runs, given.seconds)
    finally:
        for run in runs:
            run.end()


def in_turns(batch: int, given: argparse.Namespace) -> float:
    cores = sorted(os.sched_getaffinity(0))[:2]
    runs = [Run(2, cores, batch, passive=False) for _ in range(2)]
    try:
        return rate(runs, given.seconds, turns=True)
    finally:
        for run in runs:
            run.end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}; sum over one with the machine")
    for batch in (2, 16):
        found: dict[str, list[float]] = {}
        for _ in range(given.rounds):
            alone = measure(2, False, 1, batch, given)
            for label, value in (
                ("in turns of 0.5 s, 2 threads each", in_turns(batch, given)),
                ("at once, 2 threads each, unbound", measure(2, False, 2, batch, given)),
                ("a core each, 2 threads each", measure(2, True, 2, batch, given)),
                ("a core each, 2 threads each, passive", measure(2, True, 2, batch, given, True)),
                ("a core each, 1 thread each", measure(1, True, 2, batch, given)),
            ):
                found.setdefault(label, []).append(value / alone)
        for label, values in found.items():
            print(f"  batch {batch:2}: {label:<38} {statistics.median(values):.2f}   "
                  f"({min(values):.2f} to {max(values):.2f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
