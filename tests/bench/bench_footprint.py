"""Predicted peaks of memory against measured ones, over families, shapes, optimizers and uses.

    python tests/bench/bench_footprint.py [part of a case's name]

Each case runs in a fresh fork of a process that has imported what the zygote imports: a training
from its load over some steps, a checkpoint, validation and export; an engine over whole answers.
Measured is the private memory above that of an idle worker (the same fork, before it loads
anything): the peak of RssAnon, read every two milliseconds, and once, at the end, the pages that
the fork has copied from its parent, which RssAnon counts as old. Predicted are the segments of the
program's plan that are not shared.

    error = |predicted - measured| / max(measured, 16 MiB)

"under" counts cases that exceed the promise: predicted + 10 % + 64 MiB.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.drivers.cpu import procfs
from llmos.drivers.worker import zygote
from llmos.drivers.zygote import environment
from llmos.services.programs.base import Footprint
from support.run_program import FakeContext, Run, admit

MIB = 1 << 20
FLOOR = 16 * MIB
STEPS = 4
SAMPLE_S = 0.002
LIMITS = {"median": 0.05, "p95": 0.15}


@dataclass(frozen=True)
class Case:
    """`program`: pretrain, finetune, gan or engine; `guests` and `tokens` are an engine's load."""

    name: str
    program: str
    args: dict[str, Any] = field(default_factory=dict)
    guests: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Outcome:
    case: Case
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Signed: below 0 the prediction was too low."""
        return (self.predicted - self.measured) / max(self.measured, FLOOR)

    @property
    def breaks_promise(self) -> bool:
        return self.measured > 1.1 * self.predicted + 64 * MIB


# ---- the grid ----

SHAPES = ((4, 64), (16, 128), (8, 256))


def cases(folder: Path) -> Iterator[Case]:
    yield from _transformers(folder)
    yield from _recurrent(folder)
    yield from _pretrained(folder)
    for width, batch, dtype in (
        (32, 64, "float32"), (64, 64, "float32"), (32, 256, "float32"), (64, 128, "float32"),
        (32, 64, "bfloat16"), (64, 128, "bfloat16"),
    ):  # fmt: skip
        args = {"data": str(folder / "images.npz"), "width": width, "batch": batch, "dtype": dtype}
        yield Case(f"gan w{width} b{batch} {dtype}", "gan", args)
    for model, dtype in (
        ("llama", "float32"), ("llama", "bfloat16"), ("wide", "float32"), ("wide", "bfloat16"),
        ("gpt2", "float32"), ("lstm", "float32"), ("llama", "int8"), ("wide", "int8"),
    ):  # fmt: skip
        for guests, tokens in ((1, 100), (4, 400)):
            args = {"model": str(folder / model), "dtype": dtype}
            yield Case(f"infer {model} {guests}x{tokens} {dtype}", "engine", args, guests, tokens)


def _transformers(folder: Path) -> Iterator[Case]:
    def case(model: str, batch: int, context: int, **args: Any) -> Case:
        words = " ".join(str(v) for v in {"optimizer": "adamw", **args}.values() if v is not True)
        words += " checkpointing" if "gradient_checkpointing" in args else ""
        shape = {"model": str(folder / model), "batch": batch, "context": context}
        given = {"dtype": "float32", **shape, **args}
        return Case(f"train {model} {batch}x{context} {words}", "finetune", given)

    for batch, context in SHAPES:
        for optimizer in ("adamw", "sgd", "adamw8bit"):
            yield case("llama", batch, context, optimizer=optimizer)
        yield case("llama", batch, context, gradient_checkpointing=True)
        yield case("llama", batch, context, dtype="bfloat16")
        yield case("llama", batch, context, method="lora")
        yield case("gpt2", batch, context)
    yield case("llama", 16, 128, method="lora", gradient_checkpointing=True)
    yield case("llama", 16, 128, method="lora", dtype="bfloat16")
    yield case("gpt2", 16, 128, optimizer="sgd")
    yield case("gpt2", 16, 128, gradient_checkpointing=True)
    yield case("gpt2", 16, 128, method="lora")
    for batch, context in ((4, 128), (8, 256)):
        yield case("wide", batch, context)
        yield case("wide", batch, context, method="lora")
    for dtype in ("float32", "bfloat16"):  # rows of many lengths, and time for each to be seen
        pairs = {"data": str(folder / "pairs.jsonl"), "steps": 60}
        yield replace(
            case("llama", 16, 64, dtype=dtype, **pairs), name=f"train pairs 16x64 {dtype}"
        )
    yield case("wide", 4, 128, optimizer="adamw8bit")
    yield case("wide", 8, 256, gradient_checkpointing=True)


def _recurrent(folder: Path) -> Iterator[Case]:
    for arch in ("rnn", "lstm", "gru"):
        for batch, context, optimizer in ((4, 64, "adamw"), (16, 128, "adamw"), (8, 256, "adamw"),
                                          (16, 128, "sgd")):  # fmt: skip
            args = {"arch": arch, "batch": batch, "context": context, "optimizer": optimizer}
            yield Case(f"train {arch} {batch}x{context} {optimizer}", "pretrain", args)


def _pretrained(folder: Path) -> Iterator[Case]:
    for args in ({"batch": 16}, {"batch": 32}, {"batch": 8, "accumulate": 4}):
        name = " ".join(f"{k} {v}" for k, v in args.items())
        yield Case(f"train transformer {name}", "pretrain", args)


# ---- what they run on ----


def make_material(folder: Path) -> None:
    """Text, images, a tokenizer and models with random weights, as ordinary model folders."""
    import numpy as np
    import torch
    from transformers import GPT2Config, LlamaConfig

    from llmos.services.data.base import Document
    from llmos.services.data.tokenizer import train_tokenizer
    from llmos.services.model.recurrent import LstmConfig
    from support.texts import story_file, story_lines

    story_file(folder / "text.txt", 12_000)
    pairs = [{"question": f"What is {n}?", "answer": "It is " + "one more than " * (n % 37) + "."}
             for n in range(600)]  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    images = np.random.default_rng(0).integers(0, 255, (4000, 28, 28), np.uint8)
    np.savez(folder / "images.npz", images)
    tokenizer = train_tokenizer([Document("\n".join(story_lines(500)))], 2048, 512)
    torch.manual_seed(0)
    vocabulary = 2048
    llama = {"vocab_size": vocabulary, "max_position_embeddings": 512}
    configs: dict[str, Any] = {
        "llama": LlamaConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                             num_attention_heads=4, tie_word_embeddings=True, **llama),
        "wide": LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                            num_attention_heads=8, num_key_value_heads=2, **llama),
        "gpt2": GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=512,
                           vocab_size=vocabulary),
        "lstm": LstmConfig(hidden_size=256, num_hidden_layers=3, vocab_size=vocabulary),
    }  # fmt: skip
    for name, config in configs.items():
        for special in ("bos", "eos", "pad"):
            setattr(config, f"{special}_token_id", tokenizer.eos_token_id)
        _save(config, folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")


def _save(config: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def arguments(case: Case, folder: Path) -> dict[str, Any]:
    if case.program == "gan":
        return {"out": "made", "steps": STEPS, **case.args}
    usual = {"data": str(folder / "text.txt"), "out": "made", "steps": STEPS, "val_fraction": 0.01}
    if case.program == "pretrain":
        usual |= {"tokenizer": str(folder / "tokenizer"), "dtype": "float32"}
    return {**usual, **case.args}


# ---- predict ----


def predict(case: Case, folder: Path) -> int:
    """Private bytes of the plan."""
    if case.program == "engine":
        from llmos.services.engine.plan import kv_bytes, plan_engine
        from llmos.services.engine.weights import kind_and_dtype
        from llmos.services.model.load import load_config

        config = load_config(case.args["model"])
        _, dtype = kind_and_dtype(config, case.args["dtype"], "cpu")
        # What its guests will have, not what they might have.
        kv = case.guests * kv_bytes(config.get_text_config(), dtype, case.tokens)
        footprint = plan_engine(case.args["model"], case.args["dtype"], kv)
    else:
        program = _program(case.program)
        footprint = program.plan(program.Args(**arguments(case, folder)))
    return _private(footprint)


def _private(footprint: Footprint) -> int:
    return sum(s.bytes for s in footprint.segments if not s.shared)


def _program(name: str) -> Any:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="llmos.programs", name=name)
    return entry.load()


# ---- measure ----


def work(case: Case, folder: Path) -> None:
    """In a fork: what a worker does with such a program."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").mkdir()
        ctx = FakeContext(home=Path(home))
        if case.program == "engine":
            _serve(case, ctx)
            return
        run = Run.start(_program(case.program), ctx, **arguments(case, folder))
        run.steps(case.args.get("steps", STEPS) - 1)
        run.save(ctx.work / "checkpoint")
        run.to_end()


def _serve(case: Case, ctx: FakeContext) -> None:
    run = Run.start(_program("engine"), ctx, **case.args)
    prompt = "One day Ann saw a red ball. " * case.tokens
    ids = run.program._host._loaded.tokenizer(prompt).input_ids  # type: ignore[attr-defined]
    tokenizer = run.program._host._loaded.tokenizer  # type: ignore[attr-defined]
    text = tokenizer.decode(ids[: case.tokens - 24])
    for pid in range(1, case.guests + 1):
        prompt = f"{pid} {text}"  # they share nothing
        admit(run, pid, "infer", model=case.args["model"], prompt=prompt, max_tokens=20)
    run.until_idle()


def measure(case: Case, folder: Path) -> int:
    """The peak of private memory above an idle worker, in bytes. Raises RuntimeError."""
    told, tell = os.pipe()
    heard, go = os.pipe()
    os_pid = os.fork()
    if os_pid == 0:
        _child(case, folder, tell, heard)
    for end in (tell, heard):
        os.close(end)
    os.read(told, 1)
    idle_anonymous, idle_private = _anonymous(os_pid), procfs.private_bytes(os_pid)
    os.write(go, b"g")
    os.set_blocking(told, False)
    peak = 0
    while True:
        peak = max(peak, _anonymous(os_pid))
        try:
            said = os.read(told, 1)
            break
        except BlockingIOError:
            time.sleep(SAMPLE_S)
    copied = 0
    if said:
        grown = _anonymous(os_pid) - idle_anonymous
        copied = procfs.private_bytes(os_pid) - idle_private - grown
        os.write(go, b"g")
    for end in (told, go):
        os.close(end)
    _, status = os.waitpid(os_pid, 0)
    if not said or status:
        raise RuntimeError(f"{case.name}: the worker failed")
    return peak - idle_anonymous + copied


def _child(case: Case, folder: Path, tell: int, heard: int) -> None:
    status = 1
    try:
        import torch

        torch.set_num_threads(2)
        os.write(tell, b"i")
        os.read(heard, 1)
        work(case, folder)
        os.write(tell, b"d")
        os.read(heard, 1)
        status = 0
    except Exception:  # noqa: BLE001  (told by the status)
        traceback.print_exc()
    finally:
        os._exit(status)


def _anonymous(os_pid: int) -> int:
    for line in Path(f"/proc/{os_pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # it has just ended


def in_a_fork(do: Callable[[], Any]) -> Any:
    """What `do` returns, as JSON carries it; torch's threads and caches stay in the child."""
    read, write = os.pipe()
    os_pid = os.fork()
    if os_pid == 0:
        status = 1
        try:
            os.write(write, json.dumps(do()).encode())
            status = 0
        except Exception:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        text = answer.read()
    _, status = os.waitpid(os_pid, 0)
    if status:
        raise RuntimeError("a fork failed")
    return json.loads(text)


# ---- report ----


def report(outcomes: list[Outcome], plan_s: list[float]) -> bool:
    """Print the figures -> whether they are within the limits."""
    sizes = sorted(abs(o.error) for o in outcomes)
    p95 = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]
    under = [o for o in outcomes if o.breaks_promise]
    median = statistics.median(sizes)
    print(f"\n{len(outcomes)} cases: median {median:.1%}, p95 {p95:.1%}, worst {sizes[-1]:.1%}, "
          f"under by more than the margin: {len(under)}")  # fmt: skip
    print(f"plan: median {statistics.median(plan_s):.2f} s, longest {max(plan_s):.2f} s")
    print("worst:")
    for o in sorted(outcomes, key=lambda o: -abs(o.error))[:8]:
        print(f"  {o.case.name:<52} {o.error:+.1%}")
    return median <= LIMITS["median"] and p95 <= LIMITS["p95"] and not under


def versions() -> str:
    import torch
    import transformers

    libc = " ".join(platform.libc_ver())
    return (f"torch {torch.__version__}, transformers {transformers.__version__}, {libc}, "
            f"Python {platform.python_version()}, {os.cpu_count()} CPUs {platform.machine()}, "
            f"Linux {platform.release()}")  # fmt: skip


def main(part: str = "") -> bool:
    zygote.preload()
    print(versions())
    outcomes, plan_s = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_a_fork(lambda: make_material(folder))
        print(f"{'case':<52} {'predicted':>9} {'measured':>9} {'error':>7}")
        for case in cases(folder):
            if part not in case.name:
                continue
            began = time.perf_counter()
            predicted = in_a_fork(lambda case=case: predict(case, folder))
            plan_s.append(time.perf_counter() - began)
            outcome = Outcome(case, predicted, measure(case, folder))
            outcomes.append(outcome)
            print(f"{case.name:<52} {predicted / MIB:7.0f} M {outcome.measured / MIB:7.0f} M "
                  f"{outcome.error:+7.1%}", flush=True)  # fmt: skip
    return report(outcomes, plan_s)


if __name__ == "__main__":
    if "BENCH_FOOTPRINT" not in os.environ:  # as workers have it: libraries read it as they load
        wanted = {**environment(os.environ), "BENCH_FOOTPRINT": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)
    sys.exit(0 if main(*sys.argv[1:]) else 1)
