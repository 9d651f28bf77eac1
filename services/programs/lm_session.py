# ruff: noqa: TID253  (imported lazily, by workers only)
"""A training from its first step to the finished model: train, validate, export.

It does not know how the model was made or where the data came from.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmos.kernel.errors import BadInput
from llmos.services.data.order import Order
from llmos.services.data.packing import Subset
from llmos.services.programs import lm_state
from llmos.services.programs.base import Context, Done, Report
from llmos.services.programs.lm_args import TrainingArgs
from llmos.services.programs.lm_data import Prepared
from llmos.services.programs.lm_loop import Loop
from llmos.services.programs.lm_weights import Weights

STATE = "state.json"

# Validation looks at no more tokens than this, evenly spread: its end is worth waiting for.
EVALUATION_TOKENS = 131_072

# One call of `step` validates for about this long: a safepoint is never far.
EVALUATION_SLICE_S = 0.5


@dataclass(frozen=True)
class Place:
    """Where a run is. `phase` is train, validate, export; the sums are those of a validation."""

    phase: str = "train"
    step: int = 0
    elapsed_s: float = 0.0
    evaluated: int = 0  # examples of the validation that is going on
    loss_sum: float = 0.0
    labels: int = 0


class Session:
    """One run. `step`, `save` and `restore` are those of the program contract."""

    def __init__(
        self,
        ctx: Context,
        args: TrainingArgs,
        weights: Weights,
        loop: Loop,
        data: Prepared,
        steps: int,
        made_by: dict[str, Any],
    ) -> None:
        self.ctx, self.args, self.weights, self.loop, self.data = ctx, args, weights, loop, data
        self.steps = steps
        self.made_by = made_by
        self.order = Order(len(data.training), args.seed)
        self.place = Place()
        self._trained: dict[str, float] = {}  # the metrics of the last step
        self._held_out = _spread(data.validation, EVALUATION_TOKENS // args.context)
        self._clock: float | None = None

    def step(self) -> Report | Done:
        if self.place.phase == "train":
            return self._train()
        if self.place.phase == "validate":
            return self._validate()
        return self._export()

    def _train(self) -> Report:
        self._tick()
        progress = self._progress(self.place.step + 1)
        indices = self.order.take(self.args.batch * self.args.accumulate)
        measured = self.loop.train(self.data.training, indices, progress)
        step = self.place.step + 1
        if not math.isfinite(measured.loss):
            raise BadInput(
                f"the training diverged: the loss is {measured.loss} at step {step}",
                f"lower --lr (it is {self.args.lr:g}), or clip gradients harder (--grad-clip)",
            )
        self._tick()
        self.place = replace(self.place, step=step)
        ended = self._progress(step) >= 1.0
        due = self.args.eval_every > 0 and step % self.args.eval_every == 0
        if ended or due:
            self.place = replace(self.place, phase="validate")
        metrics = {
            "loss": measured.loss,
            "tokens_per_s": measured.tokens_per_s,
            "lr": measured.lr,
        }
        self._trained = metrics
        return Report(step, self._expected_steps(), metrics)

    def _validate(self) -> Report:
        until = time.perf_counter() + EVALUATION_SLICE_S
        while self.place.evaluated < len(self._held_out):
            at = self.place.evaluated
            indices = self._held_out[at : at + self.args.batch]
            loss, labels = self.loop.evaluate(self.data.validation, indices)
            self.place = replace(
                self.place,
                evaluated=at + len(indices),
                loss_sum=self.place.loss_sum + loss,
                labels=self.place.labels + labels,
            )
            if time.perf_counter() >= until:
                break
        metrics = self._evaluation()
        if self.place.evaluated == len(self._held_out):
            self._end_validation(metrics)
        # Beside the step's own, under names of their own: a curve of the loss must stay one.
        held_out = {f"val_{name}": value for name, value in metrics.items()}
        return Report(self.place.step, self._expected_steps(), {**self._trained, **held_out})

    def _end_validation(self, metrics: dict[str, float]) -> None:
        ended = self._progress(self.place.step) >= 1.0
        if metrics:
            self.ctx.emit("eval", step=self.place.step, metrics=metrics)
        if ended:
            self.place = replace(self.place, phase="export")
        else:
            self.place = Place(step=self.place.step, elapsed_s=self.place.elapsed_s)

    def _evaluation(self) -> dict[str, float]:
        if not self.place.labels:
            return {}
        loss = self.place.loss_sum / self.place.labels
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def _export(self) -> Done:
        folder = self.ctx.home / "models" / f".partial-{self.ctx.pid}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.weights.export(folder)
        self.data.tokenizer.save_pretrained(folder)
        registered = self.ctx.call(
            "models.register",
            name=self.args.out,
            folder=str(folder),
            kind="causal-lm",
            made_by={"pid": self.ctx.pid, **self.made_by},
            overwrite=self.args.overwrite,
        )
        result = {
            "model": registered["name"],
            "folder": registered["folder"],
            "steps": self.place.step,
            **self._evaluation(),
        }
        return Done(result=result)

    # -- time

    def _tick(self) -> None:
        """Wall time since the tick before counts; time without a worker does not."""
        now = time.monotonic()
        if self._clock is not None:
            elapsed_s = self.place.elapsed_s + now - self._clock
            self.place = replace(self.place, elapsed_s=elapsed_s)
        self._clock = now

    def _progress(self, step: int) -> float:
        part = step / self.steps
        if self.args.time_limit_s:
            part = max(part, self.place.elapsed_s / self.args.time_limit_s)
        return min(1.0, part)

    def _expected_steps(self) -> int:
        """How many steps there will be; with a time limit, by the speed so far."""
        progress = self._progress(self.place.step)
        return max(self.place.step, round(self.place.step / progress))

    # -- checkpoints

    def save(self, folder: Path) -> None:
        self.weights.save(folder)
        self.data.tokenizer.save_pretrained(folder)
        state = {
            "place": vars(self.place),
            "order": self.order.state(),
            "data": self.data.digest,
            "optimizer": lm_state.save_optimizer(self.loop.optimizer, folder),
            "random": lm_state.save_random(folder),
            "machine": self._machine(),
        }
        (folder / STATE).write_text(json.dumps(state))

    def restore(self, folder: Path) -> None:
        state = json.loads((folder / STATE).read_text())
        if state["data"] != self.data.digest:
            raise BadInput(
                "the data of this training changed since its checkpoint",
                "bring the old data back, or start a new training with this model",
            )
        self._compare_machines(state["machine"])
        self.weights.restore(folder)
        lm_state.restore_optimizer(self.loop.optimizer, folder, state["optimizer"])
        self.order.restore(state["order"])
        self.place = Place(**state["place"])
        self._clock = None
        lm_state.restore_random(folder, state["random"])

    def _machine(self) -> dict[str, Any]:
        """What the bits of a run depend on, beside its arguments."""
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "dtype": self.loop.accelerator.mixed_precision,
            "compiled": False,
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "device": self.loop.accelerator.device.type,
        }

    def _compare_machines(self, saved: dict[str, Any]) -> None:
        # The number of threads belongs to the run: it comes from its first worker.
        torch.set_num_threads(int(saved["threads"]))
        for key, now in self._machine().items():
            if saved.get(key) != now:
                text = f"restored with {key} {now}, saved with {saved.get(key)}"
                self.ctx.emit("note", text=f"{text}: the results may differ in the last bits")


def _spread(examples: Subset, most: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """At most `most` indices, evenly spread over the examples."""
    count = len(examples)
    return np.unique(np.linspace(0, count - 1, min(count, max(1, most))).astype(np.int64))
