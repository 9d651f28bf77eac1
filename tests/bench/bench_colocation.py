"""A generation beside a training: what each costs the other, and that no bit changes.

    python tests/bench/bench_colocation.py MODEL TEXT [--steps 150] [--tokens 100] [--runs 5]

MODEL is a folder of a causal LM (stories15M), TEXT a text to pretrain on (tinyshakespeare). In one
run: the generation alone; a training alone to its end; the same training with `--runs` generations
in the middle of it. Printed: request to the trainer being held, first token, time per token alone
and beside, and whether the final weights of both trainings are the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from llmos.shell import Client
from llmos.shell.home import Home
from llmos.shell.launch import boot, wait_gone

TRAINING: dict[str, Any] = {"width": 128, "layers": 2, "context": 128, "batch": 16, "seed": 7}


def generate(client: Client, model: str, tokens: int) -> tuple[float, list[float]]:
    """-> seconds to the first token, and the gaps between the tokens."""
    began = time.perf_counter()
    moments = [
        time.perf_counter()
        for _ in client.run(model, "Once upon a time", max_tokens=tokens, temperature=0.0)
    ]
    return moments[0] - began, [b - a for a, b in itertools.pairwise(moments)]


def digest(home: Path, name: str) -> str:
    return hashlib.sha256((home / "models" / name / "model.safetensors").read_bytes()).hexdigest()


def show(label: str, gaps: list[float]) -> None:
    gaps = sorted(gaps)
    p50, p99 = gaps[len(gaps) // 2] * 1e3, gaps[int(len(gaps) * 0.99)] * 1e3
    print(f"{label:<34} {p50:6.1f} ms median   {p99:6.1f} ms p99   ({len(gaps)} gaps)")


def hold_times(client: Client, victim: int) -> list[float]:
    """Decision to take the device -> the driver says it is free, by the kernel's record."""
    taken, times = 0.0, []
    for event in client.events():
        if event["pid"] == victim and event["what"] == "preempted":
            taken = event["at"]
        elif event["pid"] == victim and event["what"] == "held" and taken:
            times.append(event["at"] - taken)
            taken = 0.0
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers "
          f"{transformers.__version__}")  # fmt: skip
    home = Path(tempfile.mkdtemp(prefix="l", dir="/tmp"))
    status = boot(Home(home))
    try:
        with Client(home) as client:
            measure(client, home, given)
            client.shutdown()
        wait_gone(status["kernel"]["os_pid"], 60)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def measure(client: Client, home: Path, given: argparse.Namespace) -> None:
    model = os.path.abspath(given.model)
    training = {**TRAINING, "data": os.path.abspath(given.text), "steps": given.steps}
    cold, _ = generate(client, model, 5)
    print(f"{'first token, zygote and model cold':<34} {cold * 1e3:6.0f} ms")
    firsts, alone = [], []
    for _ in range(given.runs):
        first, gaps = generate(client, model, given.tokens)
        firsts.append(first)
        alone += gaps
    print(f"{'first token, model loaded':<34} {statistics.median(firsts) * 1e3:6.0f} ms median")
    show("gap between tokens, alone", alone)

    began = time.perf_counter()
    client.wait(client.submit("pretrain", {**training, "out": "calm"}))
    calm_s = time.perf_counter() - began

    began = time.perf_counter()
    pid = client.submit("pretrain", {**training, "out": "stormy"})
    stream = client.attach(pid)
    while next(stream)["kind"] != "progress":
        pass
    firsts, beside, taken_s = [], [], 0.0
    for _ in range(given.runs):
        start = time.perf_counter()
        first, gaps = generate(client, model, given.tokens)
        taken_s += time.perf_counter() - start
        firsts.append(first)
        beside += gaps
    client.wait(pid)
    stormy_s = time.perf_counter() - began
    process = client.process(pid)
    holds = hold_times(client, pid)
    print(
        f"{'first token, beside a training':<34} {statistics.median(firsts) * 1e3:6.0f} ms median"
    )
    show("gap between tokens, beside", beside)
    print(f"{'trainer off the device after':<34} {statistics.median(holds) * 1e3:6.2f} ms median   "
          f"{max(holds) * 1e3:6.2f} ms worst   ({len(holds)} preemptions)")  # fmt: skip
    kept = calm_s / max(1e-9, stormy_s - taken_s)
    print(f"{'training kept, of the time left':<34} {kept:6.2f}   ({calm_s:.1f} s alone; "
          f"{stormy_s:.1f} s with {taken_s:.1f} s of generations; "
          f"device time {process['device_seconds']:.1f} s)")  # fmt: skip
    same = digest(home, "calm") == digest(home, "stormy")
    print(f"{'final weights bit-identical':<34} {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
