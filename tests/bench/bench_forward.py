"""What a model's forward costs by the number of tokens, for each type and layout of its weights.

    python tests/bench/bench_forward.py MODEL [--dtype bfloat16 int8 float32] [--decode 1 8 32]
        [--prompt 128 512] [--context 128] [--seconds 2] [--gguf FILE ... --peer-python PYTHON]

MODEL is a folder with random or real weights. "decode N" is a row of one token for each of N texts
of `--context` tokens, through the engine's attention over its blocks, with scores for each; "prompt
N" is a text's first N tokens, with scores for the last. Layouts: `transformers` (as it loads them,
F.linear), `torch` (what an engine does without a compiler), `panels`. All take turns in one
process; printed are medians, and the ratio to transformers (of int8: to its bfloat16). With
`--gguf` llama.cpp does the same (without sampling) through llama-cpp-python, in the Python given,
after all others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 16


def loaders(model: str, dtype: str) -> dict[str, Callable[[], Any]]:
    """By layout: what loads the model."""
    from llmos.services.engine.native import weights as native
    from llmos.services.engine.weights import load
    from llmos.services.model.load import load_causal_lm

    def without_kernels() -> Any:
        found = native._state.copy()
        native._state["found"] = "left out"
        try:
            return load(model, dtype, "cpu")
        finally:
            native._state.clear()
            native._state.update(found)

    made: dict[str, Callable[[], Any]] = {}
    if dtype != "int8":
        made["transformers"] = lambda: load_causal_lm(model, dtype)
    made["torch"] = without_kernels
    if native.kernels() is not None:
        made["panels"] = lambda: load(model, dtype, "cpu")
    return made


class Forward:
    """A model over blocks, and the steps that are measured."""

    def __init__(self, model: Any, tokens: int) -> None:
        from llmos.services.engine.model import PagedModel
        from llmos.services.engine.plan import kv_shape

        shape = kv_shape(model.config.get_text_config(), model.dtype)
        assert shape is not None, "this bench is for models with keys and values"
        self.vocabulary = model.config.get_text_config().vocab_size
        self.model = PagedModel(model.eval(), shape, -(-tokens // BLOCK) + 8)

    def decode(self, texts: int, context: int) -> Callable[[], None]:
        from llmos.services.engine.model import NOTHING, Work

        memories = []
        for number in range(texts):
            ids = [(7 * number + 3 * at) % self.vocabulary for at in range(context + 1)]
            memory, _ = self.model.begin(ids, number, False, None)
            assert self.model.grow(memory, 0, context + 1)
            self.model.forward([Work(memory, ids[:context], 0, NOTHING)])
            memories.append((memory, ids))
        row = [Work(memory, ids[context:], context) for memory, ids in memories]
        self.used = [memory for memory, _ in memories]
        return lambda: self._forward(row)

    def prompt(self, tokens: int) -> Callable[[], None]:
        from llmos.services.engine.model import Work

        ids = [5 * at % self.vocabulary for at in range(tokens)]
        memory, _ = self.model.begin(ids, 0, False, None)
        assert self.model.grow(memory, 0, tokens)
        self.used = [memory]
        work = [Work(memory, ids, 0)]
        return lambda: self._forward(work)

    def _forward(self, work: Any) -> None:
        self.model.forward(work)

    def rest(self) -> None:
        for memory in self.used:
            self.model.release(memory)


def in_turns(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of each step, all measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    rows = max([*args.decode, 1]) * (args.context + 1 + BLOCK) + max([*args.prompt, 0])
    forwards: dict[str, Forward] = {}
    for dtype in args.dtype:
        for layout, loader in loaders(args.model, dtype).items():
            began = time.perf_counter()
            forwards[f"{dtype} {layout}"] = Forward(loader(), rows)
            print(f"# {dtype} {layout}: loaded in {time.perf_counter() - began:.2f} s", flush=True)
    cases = [("decode", n) for n in args.decode] + [("prompt", n) for n in args.prompt]
    with torch.inference_mode():
        for kind, count in cases:
            steps = {
                name: f.decode(count, args.context) if kind == "decode" else f.prompt(count)
                for name, f in forwards.items()
            }
            found = in_turns(steps, args.seconds)
            for forward in forwards.values():
                forward.rest()
            for name, spent in found.items():
                usual = found.get(f"{name.split()[0]} transformers")
                base = usual or found.get("bfloat16 transformers", spent)
                show(kind, count, name, spent, f"  {base / spent:5.2f} x")


def show(kind: str, count: int, name: str, spent: float, more: str) -> None:
    rate = count / spent
    print(f"{kind} {count:5}  {name:<24} {spent * 1e3:9.2f} ms {rate:9.0f} tokens/s{more}")


LLAMA = """
import ctypes, json, statistics, sys, time
import llama_cpp as L
file, threads, decode, prompt, context, seconds = json.loads(sys.argv[1])
quiet = L.llama_log_callback(lambda *a: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(file.encode(), L.llama_model_default_params())
assert model, file
vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
def session(sequences, tokens):
    p = L.llama_context_default_params()
    p.n_ctx, p.n_seq_max = sequences * (tokens + 8), sequences
    p.n_batch, p.n_ubatch = max(512, tokens), 512
    p.n_threads = p.n_threads_batch = threads
    return L.llama_init_from_model(model, p)
def fill(batch, items):
    batch.n_tokens = len(items)
    for i, (token, at, sequence, wanted) in enumerate(items):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, at, 1, wanted
        batch.seq_id[i][0] = sequence
def timed(run):
    run(); times = []; end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter(); run(); times.append(time.perf_counter() - began)
    return statistics.median(times)
def show(kind, count, spent):
    print(json.dumps([kind, count, spent]), flush=True)
for count in decode:
    c = session(count, context + 8); b = L.llama_batch_init(max(count, context), 0, 1)
    memory = L.llama_get_memory(c)
    for s in range(count):
        fill(b, [((7 * s + 3 * at) % vocabulary, at, s, False) for at in range(context)])
        assert L.llama_decode(c, b) == 0
    def run():
        for s in range(count): L.llama_memory_seq_rm(memory, s, context, -1)
        fill(b, [(5 + s, context, s, True) for s in range(count)])
        assert L.llama_decode(c, b) == 0
        L.llama_get_logits(c)[0]
    show("decode", count, timed(run)); L.llama_batch_free(b); L.llama_free(c)
for count in prompt:
    c = session(1, count + 8); b = L.llama_batch_init(count, 0, 1)
    def run():
        L.llama_memory_clear(L.llama_get_memory(c), True)
        fill(b, [(5 * at % vocabulary, at, 0, at == count - 1) for at in range(count)])
        assert L.llama_decode(c, b) == 0
        L.llama_get_logits(c)[0]
    show("prompt", count, timed(run)); L.llama_batch_free(b); L.llama_free(c)
"""


def measure_llama(args: argparse.Namespace, file: str) -> None:
    told = [file, args.threads, args.decode, args.prompt, args.context, args.seconds]
    done = subprocess.run(
        [args.peer_python, "-c", LLAMA, json.dumps(told)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        kind, count, spent = json.loads(line)
        show(kind, count, f"llama.cpp {Path(file).stem}", spent, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "int8", "float32"])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gguf", nargs="*", default=[])
    parser.add_argument("--peer-python", default=sys.executable)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    measure(args)
    for file in args.gguf:
        measure_llama(args, file)


if __name__ == "__main__":
    main()
