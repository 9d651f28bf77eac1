# ruff: noqa: TID253  (only scripts that train with transformers import this module)
"""Three lines in a script with transformers' Trainer: progress, safepoints, checkpoints.

    from llmos.services.trainer import LlmosCallback, checkpoint

    trainer = Trainer(..., callbacks=[LlmosCallback()])
    trainer.train(resume_from_checkpoint=checkpoint())

A checkpoint is the Trainer's own (model, optimizer, schedule, random generators, place in the
data), taken into llmos's folder, where it has checksums and survives the rotation of
`save_total_limit`. Without llmos nothing changes: the callback is silent, `checkpoint()` is None.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmos.services.steps import Run, current


def checkpoint() -> str | None:
    """The folder to go on from, for `train(resume_from_checkpoint=...)`; None: from the start."""
    run = current()
    if run.folder is None:
        return None
    folder, run.folder = run.folder, None
    return str(folder)


class LlmosCallback(TrainerCallback):
    """Progress with the Trainer's logs; a safepoint after every optimizer step.

    A process that is to stop does so right after its checkpoint, by SystemExit: `train()` does not
    return, since what comes after it would take a model in the middle for a finished one.
    """

    def __init__(self) -> None:
        self._run: Run | None = None
        self._folder: Path | None = None  # where the checkpoint that is being made belongs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        run = current()
        if not run.connected or not state.is_world_process_zero:
            return
        if run.folder is not None:
            raise RuntimeError(
                f"there is a checkpoint in {run.folder}: give it to the Trainer by "
                "train(resume_from_checkpoint=checkpoint())"
            )
        self._run = run
        run.step, run.total = state.global_step, state.max_steps
        # Without the optimizer's state nothing could go on exactly.
        run.ready(can_save=not args.save_only_model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        run = self._run
        if run is None:
            return
        run.step = state.global_step
        run.tell_now_and_then()
        if run.asked():
            self._folder = run.at_safepoint()
            control.should_save = control.should_save or self._folder is not None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._run is not None:
            numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
            self._run.metrics.update(numbers)
            self._run.tell()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._run is None or self._folder is None:
            return
        made = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        take_in(made, self._folder)
        self._folder = self._run.written()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._run is not None:
            self._run.tell()
            self._run.ready(can_save=False)


def take_in(made: Path, folder: Path) -> None:
    """The Trainer's checkpoint into an empty folder: linked where that is possible, else copied.

    The Trainer writes each of its files anew and never changes one, so a link is as good.
    """
    for path in sorted(made.rglob("*")):
        target = folder / path.relative_to(made)
        if path.is_dir():
            target.mkdir(exist_ok=True)
            continue
        try:
            os.link(path, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, target)
