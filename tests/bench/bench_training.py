"""Steps of the pretrain program against the plain torch loop, alternating in one run.

    python tests/bench/bench_training.py [steps a round] [rounds]

Both train the same Llama on the same batches with fused AdamW and the loss read every step.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.services.data.order import Order
from llmos.services.model.families import build
from llmos.services.programs.lm_start import shape_of
from llmos.services.programs.pretrain import Pretrain
from support.run_program import Run, make_context
from support.texts import story_file

CASES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain_loop(run: Run, dtype: torch.dtype) -> Callable[[], float]:
    """One step of the loop that everybody writes, over the data of `run`."""
    assert isinstance(run.program, Pretrain)
    session, args = run.program.session, run.program.args
    model = build(args.arch, shape_of(args, session.data.tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    order = Order(len(session.data.training), 0)

    def step() -> float:
        inputs, labels = map(torch.from_numpy, session.data.training.batch(order.take(args.batch)))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def seconds(step: Callable[[], object], count: int) -> list[float]:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        took.append(time.perf_counter() - began)
    return took


def main(count: int = 5, rounds: int = 4) -> None:
    for name, dtype in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            data = story_file(home / "t.txt", 20_000)
            run = Run.start(
                Pretrain, make_context(home), data=str(data), out="m", dtype=name, vocab_size=1024
            )
            plain = plain_loop(run, dtype)
            for step in (plain, run.step):
                seconds(step, 2)
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(rounds):
                theirs += seconds(plain, count)
                ours += seconds(run.step, count)
            a, b = statistics.median(theirs), statistics.median(ours)
            print(f"{name}: plain {a * 1e3:.0f} ms/step, pretrain {b * 1e3:.0f}, speed {a / b:.3f}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
