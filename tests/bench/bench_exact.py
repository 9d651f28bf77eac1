"""Greedy texts of one running batch against generate(), token for token, in float32.

    python tests/bench/bench_exact.py MODEL TEXT [--prompts 200] [--tokens 48] [--adapter FOLDER]

MODEL is a folder, TEXT a text whose pieces are the prompts: of mixed length, some with a common
beginning. They come while others are served, in pieces, with few blocks (`--blocks`), so that
guests have to make room and are computed again; every `--adapter` is used by some of them. Then
each text is computed anew by transformers (peft's model for an adapter). Printed: tokens that are
the same; flips where the reference's two best scores differ by less than 1e-4; anything else is
wrong, and the exit status 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.services.engine import batch
from llmos.services.engine.host import Host
from llmos.services.programs.base import Guest, Idle, OpenGate
from support.run_program import make_context

NEARLY_EQUAL = 1e-4


def prompts(ids: list[int], count: int, longest: int) -> list[list[int]]:
    rng = random.Random(0)
    common = ids[:60]
    made = []
    for _ in range(count):
        at, length = rng.randrange(len(ids) - longest), rng.randint(1, longest)
        made.append([*(common[: rng.choice([0, 0, 33, 60])]), *ids[at : at + length]])
    return made


def serve(args: argparse.Namespace, given: list[list[int]], adapters: list[str]) -> dict[str, Any]:
    """-> the texts, and what happened on the way."""
    batch.MOST_PIECE = 96
    probe = Host(args.model, "float32", "cpu", args.threads, OpenGate())
    block = probe._loaded.model.pool.shape.block_bytes
    del probe
    host = Host(args.model, "float32", "cpu", args.threads, OpenGate(), args.blocks * block)
    counted = {"made way": 0, "steps": 0}
    make_way = host._memories.make_way

    def counting(session: Any) -> None:
        counted["made way"] += 1
        make_way(session)

    host._memories.make_way = counting  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        ctx = make_context(Path(folder))
        for pid, ids in enumerate(given, 1):
            one = {
                "model": args.model, "prompt_ids": ids, "max_tokens": args.tokens,
                "temperature": 0.0, "ignore_eos": True, "adapter": adapters[pid - 1],
            }  # fmt: skip
            work = Path(folder) / str(pid)
            work.mkdir()
            host.admit(ctx, Guest(pid, "infer", one, (0, 0, pid), [], False, work))
            host.step(ctx)
            counted["steps"] += 1
        while not isinstance(host.step(ctx), Idle):
            counted["steps"] += 1
        made = {pid: [t for r in ctx.of_kind("text", pid) for t in r["tokens"]]
                for pid in range(1, len(given) + 1)}  # fmt: skip
        cached = sum(ctx.guests_done[pid].result["cached_tokens"] for pid in made)
    return {"texts": made, "cached": cached, **counted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--longest", type=int, default=140)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", action="append", default=[])
    args = parser.parse_args()
    text = args.text.read_text(errors="ignore")[:400_000]
    ids = AutoTokenizer.from_pretrained(args.model)(text, add_special_tokens=False).input_ids
    given = prompts(ids, args.prompts, args.longest)
    adapters = [["", *args.adapter][i % (1 + len(args.adapter))] for i in range(len(given))]
    began = time.perf_counter()
    served = serve(args, given, adapters)
    print(f"{len(given)} prompts, {sum(map(len, given))} tokens, {served['steps']} steps in "
          f"{time.perf_counter() - began:.1f} s; {served['cached']} tokens from the prefix cache, "
          f"{served['made way']} times a guest made room")  # fmt: skip
    same = flips = wrong = 0
    for adapter in sorted(set(adapters)):
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        for index, prompt in enumerate(given):
            if adapters[index] != adapter:
                continue
            made = served["texts"][index + 1]
            with torch.inference_mode():
                scores = model(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1]
            for row, token in zip(scores, made, strict=True):
                best = float(row.max())
                if int(row.argmax()) == token:
                    same += 1
                elif best - float(row[token]) <= NEARLY_EQUAL:
                    flips += 1
                else:
                    wrong += 1
                    print(
                        f"prompt {index}: {token} is {best - float(row[token]):.2e} below the best"
                    )
    print(f"same {same}, flips below {NEARLY_EQUAL:g}: {flips}, wrong {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
