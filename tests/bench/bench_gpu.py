"""Everything about a CUDA device in one command; the table goes to docs/benchmarks/.

    python tests/bench/bench_gpu.py [layers] [tokens]

Offline: random weights of a Llama of 1 B parameters (16 layers of width 2048), micro-batches of
8192 tokens. Needs no kernel and no NVML but for the driver's conformance.
"""

from __future__ import annotations

import asyncio
import datetime
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.drivers.conformance import check_driver
from llmos.drivers.cuda.driver import CudaDriver
from llmos.drivers.worker.cuda import CudaStreams
from llmos.drivers.worker.gate import Gate
from llmos.drivers.worker.lanes import CudaLane
from llmos.drivers.worker.mover import CHUNK_BYTES, Mover
from llmos.kernel.errors import LlmosError
from llmos.services.model import safepoints
from llmos.services.optim import optimizers, pieces

DEVICE = "cuda:0"
ROOT = Path(__file__).resolve().parents[2]
HOLDS, STEPS, ROUNDS = 200, 5, 6


class Training:
    """The loop of llmos over one micro-batch of random tokens."""

    def __init__(self, gate: Gate, layers: int, tokens: int) -> None:
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=tokens,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = LlamaForCausalLM(config)
            self.ids = torch.randint(0, config.vocab_size, (max(1, tokens // 2048), 2048))
        self.gate = gate
        self.optimizer = optimizers.build("adamw", self.model.named_parameters(), 1e-4, 0.1)
        safepoints.install(self.model, gate)

    def step(self) -> None:
        self.gate.boundary("micro-batch")
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            self.gate.boundary("loss")
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), self.ids.flatten()
            )
        loss.backward()
        self.gate.boundary("clip")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        pieces.step(self.optimizer, self.gate)
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> list[torch.Tensor]:
        return [*safepoints.tensors_of(self.model), *pieces.tensors_of(self.optimizer)]


def step_s(training: Training, count: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        training.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def hold_times(training: Training) -> tuple[list[float], float]:
    """Hold the training at random moments -> (seconds each, longest work between boundaries)."""
    held, over = threading.Event(), threading.Event()
    took: list[float] = []

    def said(message: dict[str, Any]) -> None:
        held.set()

    gate = training.gate
    gate._post = said

    def ask() -> None:
        luck = random.Random(0)
        for number in range(1, HOLDS + 1):
            time.sleep(luck.uniform(0.01, 0.2))  # a random moment is the point
            held.clear()
            began = time.perf_counter()
            gate.hears({"k": "hold", "n": number})
            held.wait()
            took.append(time.perf_counter() - began)
            gate.hears({"k": "lease"})
        over.set()

    asker = threading.Thread(target=ask)
    asker.start()
    while not over.is_set():
        training.step()
    asker.join()
    return sorted(took), gate.longest_s


def gate_cost(layers: int, tokens: int) -> tuple[Training, str]:
    """Steps with and without a gate, in turn; the training with the gate is kept."""
    with_gate = Training(Gate(lambda m: None, CudaStreams(DEVICE)), layers, tokens)
    plain = Training(Gate(lambda m: None), layers, tokens)
    for training in (with_gate, plain):
        step_s(training, STEPS)
    ratios = [step_s(with_gate, STEPS) / step_s(plain, STEPS) for _ in range(ROUNDS)]
    del plain
    torch.cuda.empty_cache()
    return with_gate, f"{100 * (statistics.median(ratios) - 1):+.2f} % (target <= 1 %)"


def raw_pinned(nbytes: int) -> tuple[float, float]:
    """GB/s device -> pinned host and back, one piece after another."""
    host = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=DEVICE)
    speeds = []
    for target, source in ((host, there), (there, host)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(max(1, nbytes // CHUNK_BYTES)):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        count = max(1, nbytes // CHUNK_BYTES)
        speeds.append(count * CHUNK_BYTES / 1e9 / (time.perf_counter() - began))
    return speeds[0], speeds[1]


def moving(training: Training, folder: Path) -> list[str]:
    tensors = training.tensors()
    sums = [t.double().sum().item() for t in tensors]
    mover = Mover(CudaLane(DEVICE), folder)
    rows = []
    for what, where in (("first, pinning", "host"), ("again", "host"), ("disk", "disk")):
        free = torch.cuda.mem_get_info()[0]
        out = mover.out(tensors, where)
        freed = torch.cuda.mem_get_info()[0] - free
        back = mover.back()
        raw_out, raw_back = raw_pinned(out.bytes)
        a, b = out.bytes / 1e9 / out.seconds, back.bytes / 1e9 / back.seconds
        rows.append(
            f"{a:.1f} / {b:.1f} GB/s, raw pinned {raw_out:.1f} / {raw_back:.1f}: "
            f"{a / raw_out:.2f} / {b / raw_back:.2f}; {out.bytes / 1e9:.2f} GB, freed "
            f"{freed / 1e9:.2f} ({what})"
        )
    assert sums == [t.double().sum().item() for t in tensors], "other bits"
    return rows


def conformance() -> str:
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        try:
            driver = CudaDriver(["cuda0"])
        except LlmosError as exc:
            return f"not run: {exc.message} ({exc.hint})"
        entry = "llmos.services.programs.spin:Spin"
        return f"{len(asyncio.run(check_driver(driver, Path(home), entry=entry)))} checks passed"


def attempt(what: str, work: Callable[[], Any]) -> Any:
    """One part that fails must not cost the figures of the others."""
    try:
        return work()
    except Exception as exc:  # noqa: BLE001
        print(f"{what} failed: {type(exc).__name__}: {exc}", file=sys.stderr)
        return None


def main(layers: int = 16, tokens: int = 8192) -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return 2
    rows: list[tuple[str, Any]] = [("conformance", attempt("conformance", conformance))]
    made = attempt("gate", lambda: gate_cost(layers, tokens))
    if made is not None:
        training, cost = made
        millions = sum(p.numel() for p in training.model.parameters()) / 1e6
        rows += [("shape", f"{millions:.0f} M parameters, {tokens} tokens, eager, bf16 autocast"),
                 ("step", f"{1000 * step_s(training, STEPS):.0f} ms"),
                 ("gate, nobody asks", cost)]  # fmt: skip
        times = attempt("hold", lambda: hold_times(training))
        if times is not None:
            took, longest = times
            p = {q: 1000 * took[min(len(took) - 1, int(q * len(took)))] for q in (0.5, 0.99)}
            rows += [
                ("hold, ms", f"p50 {p[0.5]:.1f}, p99 {p[0.99]:.1f}, max {1000 * took[-1]:.1f}"),
                ("holds", f"{len(took)}; longest launch {1000 * longest:.1f} ms; target p99 <= 25"),
            ]
        with tempfile.TemporaryDirectory() as folder:
            found = attempt("moving", lambda: moving(training, Path(folder)))
        rows += [("out / back", row) for row in found or ["failed"]]
    gpu = torch.cuda.get_device_name(0)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version[:6]}"
    head = f"# {gpu}\n\n{versions}\n"
    lines = ["| what | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]
    table = "\n".join(lines)
    text = f"{head}\n{table}\n"
    print(text)
    folder = ROOT / "docs" / "benchmarks"
    folder.mkdir(exist_ok=True)
    name = f"{gpu.replace(' ', '-').lower()}-{datetime.date.today().isoformat()}.md"
    (folder / name).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:3])))
