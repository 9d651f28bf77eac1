"""Many streams at once: the bare engine loop, and the same through the kernel; peers beside them.

    python tests/bench/bench_serving.py MODEL [--dtype bfloat16] [--streams 1 8 32]
        [--prompt 128] [--tokens 64] [--rounds 3]

MODEL is a folder. Each round has a bare part (an engine's host in a process of its own, nobody
else) and a part through a kernel: as many attached `infer` as streams, begun at once, greedy,
prompts of random ids that share nothing. Printed, medians over the rounds: tokens per second from
the first request to the last token; time to the first token; gap between tokens; memory of the
engine's worker. For the part through a kernel also the CPU time that each token took of the engine,
the kernel, and this bench as its client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmos.shell import AsyncClient, Client
from llmos.shell.home import Home
from llmos.shell.launch import boot, wait_gone

Stamps = list[float]  # of one stream: when it was begun, then when each token came


def prompts(streams: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, vocabulary - 5) for _ in range(length)] for _ in range(streams)]


def infer_args(args: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    return {
        "model": args.model, "dtype": args.dtype, "prompt_ids": ids, "max_tokens": args.tokens,
        "temperature": 0.0, "ignore_eos": True,
    }  # fmt: skip


# ---- the bare loop, in a process of its own ----


def bare(args: argparse.Namespace) -> None:
    """Prints one JSON line for each round and number of streams: the stamps of all streams."""
    from llmos.services.engine.host import Host
    from llmos.services.programs.base import Guest, Idle, OpenGate

    class Quiet:
        """As little of a worker as an engine needs."""

        def __init__(self) -> None:
            self.stamps: dict[int, Stamps] = {}

        clock = staticmethod(time.perf_counter)

        def emit(self, kind: str, pid: int, **values: Any) -> None:
            if kind == "text":
                self.stamps[pid].append(time.perf_counter())

        def guest_done(self, pid: int, done: Any) -> None:
            assert done.status == 0, done

    host = Host(args.model, args.dtype, "cpu", args.threads, OpenGate())
    print(json.dumps({"vocabulary": host._loaded.vocabulary}), flush=True)
    for line in sys.stdin:
        streams, seed = json.loads(line)
        ctx: Any = Quiet()
        for pid, ids in enumerate(prompts(streams, args.prompt, host._loaded.vocabulary, seed), 1):
            ctx.stamps[pid] = [time.perf_counter()]
            host.admit(ctx, Guest(pid, "infer", infer_args(args, ids), (0, 0, pid)))
        while not isinstance(host.step(ctx), Idle):
            pass
        print(json.dumps(list(ctx.stamps.values())), flush=True)


class Bare:
    def __init__(self, args: argparse.Namespace) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, *sys.argv[1:], "--bare-loop"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.vocabulary = int(self._said()["vocabulary"])

    def run(self, streams: int, seed: int) -> list[Stamps]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([streams, seed]) + "\n")
        self.process.stdin.flush()
        return list(self._said())

    def memory(self) -> int:
        return private_bytes(self.process.pid)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _said(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


# ---- through the kernel ----


class Served:
    def __init__(self, args: argparse.Namespace, folder: str, vocabulary: int) -> None:
        self.args, self.vocabulary = args, vocabulary
        self._parts: dict[str, int] = {}  # OS processes, once there is an engine
        os.environ["LLMOS_HOME"] = folder
        self.home = Home.find()
        boot(self.home)

    def run(self, streams: int, seed: int) -> list[Stamps]:
        return asyncio.run(self._run(prompts(streams, self.args.prompt, self.vocabulary, seed)))

    async def _run(self, given: list[list[int]]) -> list[Stamps]:
        async with AsyncClient(self.home.path) as client:
            return await asyncio.gather(*(self._one(client, ids) for ids in given))

    async def _one(self, client: AsyncClient, ids: list[int]) -> Stamps:
        stamps = [time.perf_counter()]
        pid = await client.submit("infer", infer_args(self.args, ids), attached=True)
        stream = client.attach(pid)
        return stamps + [time.perf_counter() async for r in stream if r["kind"] == "text"]

    def memory(self) -> int:
        return max(private_bytes(pid) for pid in self.workers())

    def workers(self) -> set[int]:
        """The OS processes of the engine."""
        with Client(self.home.path) as client:
            return engine_processes(client)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far of whoever has a part in an answer."""
        own = time.process_time()
        if not self._parts:
            (engine,) = self.workers()
            self._parts = {"engine": engine, "kernel": self._status("kernel")["os_pid"]}
            own = time.process_time()
        return {"client": own, **{name: spent_s(pid) for name, pid in self._parts.items()}}

    def weigh(self) -> None:
        """As much weight for the kernel and the engine as this process has, on a busy machine."""
        own = Path("/proc/self/autogroup").read_text().split()[-1]
        for pid in {*self.workers(), self._status("kernel")["os_pid"]}:
            Path(f"/proc/{pid}/autogroup").write_text(own)

    def _status(self, part: str) -> Any:
        with Client(self.home.path) as client:
            return client.status()[part]

    def close(self) -> None:
        kernel = self._status("kernel")["os_pid"]
        with Client(self.home.path) as client:
            client.shutdown()
        wait_gone(kernel, 60)


def engine_processes(client: Client) -> set[int]:
    """The OS processes of all engines: who has a worker's socket open."""
    ends = tuple(f"{r['worker_id']}/sock" for r in client.ps() if r["role"] == "engine")
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return holders({w[6] for w in lines if len(w) == 8 and w[7].endswith(ends)})


def holders(inodes: set[str]) -> set[int]:
    """The OS processes that have one of these sockets open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).removeprefix("socket:[").rstrip("]") in inodes:
                found.add(int(link.parts[2]))
    return found


def spent_s(pid: int) -> float:
    """In steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_bytes(pid: int) -> int:
    """Memory of a process that it shares with nobody."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = [line.split() for line in text.splitlines() if line.startswith("Private_")]
    return sum(int(words[1]) * 1024 for words in found)


# ---- figures ----


def figures(streams: list[Stamps]) -> dict[str, float]:
    tokens = sum(len(s) - 1 for s in streams)
    began, ended = min(s[0] for s in streams), max(s[-1] for s in streams)
    gaps = sorted(b - a for s in streams for a, b in itertools.pairwise(s[1:]))
    firsts = sorted(s[1] - s[0] for s in streams)
    return {
        "tokens/s": tokens / (ended - began),
        "first p50 ms": firsts[len(firsts) // 2] * 1e3,
        "first worst ms": firsts[-1] * 1e3,
        "gap p50 ms": gaps[len(gaps) // 2] * 1e3,
        "gap p99 ms": gaps[int(len(gaps) * 0.99)] * 1e3,
    }


def show(label: str, rounds: list[dict[str, float]], memory: int) -> dict[str, float]:
    median = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    shown = "  ".join(f"{k} {v:8.1f}" for k, v in median.items())
    print(f"{label:<22} {shown}  private {memory / 2**20:6.0f} MiB", flush=True)
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--weigh", action="store_true", help="as root: autogroup as this one's")
    parser.add_argument("--bare-loop", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    if args.bare_loop:
        bare(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        loop = Bare(args)
        served = Served(args, folder, loop.vocabulary)
        try:
            served.run(1, 0)  # loads the model
            if args.weigh:
                served.weigh()
            loop.run(1, 0)
            for streams in args.streams:
                rounds: dict[str, list[dict[str, float]]] = {"bare": [], "kernel": []}
                spent: dict[str, float] = {}
                for seed in range(1, args.rounds + 1):
                    rounds["bare"].append(figures(loop.run(streams, seed)))
                    before = served.cpu_s()
                    rounds["kernel"].append(figures(served.run(streams, seed)))
                    for name, seconds in served.cpu_s().items():
                        spent[name] = spent.get(name, 0.0) + seconds - before[name]
                alone = show(f"{streams:3} bare loop", rounds["bare"], loop.memory())
                through = show(f"{streams:3} through the kernel", rounds["kernel"], served.memory())
                tokens = args.rounds * streams * args.tokens
                cost = ", ".join(f"{n} {s / tokens * 1e6:.0f}" for n, s in spent.items())
                print(f"    ratio of tokens/s: {through['tokens/s'] / alone['tokens/s']:.3f}; "
                      f"CPU us a token: {cost}")  # fmt: skip
        finally:
            loop.close()
            served.close()


if __name__ == "__main__":
    main()
