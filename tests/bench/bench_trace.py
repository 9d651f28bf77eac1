"""Recorded requests to an engine, alone and beside a training: what each costs the other.

    python tests/bench/bench_trace.py MODEL TRACE.csv.gz TEXT [--seconds 60] [--load 0.6]
        [--rounds 2] [--floors 0 0.05] [--dtype bfloat16]

TRACE has the columns TIMESTAMP, ContextTokens, GeneratedTokens (Azure's, 2023). A window of it is
taken; lengths are scaled so that its longest texts fill MODEL's context, and its arrivals, as they
were spaced, so that the engine alone is busy for `--load` of the time (tried out first: a step with
few requests takes about as long as one with many, so half the rate is much more than half the
time). Prompts are random ids that share nothing. TEXT is pretrained on in the background.

The parts of a round are: the requests alone; then, for each floor (`batch_share` of the kernel's
configuration), the requests beside a training. Printed, over all rounds: time to the first token,
gaps between tokens, and how much of the time that the requests left the training has used, by
steps, against its rate alone.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime
import gzip
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.shell import AsyncClient, Client
from llmos.shell.home import Home
from llmos.shell.launch import boot, wait_gone

TRAINING: dict[str, Any] = {
    "width": 128, "layers": 2, "context": 128, "batch": 8, "seed": 7, "steps": 10_000_000,
    "save_every": "10000000", "out": "background",
}  # fmt: skip
ALONE_S = 15.0  # the training's rate with nobody there
TRIAL_S, TRIALS, NEAR = 12.0, 5, 0.03  # to find the rate of a load
LONGEST = 0.99  # the quantile of a text's length that just fills the context


@dataclass
class Request:
    at: float  # seconds after the first
    prompt: int
    tokens: int


@dataclass
class Heard:
    """What clients saw."""

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)  # of this bench itself


def read_trace(path: Path, context: int, count: int, skip: int) -> list[Request]:
    """`count` requests after the first `skip`, scaled to `context` tokens."""
    rows: list[Request] = []
    with gzip.open(path, "rt") as file:
        for row in itertools.islice(csv.DictReader(file), skip, skip + count):
            stamp = row["TIMESTAMP"][:26]  # seven digits are one too many
            at = datetime.datetime.fromisoformat(stamp).timestamp()
            rows.append(Request(at, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
    assert len(rows) == count, f"the trace has no {count} requests after {skip}"
    totals = sorted(r.prompt + r.tokens for r in rows)
    scale = context / totals[int(len(totals) * LONGEST)]
    for r in rows:
        r.tokens = min(max(2, round(r.tokens * scale)), context // 2)
        r.prompt = min(max(1, round(r.prompt * scale)), context - r.tokens)
    began = rows[0].at
    return [Request(r.at - began, r.prompt, r.tokens) for r in rows]


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        config = json.loads((Path(args.model) / "config.json").read_text())
        self.context, self.vocabulary = config["max_position_embeddings"], config["vocab_size"]
        self.context = min(self.context, args.context)
        self.home: Path

    @contextmanager
    def kernel(self, floor: float) -> Iterator[None]:
        """A kernel of its own for each part: nothing is learned from another."""
        with tempfile.TemporaryDirectory(prefix="l", dir="/tmp") as folder:
            self.home = Path(folder)
            (self.home / "config.toml").write_text(f"batch_share = {floor}\n")
            status = boot(Home(self.home))
            try:
                asyncio.run(self.ask([Request(0.0, 8, 4)]))  # loads the model
                yield
            finally:
                with Client(self.home) as client:
                    client.shutdown()
                wait_gone(status["kernel"]["os_pid"], 60)

    # ---- requests ----

    async def ask(self, requests: list[Request]) -> Heard:
        """Each at its time."""
        heard, rng = Heard(), random.Random(1)
        async with AsyncClient(self.home) as client:
            prompts = [[rng.randrange(5, self.vocabulary - 5) for _ in range(r.prompt)]
                       for r in requests]  # fmt: skip
            began = time.perf_counter()

            async def one(request: Request, ids: list[int]) -> None:
                await asyncio.sleep(began + request.at - time.perf_counter())
                heard.late_s.append(time.perf_counter() - began - request.at)
                await self.hear(client, request, ids, heard)

            await asyncio.gather(*(one(r, ids) for r, ids in zip(requests, prompts, strict=True)))
        return heard

    async def hear(
        self, client: AsyncClient, request: Request, ids: list[int], heard: Heard
    ) -> None:
        args = {"model": self.args.model, "dtype": self.args.dtype, "prompt_ids": ids,
                "max_tokens": request.tokens, "temperature": 0.0, "ignore_eos": True}  # fmt: skip
        began = time.perf_counter()
        pid = await client.submit("infer", args, attached=True)
        stamps = [time.perf_counter() async for r in client.attach(pid) if r["kind"] == "text"]
        heard.first_s.append(stamps[0] - began)
        heard.gaps_s += [b - a for a, b in itertools.pairwise(stamps)]

    def busy(self, requests: list[Request]) -> float:
        """The share of the time that the engine computes, with nobody else there."""
        with Client(self.home) as client:
            before, began = self.busy_s(client), time.perf_counter()
            asyncio.run(self.ask(requests))
            return (self.busy_s(client) - before) / (time.perf_counter() - began)

    # ---- the training ----

    def train(self, client: Client) -> int:
        return client.submit("pretrain", {**TRAINING, "data": self.args.text})

    def step(self, client: Client, pid: int) -> int:
        return int((client.process(pid)["progress"] or {}).get("step") or 0)

    def started(self, client: Client, pid: int) -> None:
        while self.step(client, pid) < 20:
            time.sleep(0.1)

    def steps_per_s(self, client: Client, pid: int) -> float:
        """Of the training with nobody there."""
        steps, began = self.step(client, pid), time.perf_counter()
        time.sleep(ALONE_S)
        return (self.step(client, pid) - steps) / (time.perf_counter() - began)

    def busy_s(self, client: Client) -> float:
        """Seconds of the device that requests have had so far."""
        rows = [r for r in client.ps(all=True) if r["program"] == "infer"]
        return sum(float(r["device_seconds"]) for r in rows)


def window(bench: Bench, count: int, skip: int, seconds: float) -> list[Request]:
    """So many requests of the trace in so many seconds."""
    requests = read_trace(bench.args.trace, bench.context, count, skip)
    stretch = seconds / requests[-1].at
    return [Request(r.at * stretch, r.prompt, r.tokens) for r in requests]


def rate_of(bench: Bench) -> float:
    """Requests per second of the load that is wanted."""
    rate, low, high = 8.0, 0.0, float("inf")
    tried: dict[float, float] = {}  # how far off each was
    with bench.kernel(0.0):
        for _ in range(TRIALS):
            busy = bench.busy(window(bench, max(20, int(rate * TRIAL_S)), 0, TRIAL_S))
            print(f"{rate:.1f} requests/s keep the engine busy for {busy:.0%}", flush=True)
            tried[rate] = abs(busy - bench.args.load)
            if tried[rate] < NEAR:
                break
            low, high = (rate, high) if busy < bench.args.load else (low, rate)
            rate = min(rate * bench.args.load / busy, rate * 3) if high > 1e9 else (low + high) / 2
    return min(tried, key=tried.__getitem__)


def beside(bench: Bench, requests: list[Request], floor: float) -> tuple[Heard, float, float]:
    """-> what clients heard, the share of the time left that the training has kept, and the share
    of the time that requests had."""
    with bench.kernel(floor), Client(bench.home) as client:
        pid = bench.train(client)
        bench.started(client, pid)
        before = bench.steps_per_s(client, pid)
        steps, busy_s, began = bench.step(client, pid), bench.busy_s(client), time.perf_counter()
        heard = asyncio.run(bench.ask(requests))
        spent_s = time.perf_counter() - began
        steps, busy_s = bench.step(client, pid) - steps, bench.busy_s(client) - busy_s
        rate = (before + bench.steps_per_s(client, pid)) / 2
        client.kill(pid)
    return heard, steps / rate / (spent_s - busy_s), busy_s / spent_s


def show(label: str, heard: Heard, than: Heard | None = None) -> None:
    def quantiles(values: list[float]) -> tuple[float, float]:
        values = sorted(values)
        return values[len(values) // 2] * 1e3, values[int(len(values) * 0.99)] * 1e3

    line = f"{label:<24}"
    for name, mine, theirs in (
        ("first token", heard.first_s, than and than.first_s),
        ("gap", heard.gaps_s, than and than.gaps_s),
    ):
        p50, p99 = quantiles(mine)
        line += f"  {name} p50 {p50:6.1f} p99 {p99:7.1f} ms"
        if theirs:
            a, b = quantiles(theirs)
            line += f" ({p50 / a:.2f}, {p99 / b:.2f} x)"
    print(f"{line}  {len(heard.first_s)} requests, {len(heard.gaps_s)} gaps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("trace", type=Path)
    parser.add_argument("text")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each part")
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--floors", type=float, nargs="*", default=[0.0, 0.05])
    parser.add_argument("--context", type=int, default=2048, help="tokens of a text at most")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    args.model, args.text = os.path.abspath(args.model), os.path.abspath(args.text)
    bench = Bench(args)
    rate = rate_of(bench)
    count = max(20, int(rate * args.seconds))
    alone, kept = Heard(), {floor: [] for floor in args.floors}
    with_training = {floor: Heard() for floor in args.floors}
    used: list[float] = []
    for number in range(args.rounds):
        requests = window(bench, count, number * count, args.seconds)
        with bench.kernel(0.0):
            add(alone, asyncio.run(bench.ask(requests)))
        for floor in args.floors:
            heard, share, busy = beside(bench, requests, floor)
            add(with_training[floor], heard)
            kept[floor].append(share)
            used.append(busy)
    show("alone", alone)
    for floor in args.floors:
        show(f"beside, floor {floor:.0%}", with_training[floor], alone)
        shares = ", ".join(f"{share:.3f}" for share in kept[floor])
        print(f"{'':24}  training kept {statistics.mean(kept[floor]):.3f} ({shares}) of the time "
              "that was left")  # fmt: skip
    late_s = sorted(itertools.chain(alone.late_s, *(h.late_s for h in with_training.values())))
    late = late_s[int(len(late_s) * 0.99)] * 1e3
    print(f"requests had {statistics.mean(used):.0%} of the device; this bench sent {late:.1f} ms "
          "late (p99)")  # fmt: skip


def add(to: Heard, heard: Heard) -> None:
    to.first_s += heard.first_s
    to.gaps_s += heard.gaps_s
    to.late_s += heard.late_s


if __name__ == "__main__":
    main()
