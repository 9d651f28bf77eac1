# ruff: noqa: TID253  (imported lazily, by workers only)
"""A training from its first step to the finished model: train, validate, export.

It does not know how the model was made or where the data came from.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmos.kernel.errors import BadInput
from llmos.services.data.order import Order
from llmos.services.data.packing import Subset
from llmos.services.programs import conditions, lm_state
from llmos.services.programs.base import Context, Done, Keep, Report, as_it_is
from llmos.services.programs.lm_args import TrainingArgs
from llmos.services.programs.lm_data import Prepared
from llmos.services.programs.lm_loop import Loop
from llmos.services.programs.lm_weights import Weights

STATE = "state.json"
RANK_STATE = "rank-{}.json"  # of ranks other than the first

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
        self.gang = loop.gang
        self._step_size = args.batch * args.accumulate * self.gang.size  # examples
        self.order = Order(len(data.training), args.seed)
        self.place = Place()
        self.shrunk: list[dict[str, int]] = []  # step and micro-batch of each `shrink`
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
        indices = self.order.take(self._step_size)
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
            indices = self._held_out[at : at + self.loop.micro_batch * self.gang.size]
            loss, labels = self.loop.evaluate(self.data.validation, indices)
            self.place = replace(
                self.place,
                evaluated=at + len(indices),
                loss_sum=self.place.loss_sum + loss,
                labels=self.place.labels + labels,
            )
            if self.gang.as_first(time.perf_counter() >= until):
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
        if not self.gang.leads:
            return Done()  # rank 0 writes the model, which is the same on all
        folder = self.ctx.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.weights.export(folder)
        self.data.tokenizer.save_pretrained(folder)
        registered = self.ctx.call(
            "models.register",
            name=self.args.out,
            folder=str(folder),
            kind=self.weights.kind,
            made_by={"pid": self.ctx.pid, **self.made_by, **self._shrunk()},
            overwrite=self.args.overwrite,
        )
        result = {
            "model": registered["name"],
            "folder": registered["folder"],
            "steps": self.place.step,
            **self._evaluation(),
            **self._shrunk(),
        }
        return Done(result=result)

    # -- memory

    def shrink(self) -> bool:
        """Halve the micro-batch and accumulate twice as often: the batch of a step stays.

        Only where --may-shrink allows it: sums are made in another order, so the result is no
        longer that of the arguments to the last bit. It is said, and kept with the model.
        """
        before = self.loop.micro_batch
        # All ranks of a gang are told between the same two steps, and decide alike.
        if not self.args.may_shrink or before < 2:
            return False
        self.loop.micro_batch = (before + 1) // 2
        self.shrunk.append({"step": self.place.step, "micro_batch": self.loop.micro_batch})
        text = (
            f"micro-batch {before} -> {self.loop.micro_batch} after step {self.place.step}, to "
            f"take less memory; a step has as many examples as before, its sums another order"
        )
        self.ctx.emit("note", text=text)
        return True

    def _shrunk(self) -> dict[str, Any]:
        return {"shrunk": self.shrunk} if self.shrunk else {}

    # -- time

    def _tick(self) -> None:
        """Wall time since the tick before counts; time without a worker does not."""
        now = time.monotonic()
        if self._clock is not None:
            elapsed_s = self.place.elapsed_s + now - self._clock
            if self.args.time_limit_s:  # the end, and the learning rate, hang on it
                elapsed_s = self.gang.as_first(elapsed_s)
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
        """Rank 0 writes what is the same on all, the others where their generators are."""
        if self.gang.leads:
            self.capture(as_it_is)(folder)
            return
        rank = self.gang.rank
        states, plain = lm_state.capture_random()
        lm_state.write(states, folder / lm_state.random_file(rank))
        (folder / RANK_STATE.format(rank)).write_text(json.dumps(plain))

    def capture(self, keep: Keep) -> Callable[[Path], None]:
        weights = self.weights.capture(keep)
        moments, optimizer = lm_state.capture_optimizer(self.loop.optimizer, keep)
        generators, random = lm_state.capture_random()
        state = {
            "place": vars(self.place),
            "shrunk": self.shrunk,
            "trained": self._trained,
            "unreported": self.loop.unreported,
            "order": self.order.state(),
            "data": self.data.digest,
            "optimizer": optimizer,
            "random": random,
            "machine": self.machine(),
        }
        text = json.dumps(state)

        def write(folder: Path) -> None:
            weights(folder)
            self.data.tokenizer.save_pretrained(folder)
            lm_state.write(moments, folder / lm_state.OPTIMIZER)
            lm_state.write(generators, folder / lm_state.random_file())
            (folder / STATE).write_text(text)

        return write

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
        self.shrunk = state.get("shrunk", [])  # checkpoints of 0.1 have none
        if self.shrunk:
            self.loop.micro_batch = self.shrunk[-1]["micro_batch"]
        self._trained = state.get("trained", {})
        self.loop.unreported = state.get("unreported")
        self._clock = None
        rank, plain = self.gang.rank, state["random"]
        if not self.gang.leads:
            plain = json.loads((folder / RANK_STATE.format(rank)).read_text())
        lm_state.restore_random(folder, plain, rank)

    def machine(self) -> dict[str, Any]:
        """What the bits of a run depend on, beside its arguments."""
        dtype = self.loop.accelerator.mixed_precision
        return conditions.now(self.loop.accelerator.device, dtype)

    def _compare_machines(self, saved: dict[str, Any]) -> None:
        # The number of threads belongs to the run: it comes from its first worker.
        torch.set_num_threads(int(saved["threads"]))
        text = conditions.differences(saved, self.machine())
        if text:
            self.ctx.emit("note", text=text)


def _spread(examples: Subset, most: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """At most `most` indices, evenly spread over the examples."""
    count = len(examples)
    return np.unique(np.linspace(0, count - 1, min(count, max(1, most))).astype(np.int64))
