"""Kill a training in a place, let another life go on from its checkpoints, and compare every bit.

tests/bench/exact_table.py prints the table.

A life is a program driven as a worker drives it, with the worker's own Saver. A kill is simulated:
an exception that nobody catches ends the life, and what it had in memory is not used again. Real
kills of real workers are in tests/fault.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmos.drivers.worker import checkpoint
from llmos.drivers.worker.saving import Plan, Saver
from llmos.kernel.units import Interval
from llmos.services.programs import lm_session
from llmos.services.programs.base import Done
from llmos.services.programs.finetune import Finetune
from llmos.services.programs.gan import Gan
from llmos.services.programs.pretrain import Pretrain
from llmos.services.programs.spin import Spin
from support.run_program import FakeContext, make_context
from support.small_models import make_gpt2, make_llama
from support.texts import story_file

PLACES = (
    "after the first step",
    "in the middle of a step",
    "right after a checkpoint",
    "while one is written",
    "at the epoch's end",
    "during validation",
    "in the final save",
)

# What is measured with a clock, and differs from run to run.
CLOCKS = {"tokens_per_s"}


class Killed(BaseException):
    """The life ends here."""


@dataclass(frozen=True)
class Row:
    """A training: what it runs, with which arguments. `inside` names the boundary in the middle of
    a step at which it is killed, and how many of these a step has."""

    program: str
    arch: str
    optimizer: str
    args: tuple[tuple[str, Any], ...] = ()
    inside: tuple[str, int] = ("micro-batch", 2)

    @property
    def name(self) -> str:
        return f"{self.program} {self.arch} {self.optimizer}".strip()

    def places(self) -> list[str]:
        no = {"spin": {"at the epoch's end", "during validation", "in the final save"},
              "gan": {"during validation"}}  # fmt: skip
        return [p for p in PLACES if p not in no.get(self.program, ())]


def rows() -> Iterator[Row]:
    for arch, optimizer in itertools.product(
        ("transformer", "rnn", "lstm", "gru"), ("adamw", "adamw8bit", "adam", "sgd")
    ):
        if arch == "transformer" or optimizer in ("adamw", "adamw8bit"):
            yield Row("pretrain", arch, optimizer)
    yield Row("pretrain", "transformer bfloat16", "adamw", (("dtype", "bfloat16"),))
    for arch, method in itertools.product(("llama", "gpt2"), ("full", "lora")):
        yield Row(f"finetune {method}", arch, "adamw", (("method", method),))
    yield Row("finetune full", "llama", "adamw8bit")
    yield Row("finetune pairs", "llama", "adamw", (("pairs", True),))
    yield Row("gan", "dcgan", "adam", inside=("generator", 1))
    yield Row("gan", "dcgan bfloat16", "adam", (("dtype", "bfloat16"),), ("generator", 1))
    yield Row("spin", "", "", inside=("product", 1))


@cache
def inputs() -> Path:
    """Texts, pairs, pictures and models, made once."""
    folder = Path(tempfile.mkdtemp(prefix="exact"))
    story_file(folder / "stories.txt", 40)
    pairs = (f'{{"prompt": "what is {i}?", "answer": "it is {i * i}"}}' for i in range(16))
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    np.savez(folder / "images.npz", np.random.default_rng(0).integers(0, 255, (24, 12, 12), "u1"))
    make_llama(folder / "llama")
    make_gpt2(folder / "gpt2")
    return folder


def build(row: Row) -> tuple[Any, int]:
    """-> (the program, its steps)."""
    args, here = dict(row.args), inputs()
    common = {"out": "m", "threads": 1}
    if row.program == "spin":
        return Spin(Spin.Args(steps=9, busy_ms=0.1, size=64, seed=3)), 9
    if row.program == "gan":
        shape = {"batch": 8, "latent": 8, "width": 8, "sample_every": 4}
        return Gan(Gan.Args(data=str(here / "images.npz"), steps=9, **shape, **common, **args)), 9
    training = {"steps": 9, "batch": 2, "accumulate": 2, "optimizer": row.optimizer,
                "val_fraction": 0.25, "eval_every": 4, **common}  # fmt: skip
    if row.program == "pretrain":
        made = {"arch": row.arch.split()[0], "width": 32, "layers": 2, "heads": 2,
                "vocab_size": 300, "context": 32, "dropout": 0.1}  # fmt: skip
        data = str(here / "stories.txt")
        return Pretrain(Pretrain.Args(data=data, **made, **training, **args)), 9
    data = str(here / ("pairs.jsonl" if args.pop("pairs", False) else "stories.txt"))
    tune = {
        "model": str(here / row.arch),
        "lora_dropout": 0.1,
        "context": 64 if row.program == "finetune pairs" else 32,
    }
    return Finetune(Finetune.Args(data=data, **tune, **training, **args)), 9


class Life:
    """One worker's time with a program. It writes a checkpoint after every `every` steps."""

    def __init__(self, row: Row, ctx: FakeContext, every: int = 2) -> None:
        self.row, self.ctx, self.root = row, ctx, ctx.work / "checkpoints"
        self.every = every
        self.curve: list[tuple[int, dict[str, float]]] = []
        self.restored: int | None = None
        self.program: Any = None
        self.steps_made = 0
        self.after_step: Callable[[], None] = lambda: None
        plan = Plan(Interval(steps=every), 2, True)
        self.saver = Saver(self.root, plan, "cpu", lambda f, s: None, self._no_note)

    def run(self) -> Done:
        """To the end, or to a Killed."""
        self.program, _ = build(self.row)
        self.program.load(self.ctx)
        found = checkpoint.newest(self.root, self._no_note)
        if found is not None:
            self.program.restore(found)
            self.saver.restored(found)
            self.restored = checkpoint.step_of(found)
        while True:
            self.saver.moved_on()
            outcome = self.program.step(self.ctx)
            if isinstance(outcome, Done):
                self.saver.end(wanted=False)
                return outcome
            self.steps_made += 1
            metrics = {k: v for k, v in outcome.metrics.items() if k not in CLOCKS}
            self.curve.append((outcome.step, metrics))
            if self.saver.stepped(outcome.step) and not self.saver.beside(
                self.program, outcome.step, lambda folder: None
            ):
                raise AssertionError("it should have been written beside the steps")
            self.after_step()

    def settle(self) -> None:
        """Until nothing is being written."""
        while self.saver.busy:
            threading.Event().wait(0.001)

    def _no_note(self, text: str) -> None:
        raise AssertionError(text)

    # ---- where it is killed ----

    def die_at(self, place: str) -> None:
        arrange = {
            "after the first step": self._after_the_first_step,
            "in the middle of a step": self._inside,
            "right after a checkpoint": self._after_a_checkpoint,
            "while one is written": self._while_writing,
            "at the epoch's end": self._at_the_epochs_end,
            "during validation": self._validating,
            "in the final save": self._at_the_end,
        }
        arrange[place]()

    def _after_the_first_step(self) -> None:
        def check() -> None:
            raise Killed

        self.after_step = check

    def _inside(self) -> None:
        """In the sixth step, in its last part."""
        name, parts = self.row.inside
        boundary = self.ctx.gate.boundary
        seen = 0

        def count(said: str) -> None:
            nonlocal seen
            seen += said == name and bool(self.curve) and self.curve[-1][0] == 5
            if seen == parts:
                raise Killed
            boundary(said)

        self.ctx.gate.boundary = count  # type: ignore[method-assign]
        self.after_step = self.settle

    def _after_a_checkpoint(self) -> None:
        def check() -> None:
            self.settle()
            if self.curve[-1][0] == 6:
                raise Killed

        self.after_step = check

    def _while_writing(self) -> None:
        """The one of step 6 is half written; meanwhile two more steps are made."""
        self.after_step = self._stop_at_six
        self._half = threading.Event()
        self._go_on = threading.Event()

    def _stop_at_six(self) -> None:
        step = self.curve[-1][0]
        if step == 5:
            self.settle()
            capture = self.program.capture

            def half(keep: Any) -> Callable[[Path], None]:
                write = capture(keep)

                def stop(folder: Path) -> None:
                    write(folder)
                    victim = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
                    with victim.open("r+b") as file:
                        file.truncate(victim.stat().st_size // 2)
                    self._half.set()
                    self._go_on.wait(60)

                return stop

            self.program.capture = half
        if step == 8:
            assert self._half.wait(60)
            # What a kill leaves on the disk; the thread that wrote it is then let go.
            dead = self.root.with_name("dead")
            shutil.copytree(self.root, dead)
            self._go_on.set()
            self.saver.end(wanted=False)
            shutil.rmtree(self.root)
            dead.rename(self.root)
            assert (self.root / checkpoint.WRITING).is_dir()
            raise Killed

    def _at_the_epochs_end(self) -> None:
        """Behind the checkpoint of a step that has used up the last example of an epoch, or gone on
        into the next one."""

        def check() -> None:
            self.settle()
            order = self._order()
            if (order.epoch or order.position == order.count) and self.curve[-1][0] % 2 == 0:
                raise Killed

        self.after_step = check

    def _order(self) -> Any:
        held = self.program if isinstance(self.program, Gan) else self.program.session
        return getattr(held, "order", None) or held._order

    def _validating(self) -> None:
        """Between two slices of the validation after step 4, which then is restored to."""

        def check() -> None:
            self.settle()
            place = self.program.session.place
            if place.phase == "validate" and place.evaluated:
                raise Killed

        self.after_step = check

    def _at_the_end(self) -> None:
        """The model is written; it is not registered yet."""

        def call(method: str, **arguments: Any) -> Any:
            raise Killed

        self.ctx.call = call  # type: ignore[method-assign]
        self.after_step = self.settle


@dataclass
class Whole:
    """What a run comes to that nobody disturbs."""

    curve: list[tuple[int, dict[str, float]]]
    result: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)


def files_of(ctx: FakeContext, done: Done) -> dict[str, str]:
    """The weights and pictures of a run, by what is in them."""
    found = {}
    for folder in (Path(done.result.get("folder", "/nowhere")), ctx.work / "samples"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".png"):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(folder).as_posix()] = digest
    return found


def result_of(done: Done) -> dict[str, Any]:
    return {k: v for k, v in done.result.items() if k not in ("folder", "seconds")}


@cache
def whole(row: Row) -> Whole:
    with tempfile.TemporaryDirectory() as folder:
        ctx = make_context(Path(folder), threads=1)
        life = Life(row, ctx)
        done = life.run()
        return Whole(life.curve, result_of(done), files_of(ctx, done))


def differences(row: Row, place: str, folder: Path) -> list[str]:
    """What is other than in the undisturbed run when this one is killed in this place."""
    saved, lm_session.EVALUATION_SLICE_S = lm_session.EVALUATION_SLICE_S, 1e-9
    try:
        return _differences(row, place, folder)
    finally:
        lm_session.EVALUATION_SLICE_S = saved


def _differences(row: Row, place: str, folder: Path) -> list[str]:
    calm = whole(row)
    first = Life(row, make_context(folder, threads=1))
    first.die_at(place)
    try:
        first.run()
    except Killed:
        first.settle()
    else:
        return ["it was not killed"]
    torch.manual_seed(0)  # as a new worker: nothing is left of the first one's generators
    ctx = make_context(folder, threads=1)
    second = Life(row, ctx)
    done = second.run()
    found = []
    if (second.restored is None) is not (place == "after the first step"):
        found.append(f"restored at {second.restored}")
    if first.curve != calm.curve[: len(first.curve)]:
        found.append("the curve before the kill")
    if second.curve != calm.curve[len(calm.curve) - len(second.curve) :]:
        found.append("the curve after it")
    if len(first.curve) + len(second.curve) < len(calm.curve):
        found.append("steps are missing")
    if result_of(done) != calm.result:
        found.append(f"the result: {result_of(done)}, not {calm.result}")
    files = files_of(ctx, done)
    if files != calm.files or (row.program != "spin" and not files):
        found.append("weights or pictures")
    return found
