"""How long a training stands still for a checkpoint, and what a run loses to them.

    python tests/bench/bench_checkpoint.py [--mib 100 1000] [--every-s 5] [--seconds 30]

First the pause of one checkpoint of so much state (float32 tensors of 4 MiB), written between two
steps and beside them. Then a plain loop of matrix products over such a state (it changes all of it
in each step), without checkpoints, with them between steps, and beside steps, in turn and each for
the same time: what is lost of its steps per second. The disk is that of the temporary folder.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmos.drivers.worker.saving import Plan, Saver
from llmos.kernel.units import Interval

PIECE = 2**20  # numbers
REPEATS = 3


class Loop:
    """A state of so many bytes, all of which each step changes, beside some products."""

    def __init__(self, nbytes: int) -> None:
        torch.manual_seed(0)
        self.state = [torch.randn(1024, PIECE // 1024) for _ in range(max(1, nbytes // 4 // PIECE))]
        self.turn = torch.randn(1024, 1024) / 32
        self.steps = 0

    def step(self) -> None:
        moved = self.turn
        for _ in range(2):
            moved = torch.tanh(self.turn @ moved)
        for tensor in self.state:
            tensor.mul_(0.999).add_(moved, alpha=0.001)
        self.steps += 1

    def save(self, folder: Path) -> None:
        self.capture(lambda t: t)(folder)

    def capture(self, keep: Callable[[Any], Any]) -> Callable[[Path], None]:
        kept = {str(i): keep(t) for i, t in enumerate(self.state)}
        return lambda folder: save_file(kept, folder / "state.safetensors")


def saver(root: Path, every_s: float, copy: bool) -> Saver:
    plan = Plan(Interval(seconds=every_s), 2, copy)
    return Saver(root, plan, "cpu", lambda folder, step: None, print)


def settle(s: Saver) -> None:
    while s.busy:
        time.sleep(0.001)


def pauses(loop: Loop, root: Path, copy: bool) -> tuple[float, float]:
    """-> (median seconds that the steps wait, seconds until it is on the disk)."""
    s = saver(root, 1e9, copy)
    s.reserve(loop)
    waits, whole = [], []
    for _ in range(REPEATS):
        s.moved_on()
        loop.step()
        before, began = s.paused_s, time.perf_counter()
        if not s.beside(loop, loop.steps, lambda folder: None):
            s.between(loop.steps, loop.save)
        waits.append(s.paused_s - before)
        settle(s)
        whole.append(time.perf_counter() - began)
    shutil.rmtree(root)
    return statistics.median(waits), statistics.median(whole)


def rate(loop: Loop, root: Path, seconds: float, every_s: float, copy: bool | None) -> float:
    """Steps per second over that time; `copy` None: no checkpoints."""
    s = saver(root, every_s, bool(copy))
    s.reserve(loop)
    began, first = time.perf_counter(), loop.steps
    while time.perf_counter() - began < seconds:
        s.moved_on()
        loop.step()
        due = copy is not None and s.stepped(loop.steps)
        if due and not s.beside(loop, loop.steps, lambda folder: None):
            s.between(loop.steps, loop.save)
    found = (loop.steps - first) / (time.perf_counter() - began)
    s.end(wanted=False)
    shutil.rmtree(root, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--every-s", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "checkpoints")
        print("STATE      PAUSE BETWEEN   PAUSE BESIDE   ON DISK BETWEEN   ON DISK BESIDE")
        for mib in given.mib:
            loop = Loop(mib * 2**20)
            between, beside = (pauses(loop, root, copy) for copy in (False, True))
            print(f"{mib:5d} MiB {between[0]:12.3f} s {beside[0]:12.3f} s"
                  f" {between[1]:15.3f} s {beside[1]:14.3f} s", flush=True)  # fmt: skip
        print(f"\nsteps/s, a checkpoint every {given.every_s:g} s")
        print("STATE        PLAIN   BETWEEN    BESIDE   LOST BETWEEN   LOST BESIDE")
        for mib in given.mib:
            loop = Loop(mib * 2**20)
            loop.step()
            found: dict[bool | None, list[float]] = {None: [], False: [], True: []}
            for _ in range(given.rounds):
                for copy, rates in found.items():
                    rates.append(rate(loop, root, given.seconds, given.every_s, copy))
            plain, between_, beside_ = (statistics.mean(r) for r in found.values())
            print(f"{mib:5d} MiB {plain:8.2f}  {between_:8.2f}  {beside_:8.2f}"
                  f" {1 - between_ / plain:13.1%} {1 - beside_ / plain:13.1%}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
