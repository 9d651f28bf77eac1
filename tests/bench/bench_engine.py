"""Tokens per second: the engine's step loop against transformers' generate(), in one run.

    python tests/bench/bench_engine.py MODEL_FOLDER [--tokens 100] [--rounds 7] [--threads 2]

Greedy, batch 1, the same prompt, the two taking turns round by round, so that what else the
machine does falls on both; the figure is the median over rounds. Prefill, sampling, making
text and emitting it are inside for the engine; generate() makes ids only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.services.programs.engine import Engine
from support.run_program import Run, admit, make_context

PROMPT = "Once upon a time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{args.threads} threads, {args.model.name}, {args.tokens} tokens")  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        compare(args, dtype)


def compare(args: argparse.Namespace, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        ctx = make_context(Path(home), threads=args.threads)
        run = Run.start(Engine, ctx, model=str(args.model), dtype=dtype)
        reference = load_reference(args.model, dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        ours, theirs, same = [], [], True
        for number in range(args.rounds + 1):  # the first is warm-up
            rate, made = engine_round(run, number, args)
            other_rate, expected = generate_round(reference, ids, args.tokens)
            same = same and made == expected
            if number:
                ours.append(rate)
                theirs.append(other_rate)
    mine, other = statistics.median(ours), statistics.median(theirs)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"{dtype:9s} engine {mine:6.1f} tok/s  generate {other:6.1f} tok/s  "
          f"ratio {ratio:.2f}  same tokens: {same}", flush=True)  # fmt: skip


def load_reference(model: Path, dtype: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))


def engine_round(run: Run, number: int, args: argparse.Namespace) -> tuple[float, list[int]]:
    pid = number + 1
    began = time.perf_counter()
    admit(run, pid, "infer", model=str(args.model), prompt=PROMPT, temperature=0,
          max_tokens=args.tokens)  # fmt: skip
    run.until_idle()
    spent = time.perf_counter() - began
    made = [token for record in run.ctx.of_kind("text", pid) for token in record["tokens"]]
    return len(made) / spent, made


def generate_round(model: Any, ids: torch.Tensor, count: int) -> tuple[float, list[int]]:
    began = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    spent = time.perf_counter() - began
    made = out[0, ids.shape[1] :].tolist()
    return len(made) / spent, made


if __name__ == "__main__":
    main()
