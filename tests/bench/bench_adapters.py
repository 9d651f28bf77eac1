"""Many LoRA adapters in one step: tokens per second of a decode step, and memory, by adapters.

    python tests/bench/bench_adapters.py [MODEL_FOLDER ...] [--dtype float32] [--rank 8]

One step computes a row of one token for each stream, each token seeing itself alone: all that a
model does but reading keys and values of earlier tokens. So the share that adapters take is shown
at its largest. With --engine the streams are guests of an engine's host, each with a prompt of 32
tokens and 32 to make, text included. Streams take the adapters in turn, in a mixed order. The
variants take turns round by round, so that what else the machine does falls on all; the figure is
the fastest round's. Without a folder, a model of random weights in the shape of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.services.engine import weights
from llmos.services.engine.adapters import Adapter, Adapters
from llmos.services.engine.host import Host
from llmos.services.programs.base import Guest, Idle, OpenGate
from support.adapters import make_adapter
from support.run_program import FakeContext, make_context

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
COUNTS = (0, 1, 8, 64)
PROMPT, MADE = 32, 32  # tokens of a request to an engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", action="store_true", help="whole requests, by an engine")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the CPU's seconds, not the clock's: for one thread on a machine in use",
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, rank {args.rank}")
    with tempfile.TemporaryDirectory() as folder:
        models = args.models or [make_smollm2(Path(folder) / "smollm2-shape")]
        for model in models:
            measure(model, Path(folder), args)


def make_smollm2(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2)).save_pretrained(folder)
    return folder


def measure(base: Path, scratch: Path, args: argparse.Namespace) -> None:
    folders = [
        make_adapter(base, scratch / f"{base.name}-{n}", rank=args.rank, seed=n)
        for n in range(max(COUNTS))
    ]
    if args.engine:
        measure_engine(base, folders, args)
        return
    model: Any = weights.load(str(base), args.dtype, "cpu")
    adapters = Adapters(model, model.dtype)
    began, before = time.perf_counter(), resident()
    loaded = [adapters.load(str(f)) for f in folders]
    spent = time.perf_counter() - began
    print(f"{base.name}: {len(loaded)} adapters of {loaded[0].bytes / 2**20:.2f} MiB, loaded in "
          f"{1e3 * spent / len(loaded):.0f} ms each; the process grew by "
          f"{(resident() - before) / len(loaded) / 2**20:.2f} MiB for each")  # fmt: skip
    tell_table(args.streams, lambda n: rates_of(model, adapters, loaded, n, args))


def tell_table(streams: list[int], rates_of: Callable[[int], list[float]]) -> None:
    print(f"{'streams':>8}" + "".join(f"{f'{n} adapters':>16}" for n in COUNTS) + "   64 / 1")
    for count in streams:
        rates = rates_of(count)
        print(f"{count:>8}" + "".join(f"{rate:>12.1f} t/s" for rate in rates)
              + f"   {rates[-1] / rates[1]:.2f}", flush=True)  # fmt: skip


def measure_engine(base: Path, folders: list[Path], args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as home:
        host = Host(str(base), args.dtype, "cpu", args.threads, OpenGate())
        ctx = make_context(Path(home))
        for pid, folder in enumerate(folders):  # chats that only keep their adapters loaded
            host.admit(ctx, Guest(pid, "chat", {"model": "", "adapter": str(folder)}, (0, 0, 0)))
        print(f"{base.name}, an engine: prompts of {PROMPT} tokens, {MADE} made")
        tell_table(args.streams, lambda n: engine_rates(host, ctx, folders, n, args))


def engine_rates(
    host: Host, ctx: FakeContext, folders: list[Path], streams: int, args: argparse.Namespace
) -> list[float]:
    """Tokens made per second with none, one, some, all adapters, from the first request on."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    rng = random.Random(0)
    best = dict.fromkeys(COUNTS, float("inf"))
    for number in range(args.rounds + 1):  # the first is warm-up
        for count in COUNTS:
            whose = [str(folders[n % count]) if count else "" for n in range(streams)]
            rng.shuffle(whose)
            began = clock()
            for pid, adapter in enumerate(whose, start=1000):
                ids = [rng.randrange(5, 2000) for _ in range(PROMPT)]
                request = {"model": "", "prompt_ids": ids, "adapter": adapter, "temperature": 0.0,
                           "max_tokens": MADE, "ignore_eos": True}  # fmt: skip
                host.admit(ctx, Guest(pid, "infer", request, (0, 0, pid)))
            while not isinstance(host.step(ctx), Idle):
                pass
            if number:
                best[count] = min(best[count], clock() - began)
            ctx.records.clear()
    return [streams * MADE / best[count] for count in COUNTS]


def rates_of(
    model: Any,
    adapters: Adapters,
    loaded: list[Adapter],
    streams: int,
    args: argparse.Namespace,
) -> list[float]:
    """Tokens per second with none, one, some, all adapters."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    ids = torch.arange(streams)[None] + 5
    mask = torch.full((1, 1, streams, streams), float("-inf"), dtype=model.dtype)
    mask[0, 0].fill_diagonal_(0.0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.zeros_like(ids)}
    best = dict.fromkeys(COUNTS, float("inf"))
    for number in range(args.rounds + 1):  # the first is warm-up
        for count in COUNTS:
            spans = spans_of(loaded[:count], streams)
            until = clock() + 0.2
            while clock() < until:
                began = clock()
                with torch.inference_mode(), adapters.routing(spans):
                    model(**inputs, use_cache=False)
                if number:
                    best[count] = min(best[count], clock() - began)
    return [streams / best[count] for count in COUNTS]


def spans_of(some: list[Adapter], streams: int) -> list[tuple[Adapter | None, int]]:
    if not some:
        return [(None, streams)]
    order = [some[n % len(some)] for n in range(streams)]
    random.Random(0).shuffle(order)
    return [(adapter, 1) for adapter in order]


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no RssAnon in /proc/self/status")


if __name__ == "__main__":
    main()
