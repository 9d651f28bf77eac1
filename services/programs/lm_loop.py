# ruff: noqa: TID253  (imported lazily, by workers only)
"""One step of a training, and the loss on held-out examples.

It does not know where examples come from, when a run ends, or what a checkpoint is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from llmos.services.data.packing import IGNORE, Examples
from llmos.services.model import safepoints
from llmos.services.model.load import resolve_dtype
from llmos.services.optim import optimizers, pieces, schedules
from llmos.services.programs.base import Context
from llmos.services.programs.lm_args import TrainingArgs
from llmos.services.programs.lm_gang import Gang


@dataclass(frozen=True)
class Measured:
    """What a step reports."""

    loss: float
    tokens_per_s: float
    lr: float


class Loop:
    """A model with its optimizer. The weights are float32; products run in `dtype`.

    In a gang every rank has one: they are given the same examples and end with the same weights.
    """

    def __init__(
        self, model: torch.nn.Module, args: TrainingArgs, ctx: Context, gang: Gang
    ) -> None:
        dtype = resolve_dtype(args.dtype, ctx.device)
        # accelerate keeps its settings for the whole OS process; a worker has one training.
        AcceleratorState._reset_state(reset_partial_state=True)
        precision = "bf16" if dtype is torch.bfloat16 else "no"
        self.accelerator = Accelerator(cpu=ctx.device == "cpu", mixed_precision=precision)
        self.args = args
        self.micro_batch = args.batch  # less after a `shrink`
        self.peak_lr = args.lr
        self._clock = ctx.clock  # tokens per second are per second of the device
        self.gang = gang
        self._gate = ctx.gate
        self.model = model.to(self.accelerator.device)
        self._wrapped = gang.wrap(self.model)
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in trainable]
        self.optimizer = optimizers.build(args.optimizer, trainable, args.lr, args.weight_decay)
        self._earlier: torch.Tensor | None = None
        safepoints.install(self.model, ctx.gate)

    def train(
        self, examples: Examples, indices: npt.NDArray[np.int64], progress: float
    ) -> Measured:
        """One step on the examples, in micro-batches: the mean loss over all labels moves it.

        `progress` in [0, 1] sets the learning rate. On CUDA the loss of the step before is
        reported: to ask for this one would make the CPU wait for the device.
        """
        began = self._clock()
        self.model.train()
        factor = schedules.factor(self.args.schedule, progress, self.args.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor
        targets = sum(examples.targets(int(i)) for i in indices)
        losses, seen = [], 0
        size = self.micro_batch * self.gang.size
        for start in range(0, len(indices), size):
            mine = self.gang.part(indices[start : start + size], self.micro_batch)
            inputs, labels = examples.batch(mine)
            self._gate.boundary("micro-batch")
            with self.gang.gathering(self._wrapped, last=start + size >= len(indices)):
                with self.accelerator.autocast():
                    loss = self._sum_of_losses(self._wrapped, inputs, labels) / max(1, targets)
                # The gradients of the ranks are averaged, and are to be summed.
                self.accelerator.backward(loss * self.gang.size)
            losses.append(loss.detach())
            seen += inputs.size
        if self.args.grad_clip:
            self._gate.boundary("clip")
            torch.nn.utils.clip_grad_norm_(self.parameters, self.args.grad_clip)
        pieces.step(self.optimizer, self._gate)
        # In a gang they lie in the buckets that are summed, and stay there.
        self.optimizer.zero_grad(set_to_none=self.gang.size == 1)
        loss = self.gang.sum(torch.stack(losses).sum() if len(losses) > 1 else losses[0])
        total = self._reported(loss)
        seen *= self.gang.size  # the others have as much to do, about
        return Measured(total, seen / max(1e-9, self._clock() - began), self.peak_lr * factor)

    @torch.no_grad()
    def evaluate(self, examples: Examples, indices: npt.NDArray[np.int64]) -> tuple[float, int]:
        """(sum of the losses, number of labels) over the examples, without dropout."""
        self.model.eval()
        mine = self.gang.part(indices, self.micro_batch)
        loss, count = 0.0, 0
        if len(mine):
            inputs, labels = examples.batch(mine)
            with self.accelerator.autocast():
                loss = float(self._sum_of_losses(self.model, inputs, labels))
            count = int((labels != IGNORE).sum())
        total, labelled = self.gang.sums(loss, count)
        return total, int(labelled)

    def _sum_of_losses(
        self,
        model: torch.nn.Module,
        inputs: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        device = self.accelerator.device
        ids = torch.from_numpy(np.ascontiguousarray(inputs)).to(device, non_blocking=True)
        wanted = torch.from_numpy(np.ascontiguousarray(labels)).to(device, non_blocking=True)
        logits = model(input_ids=ids, use_cache=False).logits
        self._gate.boundary("loss")
        return F.cross_entropy(
            logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORE, reduction="sum"
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that the next step needs of the device."""
        yield from safepoints.tensors_of(self.model)
        yield from pieces.tensors_of(self.optimizer)
        if self._earlier is not None:
            yield self._earlier

    @property
    def unreported(self) -> float | None:
        """The loss of the last step, where it is reported with the next one only."""
        return None if self._earlier is None else self._earlier.item()

    @unreported.setter
    def unreported(self, loss: float | None) -> None:
        device = self.accelerator.device
        self._earlier = None if loss is None else torch.tensor(loss, device=device)

    def _reported(self, loss: torch.Tensor) -> float:
        if loss.device.type == "cpu":
            return loss.item()
        before, self._earlier = self._earlier, loss
        return (loss if before is None else before).item()
