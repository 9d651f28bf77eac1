"""Random admissions into little memory: does anybody run out of it, and is too much promised?

    python tests/bench/bench_admission.py [--processes 1000] [--memory 2GiB] [--seed 0]

One kernel with `cpu0:memory=...`; processes of all kinds and shapes, drawn from a seed, a dozen at
a time: language models of all families pretrained and fine-tuned (whole, and LoRA), GANs, requests
to engines, commands that take what they declared. The private memory of each worker is read ten
times a second, beside the kernel's own books.

    beyond = max(0, promised at admission - (peak + 10 % + 64 MiB)), over the sum of (peak + ...)

"out of memory" counts processes that ended so, or that the system killed; "went back in line" those
that outgrew their promise and were started again.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_footprint import make_material

from llmos.drivers.cpu import procfs
from llmos.kernel.errors import LlmosError
from llmos.shell import Client
from llmos.shell.home import Home
from llmos.shell.launch import boot, wait_gone
from support.live import short_home
from support.real import has_socket

MIB = 1 << 20
AT_ONCE = 12
SAMPLE_S = 0.1
OUT_OF_MEMORY = "out-of-memory"

# A command that takes what it says, touches it, and stays for a moment.
TAKES = "import sys, time; held = bytearray(b'1') * int(sys.argv[1]); time.sleep(0.3)"


@dataclass
class Life:
    """What was seen of a process."""

    kind: str
    promised: int = 0
    peak: int = 0
    end: dict[str, Any] = field(default_factory=dict)
    grown: bool = False  # it outgrew its promise and went back in line

    @property
    def needed(self) -> int:
        return int(self.peak * 1.1) + 64 * MIB

    @property
    def code(self) -> str:
        error = (self.end.get("result") or {}).get("error") or {}
        return str(error.get("code", ""))


def draw(rng: random.Random, folder: Path, number: int) -> tuple[str, dict[str, Any]]:
    """A program and its arguments."""
    text, out, steps = str(folder / "text.txt"), f"made{number}", rng.randint(2, 6)
    kind = rng.choice(["pretrain", "pretrain", "finetune", "finetune", "gan", "infer", "exec"])
    if kind == "pretrain":
        width = rng.choice([64, 128, 192])
        return kind, {
            "data": text, "tokenizer": str(folder / "tokenizer"), "out": out, "steps": steps,
            "arch": rng.choice(["transformer", "transformer", "rnn", "lstm", "gru"]),
            "width": width, "heads": 4, "layers": rng.randint(1, 4),
            "batch": rng.choice([2, 4, 8, 16, 24]), "context": rng.choice([32, 64, 128, 192]),
            "optimizer": rng.choice(["adamw", "sgd", "adamw8bit"]), "val_fraction": 0.01,
            "dtype": rng.choice(["float32", "bfloat16"]),
        }  # fmt: skip
    if kind == "finetune":
        return kind, {
            "model": str(folder / rng.choice(["llama", "gpt2"])), "data": text, "out": out,
            "steps": steps, "batch": rng.choice([1, 2, 4, 8]), "val_fraction": 0.01,
            "context": rng.choice([32, 64, 128]), "dtype": rng.choice(["float32", "bfloat16"]),
            "method": rng.choice(["full", "lora"]),
            "gradient_checkpointing": rng.random() < 0.3,
        }  # fmt: skip
    if kind == "gan":
        return kind, {
            "data": str(folder / "images.npz"), "out": out, "steps": steps,
            "width": rng.choice([16, 32, 64]), "batch": rng.choice([16, 64, 128]),
        }  # fmt: skip
    if kind == "infer":
        return kind, {"model": str(folder / rng.choice(["llama", "wide", "gpt2", "lstm"])),
                      "prompt": "One day " * rng.randint(1, 60), "max_tokens": 20}  # fmt: skip
    nbytes = rng.randint(20, 800) * MIB
    command = [sys.executable, "-c", TAKES, str(nbytes)]
    return kind, {"command": command, "memory": f"{nbytes // MIB + 24}MiB"}


class Workers:
    """Which OS processes belong to a worker, from the system."""

    def __init__(self, home: Path, zygote: int) -> None:
        self._home, self._zygote = home, zygote
        self._found: dict[str, int] = {}

    def private(self, worker_id: str) -> int:
        """Private bytes of a worker and of what it started; 0 when it is gone."""
        os_pid = self._found.get(worker_id) or self._find(worker_id)
        if not os_pid:
            return 0
        try:
            return sum(procfs.private_bytes(pid) for pid in procfs.children(os_pid))
        except OSError:
            return 0

    def _find(self, worker_id: str) -> int:
        path = self._home / "w" / worker_id / "sock"
        found = (p for p in procfs.children(self._zygote) if has_socket(p, path))
        self._found[worker_id] = next(found, 0)
        return self._found[worker_id]


def run(given: argparse.Namespace, folder: Path, home: Path) -> dict[int, Life]:
    rng = random.Random(given.seed)
    lives: dict[int, Life] = {}
    engines: dict[int, Life] = {}
    status = boot(Home(home), devices=[f"cpu0:memory={given.memory}"])
    with Client(home) as client:
        while client.status()["zygote"]["state"] != "ready":
            time.sleep(0.05)
        workers = Workers(home, client.status()["zygote"]["os_pid"])
        told = drawn = 0
        while True:
            rows = {p["pid"]: p for p in client.ps(all=True)}
            for pid, row in rows.items():
                if row["role"] == "engine":
                    engines.setdefault(pid, Life("engine"))
                life = lives.get(pid) or engines.get(pid)
                if life is None or life.end:
                    continue
                if row["exit_status"] is not None:
                    life.end = row
                    story = client.explain(pid)["story"]
                    life.grown = any(line["what"] == "outgrown" for line in story)
                elif row["worker_id"] and row["role"] != "guest":
                    life.promised = life.promised or row["memory"]["promised_bytes"]
                    life.peak = max(life.peak, workers.private(row["worker_id"]))
            live = sum(not life.end for life in lives.values())
            while live < AT_ONCE and drawn < given.processes:
                drawn += 1
                program, args = draw(rng, folder, drawn)
                try:
                    pid = client.submit(program, args)
                except LlmosError as exc:
                    print(f"refused: {program}: {exc.message}", flush=True)
                    continue
                lives[pid] = Life(program)
                live += 1
            done = len(lives) - live
            if done >= told + 100:
                told = done
                print(f"{done} done", flush=True)
            if not live:
                break
            time.sleep(SAMPLE_S)
        client.shutdown()
    wait_gone(status["kernel"]["os_pid"], 60)
    return lives | engines


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    home = short_home()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_material(folder)
        lives = run(given, folder, home)
    shutil.rmtree(home, ignore_errors=True)
    return show(lives)


def show(lives: dict[int, Life]) -> int:
    lost = {pid: x for pid, x in lives.items() if x.code == OUT_OF_MEMORY
            or x.end.get("exit_status") == 137}  # fmt: skip
    failed = {pid: x for pid, x in lives.items() if x.end.get("exit_status") and pid not in lost}
    for pid, life in (lost | failed).items():
        print(f"process {pid}: {life.kind}, {life.end['exit_status']}, {life.end['reason']}, "
              f"{life.promised / MIB:.0f} MiB promised, {life.peak / MIB:.0f} seen")  # fmt: skip
    print(f"{'kind':10} {'n':>5} {'promised':>10} {'peak + margin':>14} {'beyond':>8} {'over':>5}")
    kinds = Counter(x.kind for x in lives.values())
    for kind in [*sorted(kinds), ""]:
        seen = [x for x in lives.values() if x.kind == (kind or x.kind) and x.peak]
        promised, needed = sum(x.promised for x in seen), sum(x.needed for x in seen)
        beyond = sum(max(0, x.promised - x.needed) for x in seen)
        over = sum(x.peak > x.promised for x in seen)
        print(f"{kind or 'all':10} {len(seen):5} {promised / MIB:9.0f}M {needed / MIB:13.0f}M "
              f"{beyond / max(needed, 1):8.1%} {over:5}")  # fmt: skip
    moved = sum(x.grown for x in lives.values())
    print(f"{len(lives)} processes: {len(lost)} out of memory, {len(failed)} failed otherwise, "
          f"{moved} went back in line")  # fmt: skip
    return 1 if lost or failed else 0


if __name__ == "__main__":
    sys.exit(main())
