"""One machine, one model, the same requests: llmos, `transformers serve` and llama.cpp, in one run.

    python tests/bench/bench_peers.py MODEL --peer-python PYTHON [--dtype bfloat16]
        [--streams 1 8 32] [--prompt 128] [--tokens 64] [--rounds 3] [--gguf FILE]

MODEL is a folder. PYTHON has transformers[serving], and llama-cpp-python for `--gguf` (the same
model in a type that llama.cpp reads). Each round begins so many greedy requests at once, each with
a prompt of its own, first with llmos (through the kernel's socket, then through its gateway), then
with `transformers serve --continuous-batching`, both over HTTP with streaming, then with llama.cpp
(its own batch, cache and sampler, in its process: no server, no text). Printed, medians over the
rounds: tokens per second from the first request to the last token, time to the first token, gap
between tokens, and the private memory of the servers. Tokens are counted by the servers;
answers that end by themselves are shorter for transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_serving import Stamps, engine_processes, figures, private_bytes

from llmos.shell import AsyncClient, Client
from llmos.shell.home import Home
from llmos.shell.launch import boot, wait_gone


class Texts:
    """Prompts as text that is so many tokens again."""

    def __init__(self, model: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        words = [self._tokenizer.decode([i]) for i in range(300, 3000)]
        self._words = [w.strip() for w in words if w.strip().isalpha() and w.strip().isascii()]

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text).input_ids)

    def make(self, count: int, length: int, seed: int) -> list[str]:
        rng = random.Random(seed)
        return [self._one(rng, length) for _ in range(count)]

    def _one(self, rng: random.Random, length: int) -> str:
        text = rng.choice(self._words)
        while len(self.ids(text)) < length:
            text += " " + rng.choice(self._words)
        return text


# ---- HTTP ----


@dataclass
class Answered:
    stamps: Stamps  # when it was begun, then when each piece of text came
    tokens: int  # as the server counts them; else its pieces


Way = Callable[[list[Any]], list[Answered]]


async def streamed(port: int, path: str, body: dict[str, Any]) -> Answered:
    """One request over a line of its own."""
    stamps = [time.perf_counter()]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps({**body, **usage}).encode()
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        + data
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head + await reader.read(1000)
    tokens = 0
    async for line in reader:
        if line.startswith(b"data: {"):
            said = json.loads(line[6:])
            assert "error" not in said, said
            tokens = (said.get("usage") or {}).get("completion_tokens") or tokens
            choices = said.get("choices") or [{}]
            if choices[0].get("text") or choices[0].get("delta", {}).get("content"):
                stamps.append(time.perf_counter())
    writer.close()
    assert len(stamps) > 1, "an answer without text"
    return Answered(stamps, max(tokens, len(stamps) - 1))


def over_http(port: int, body: Callable[[Any], dict[str, Any]], asked: list[Any]) -> list[Answered]:
    async def go() -> list[Answered]:
        return await asyncio.gather(*(streamed(port, "/v1/completions", body(a)) for a in asked))

    return asyncio.run(go())


# ---- servers ----


class Llmos:
    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.args = args
        os.environ["LLMOS_HOME"] = folder
        self.home = Home.find()
        (self.home.path / "models").mkdir(parents=True)
        (self.home.path / "models" / "model").symlink_to(args.model)
        self.kernel = int(boot(self.home)["kernel"]["os_pid"])
        dtype = ["--dtype", args.dtype] if args.dtype != "auto" else []
        try:
            self._llmos("serve", "-d", "--port", "0", *dtype)
        except subprocess.CalledProcessError:
            self.close()
            raise
        status = json.loads(self._llmos("serve", "status", "--json"))
        self.port, self.gateway = int(status["url"].rsplit(":", 1)[1][:-3]), int(status["os_pid"])

    def by_socket(self, asked: list[str]) -> list[Answered]:
        async def one(client: AsyncClient, text: str) -> Answered:
            stamps = [time.perf_counter()]
            args = {"model": "model", "dtype": self.args.dtype, "prompt": text, "raw": True,
                    "max_tokens": self.args.tokens, "temperature": 0.0,
                    "ignore_eos": True}  # fmt: skip
            pid = await client.submit("infer", args, attached=True)
            tokens = 0
            async for record in client.attach(pid):
                if record["kind"] == "text":
                    tokens += len(record["tokens"])
                    stamps.append(time.perf_counter())
            return Answered(stamps, tokens)

        async def go() -> list[Answered]:
            async with AsyncClient(self.home.path) as client:
                return await asyncio.gather(*(one(client, text) for text in asked))

        return asyncio.run(go())

    def by_gateway(self, asked: list[str]) -> list[Answered]:
        body = {"model": "model", "max_tokens": self.args.tokens, "temperature": 0,
                "ignore_eos": True}  # fmt: skip
        return over_http(self.port, lambda text: {**body, "prompt": text}, asked)

    def memory(self) -> str:
        with Client(self.home.path) as client:
            engines = engine_processes(client)
        parts = {"engine": max(map(private_bytes, engines)),
                 "kernel": private_bytes(self.kernel),
                 "gateway": private_bytes(self.gateway)}  # fmt: skip
        return ", ".join(f"{name} {nbytes >> 20} MiB" for name, nbytes in parts.items())

    def close(self) -> None:
        with Client(self.home.path) as client:
            client.shutdown()
        wait_gone(self.kernel, 60)

    def _llmos(self, *words: str) -> str:
        command = [sys.executable, "-P", "-m", "llmos.shell", *words]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


@contextlib.contextmanager
def transformers_serve(args: argparse.Namespace) -> Iterator[tuple[Way, Callable[[], str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(args.peer_python).with_name("transformers")), "serve", args.model,
               "--port", str(port), "--continuous-batching", "--dtype", args.dtype,
               "--log-level", "error"]  # fmt: skip
    body = {"model": args.model, "max_tokens": args.tokens, "temperature": 0}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 180
            while True:
                assert process.poll() is None, "transformers serve has ended"
                assert time.monotonic() < deadline, "transformers serve does not answer"
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield (
                lambda asked: over_http(port, lambda text: {**body, "prompt": text}, asked),
                lambda: f"{private_bytes(process.pid) >> 20} MiB",
            )
        finally:
            process.terminate()


LLAMA = """
import ctypes, json, sys, time
import llama_cpp as L
file, threads, most, length, tokens = json.loads(sys.argv[1])
quiet = L.llama_log_callback(lambda *a: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(file.encode(), L.llama_model_default_params())
p = L.llama_context_default_params()
p.n_ctx, p.n_seq_max = most * (length + tokens + 8), most
p.n_batch, p.n_ubatch = 2048, 512
p.n_threads = p.n_threads_batch = threads
c = L.llama_init_from_model(model, p)
memory, sampler = L.llama_get_memory(c), L.llama_sampler_init_greedy()
batch = L.llama_batch_init(2048, 0, 1)
def decode(items):
    batch.n_tokens = len(items)
    for i, (token, at, sequence, wanted) in enumerate(items):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, at, 1, wanted
        batch.seq_id[i][0] = sequence
    assert L.llama_decode(c, batch) == 0
print(json.dumps("up"), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    L.llama_memory_clear(memory, True)
    stamps, last = [[time.perf_counter()] for _ in asked], [0] * len(asked)
    def take(numbers):
        for row, s in enumerate(numbers):
            last[s] = L.llama_sampler_sample(sampler, c, rows[row])
            stamps[s].append(time.perf_counter())
    group, items, rows = [], [], []
    for s, ids in enumerate(asked):
        if len(items) + len(ids) > 2048:
            decode(items); take(group); group, items, rows = [], [], []
        items += [(t, at, s, at == len(ids) - 1) for at, t in enumerate(ids)]
        rows.append(len(items) - 1); group.append(s)
    decode(items); take(group)
    rows = list(range(len(asked)))
    for n in range(tokens - 1):
        decode([(last[s], len(ids) + n, s, True) for s, ids in enumerate(asked)])
        take(range(len(asked)))
    print(json.dumps(stamps), flush=True)
"""


@contextlib.contextmanager
def llama_cpp(args: argparse.Namespace) -> Iterator[tuple[Way, Callable[[], str]]]:
    told = [args.gguf, args.threads, max(2, *args.streams), args.prompt + 8, args.tokens]
    with subprocess.Popen(
        [args.peer_python, "-c", LLAMA, json.dumps(told)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        to, said = process.stdin, process.stdout
        assert said.readline(), "llama.cpp has ended"

        def run(asked: list[list[int]]) -> list[Answered]:
            to.write(json.dumps(asked) + "\n")
            to.flush()
            return [Answered(stamps, len(stamps) - 1) for stamps in json.loads(said.readline())]

        yield run, lambda: f"{private_bytes(process.pid) >> 20} MiB"
        to.close()


def summary(answers: list[Answered]) -> dict[str, float]:
    found = figures([a.stamps for a in answers])
    pieces = sum(len(a.stamps) - 1 for a in answers)
    return {**found, "tokens/s": found["tokens/s"] * sum(a.tokens for a in answers) / pieces}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gguf", default="")
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    texts = Texts(args.model)
    with contextlib.ExitStack() as stack:
        llmos = Llmos(args, stack.enter_context(tempfile.TemporaryDirectory(prefix="l")))
        stack.callback(llmos.close)
        ways: dict[str, Way] = {
            "llmos, socket": llmos.by_socket, "llmos, gateway": llmos.by_gateway,
        }  # fmt: skip
        memories: dict[str, Callable[[], str]] = {"llmos": llmos.memory}
        if not args.without_transformers:
            serve, memory = stack.enter_context(transformers_serve(args))
            ways["transformers serve"], memories["transformers serve"] = serve, memory
        if args.gguf:
            run, memory = stack.enter_context(llama_cpp(args))
            name = f"llama.cpp {Path(args.gguf).stem.rpartition('-')[2]}"
            ways[name] = lambda asked: run([texts.ids(text) for text in asked])
            memories[name] = memory
        for way in ways.values():
            way(texts.make(2, args.prompt, 0))
        for streams in args.streams:
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
            for seed in range(1, args.rounds + 1):
                for number, (name, way) in enumerate(ways.items()):
                    # Prompts that nobody has seen: llmos would find the first way's in its cache.
                    given = texts.make(streams, args.prompt, seed * 1000 + streams * 10 + number)
                    rounds[name].append(summary(way(given)))
            print(f"\n{streams} streams, prompt {args.prompt}, {args.tokens} tokens, {args.dtype}")
            for name, found in rounds.items():
                median = {k: statistics.median(r[k] for r in found) for k in found[0]}
                shown = "  ".join(f"{k} {v:7.1f}" for k, v in median.items())
                print(f"  {name:<20} {shown}", flush=True)
        for name, memory in memories.items():
            print(
                f"memory of {name} alone (weights that are mapped from a file are not): {memory()}"
            )


if __name__ == "__main__":
    main()
