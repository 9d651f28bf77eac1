"""A stream of tokens that does not end beside a training: without and with the share of batch.

    python tests/bench/bench_share.py MODEL TEXT [--seconds 20] [--rounds 6]

MODEL is a folder of a causal LM (stories15M), TEXT a text to pretrain on. One client generates
again and again, with `batch_share = 0` and 0.05, in rounds: the training paused, then beside it.
Printed: the gaps between tokens (p50, p99, p99.9), gaps of more than 0.3 s, and what part of the
device the training had. The gap between two generations is not one between tokens.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmos.shell import Client
from llmos.shell.home import Home
from llmos.shell.launch import boot, wait_gone

TRAINING: dict[str, Any] = {
    "width": 128,
    "layers": 2,
    "context": 128,
    "batch": 16,
    "steps": 100_000,
}
SETTLES_S = 60.0  # the share is an average over so long
BROKEN_S = 0.3  # a gap of this length was a turn of the training


def stream(client: Client, model: str, seconds: float) -> list[float]:
    """Gaps between the tokens of generations that follow each other."""
    gaps: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        moments = [
            time.perf_counter()
            for _ in client.run(model, "Once upon a time", max_tokens=200, temperature=0.8)
        ]
        gaps += [b - a for a, b in itertools.pairwise(moments)]
    return gaps


def show(label: str, gaps: list[float]) -> None:
    p50, p99, p999 = (percentile(gaps, q) * 1e3 for q in (0.5, 0.99, 0.999))
    broken = sum(g > BROKEN_S for g in gaps)
    print(f"{label:<24} {p50:6.1f} ms p50 {p99:7.1f} p99 {p999:7.1f} p99.9   "
          f"{broken} of {len(gaps)} gaps above {BROKEN_S} s", flush=True)  # fmt: skip


def percentile(gaps: list[float], q: float) -> float:
    return sorted(gaps)[int(len(gaps) * q)]


def measure(share: float, given: argparse.Namespace) -> None:
    home = Path(tempfile.mkdtemp(prefix="l", dir="/tmp"))
    (home / "config.toml").write_text(f"batch_share = {share}\n")
    status = boot(Home(home))
    alone: list[float] = []
    beside: list[float] = []
    had = took = 0.0
    try:
        with Client(home) as client:
            model = os.path.abspath(given.model)
            stream(client, model, 1.0)  # the engine loads
            training = {**TRAINING, "data": os.path.abspath(given.text), "out": "beside"}
            pid = client.submit("pretrain", training)
            records = client.attach(pid)
            while next(records)["kind"] != "progress":
                pass
            if share:
                stream(client, model, SETTLES_S)  # what it had alone counts until then
            for _ in range(given.rounds):
                client.pause(pid)
                alone += stream(client, model, given.seconds)
                client.resume(pid)
                before, began = client.process(pid)["device_seconds"], time.perf_counter()
                beside += stream(client, model, given.seconds)
                had += client.process(pid)["device_seconds"] - before
                took += time.perf_counter() - began
            show("alone", alone)
            show(f"beside, share {share:g}", beside)
            ratio = percentile(beside, 0.99) / percentile(alone, 0.99)
            print(f"{'':<24} p99 beside / alone: {ratio:.2f}; the training had "
                  f"{had / took:.1%} of the device")  # fmt: skip
            client.kill(pid)
            client.shutdown()
        wait_gone(status["kernel"]["os_pid"], 60)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for share in (0.0, 0.05):
        measure(share, given)


if __name__ == "__main__":
    main()
