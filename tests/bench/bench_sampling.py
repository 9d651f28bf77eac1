"""What the choice of tokens costs a step: `choose` against transformers' processors, in one run.

    python tests/bench/bench_sampling.py [--rows 1 8 32 128] [--vocabularies 32000 152000]
        [--dtype bfloat16] [--threads 1] [--rounds 7]

Milliseconds for one token of all rows, the best of some rounds in which the two take turns. With
one thread it is the thread's own time, so that neighbours on the machine do not count. Theirs are
the processors of generate() on float32 scores (it converts them), argmax or softmax and
multinomial, and log_softmax and topk where log-probabilities are asked for; all rows alike, since
that is what it can do. Scores fall off as those of language models do, or are flat (normal).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.services.engine.arguments import Generation
from llmos.services.engine.sampling import Sampler, choose

PLAIN = Generation(model="", temperature=0.8, top_k=0, top_p=1.0)
SEEN = 600  # tokens that a penalty knows
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top_k 40, top_p 0.95": {"top_k": 40, "top_p": 0.95},
    "top_p 0.95": {"top_p": 0.95},
    "no cut": {},
    "min_p 0.05": {"min_p": 0.05},
    "penalty, top_k 40": {"top_k": 40, "repetition_penalty": 1.2},
    "top_k 40, logprobs 5": {"top_k": 40, "logprobs": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flat", action="store_true", help="normal scores, times 2.5")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.dtype}, "
          f"{args.threads} threads, {'flat' if args.flat else 'falling'} scores")  # fmt: skip
    print(f"{'ms (theirs)':22s}", *(f"{rows:>7d} rows       " for rows in args.rows))
    for vocabulary in args.vocabularies:
        for name, asked in CASES.items():
            cells = [compare(args, vocabulary, rows, asked) for rows in args.rows]
            print(f"{vocabulary // 1000:>3d}k {name:22s}", *cells, flush=True)


def compare(args: argparse.Namespace, vocabulary: int, rows: int, asked: dict[str, Any]) -> str:
    torch.manual_seed(0)
    logits = make_scores(rows, vocabulary, args.flat).to(getattr(torch, args.dtype))
    prompt = torch.randint(0, vocabulary, (rows, SEEN))
    settings = replace(PLAIN, **asked)
    samplers = [
        Sampler(settings, row, vocabulary, prompt[row].tolist()) for row in range(rows)
    ]  # fmt: skip
    clock = time.thread_time if args.threads == 1 else time.perf_counter

    def ours() -> None:
        for sampler, choice in zip(samplers, choose(logits, samplers), strict=True):
            sampler.accept(choice.token)

    theirs = reference(settings, prompt)
    mine, other = [], []
    for _ in range(args.rounds):
        mine.append(timed(clock, ours))
        other.append(timed(clock, lambda: theirs(logits)))
    return f"{min(mine[1:]) * 1e3:8.2f} ({min(other[1:]) * 1e3:8.2f})"


def make_scores(rows: int, vocabulary: int, flat: bool) -> Tensor:
    noise = torch.randn(rows, vocabulary)
    if flat:
        return noise * 2.5
    order = torch.stack([torch.randperm(vocabulary) for _ in range(rows)])
    return noise * 0.5 - 1.6 * (order + 1).log()


def reference(args: Generation, prompt: Tensor) -> Callable[[Tensor], Tensor]:
    steps = LogitsProcessorList()
    if args.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(args.repetition_penalty))
    if args.temperature:
        steps.append(TemperatureLogitsWarper(args.temperature))
    if args.top_k:
        steps.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1:
        steps.append(TopPLogitsWarper(args.top_p))
    if args.min_p:
        steps.append(MinPLogitsWarper(args.min_p))

    @torch.inference_mode()
    def draw(logits: Tensor) -> Tensor:
        raw = logits.to(torch.float32, copy=True)
        scores = steps(prompt, raw)
        if args.logprobs is not None:
            raw.log_softmax(1).topk(args.logprobs)
        if not args.temperature:
            return scores.argmax(1)
        return torch.multinomial(scores.softmax(1), 1)

    return draw


def timed(clock: Callable[[], float], run: Callable[[], object]) -> float:
    began = clock()
    run()
    return clock() - began


if __name__ == "__main__":
    main()
