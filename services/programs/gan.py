"""Gan: train a generator and a discriminator on images; the generator's samples can be watched.

Here are its schema and the order of a run. The networks are in `gan_nets`, one update in
`gan_train`, images and grids in `gan_pictures`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.kernel.errors import BadInput
from llmos.services.programs.base import (
    Context,
    Done,
    Footprint,
    Keep,
    Program,
    Report,
    arg,
    as_it_is,
    keep,
    save_every,
    save_in_place,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from llmos.services.data.order import Order
    from llmos.services.programs.gan_train import Trainer

DEFAULT_STEPS = 2000
GRID = 64  # images of a sample grid: 8 x 8

# A grid about every ten seconds on two cores (10 steps/s at 28 x 28), but counted in steps and
# pixels, so that a run and its repetition write the same grids.
SAMPLE_PIXELS = 100 * 28 * 28

METRICS_EVERY = 10  # reading a loss waits for the device


class Gan(Program):
    name = "gan"
    summary = "Train a GAN on images, with a grid of samples while it runs"
    examples = (
        "llmos gan train-images-idx3-ubyte.gz --out digits --time-limit-s 180",
        "llmos gan faces/ --out faces --steps 5000 -d",
    )
    group = "training"
    has_checkpoint = True

    preload = (
        "llmos.services.programs.gan_train",
        "llmos.services.programs.gan_plan",
    )

    @dataclass(frozen=True)
    class Args:
        data: str = arg(
            help="idx file (also .gz), folder of PNG or JPEG, or .npz", positional=True, path=True
        )
        out: str = arg(
            help="name of the model that is made", metavar="NAME", output=True, shape=False
        )
        steps: int = arg(
            0, help=f"updates; 0: {DEFAULT_STEPS}, or until the time limit", minimum=0, shape=False
        )
        time_limit_s: float = arg(
            0.0, help="end after this much wall time; 0: none", minimum=0, shape=False
        )
        batch: int = arg(64, help="images in an update", minimum=2)
        latent: int = arg(64, help="numbers that the generator makes an image from", minimum=1)
        width: int = arg(32, help="channels of the networks' largest maps", minimum=4, maximum=512)
        lr: float = arg(2e-3, help="learning rate of both networks", minimum=0, shape=False)
        beta1: float = arg(
            0.5, help="Adam's memory of gradients", minimum=0, maximum=0.999, shape=False
        )
        seed: int = arg(0, help="the same seed gives the same run", minimum=0, shape=False)
        dtype: str = arg(
            "auto", help="number format of computing", choices=("auto", "float32", "bfloat16")
        )
        sample_every: int = arg(
            0, help="steps between two grids; 0: about 10 s", minimum=0, shape=False
        )
        threads: int = arg(0, help="CPU threads; 0: as many as the kernel gives", minimum=0)
        overwrite: bool = arg(False, help="replace a model of this name", shape=False)
        save_every: str = save_every()
        keep: int = keep()
        save_in_place: bool = save_in_place()

    _images: npt.NDArray[np.uint8]
    _trainer: Trainer
    _order: Order
    _fixed_noise: Tensor  # (GRID, latent): every grid shows the same points of the latent space

    @classmethod
    def plan(cls, args: Any) -> Footprint:
        from llmos.services.programs.gan_plan import plan_gan

        return plan_gan(args)

    def load(self, ctx: Context) -> None:
        import torch

        from llmos.services.data.order import Order
        from llmos.services.model.load import resolve_dtype
        from llmos.services.programs.gan_nets import Shape
        from llmos.services.programs.gan_pictures import read_images
        from llmos.services.programs.gan_train import Trainer

        args, self._ctx = self.args, ctx
        torch.set_num_threads(args.threads or ctx.threads)
        torch.manual_seed(args.seed)
        self._images = read_images(Path(args.data))
        count, channels, height, width = self._images.shape
        self._order = Order(count, args.seed)
        shape = Shape(channels, height, width, args.latent, args.width)
        half = resolve_dtype(args.dtype, ctx.device) == torch.bfloat16
        self._trainer = Trainer(shape, args.lr, args.beta1, ctx.device, half, ctx.gate)
        self._fixed_noise = torch.randn(GRID, args.latent)
        self._sample_every = args.sample_every or max(20, SAMPLE_PIXELS // (height * width))
        self._steps = args.steps or (0 if args.time_limit_s else DEFAULT_STEPS)
        self._earlier_s, self._loaded_at = 0.0, time.monotonic()
        self._metrics: dict[str, float] = {}

    def step(self, ctx: Context) -> Report | Done:
        if self._is_over():
            return self._finish(ctx)
        from llmos.services.programs.gan_pictures import to_batch

        batch = to_batch(self._images, self._order.take(self.args.batch))
        losses = self._trainer.update(batch)
        step = self._trainer.updates
        if step % METRICS_EVERY == 0 or not self._metrics:
            names = ("discriminator_loss", "generator_loss")
            self._metrics = {n: float(loss) for n, loss in zip(names, losses, strict=True)}
            if not all(map(math.isfinite, self._metrics.values())):
                raise BadInput(
                    f"the training diverged: a loss is not finite at step {step}",
                    f"lower --lr (it is {self.args.lr:g})",
                )
        if step % self._sample_every == 0:
            self._sample(ctx)
        return Report(step, self._steps or None, dict(self._metrics))

    def _is_over(self) -> bool:
        out_of_time = 0 < self.args.time_limit_s <= self._elapsed_s()
        updates = self._trainer.updates
        return (out_of_time and updates > 0) or 0 < self._steps <= updates

    def _elapsed_s(self) -> float:
        """Wall time of the run; what passed without a worker does not count."""
        return self._earlier_s + time.monotonic() - self._loaded_at

    def _sample(self, ctx: Context) -> None:
        from llmos.services.programs.gan_pictures import write_grid

        path = ctx.work / "samples" / f"step-{self._trainer.updates}.png"
        write_grid(path, self._trainer.sample(self._fixed_noise))
        ctx.emit("sample", path=str(path), step=self._trainer.updates)

    def _finish(self, ctx: Context) -> Done:
        """The model, whole and aside; the registry puts it in place."""
        from llmos.services.programs.gan_pictures import write_grid

        folder = ctx.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._trainer.write_model(folder)
        write_grid(folder / "samples.png", self._trainer.sample(self._fixed_noise))
        made_by = {"program": self.name, "pid": ctx.pid, "args": asdict(self.args)}
        entry = ctx.call(
            "models.register",
            name=self.args.out,
            folder=str(folder),
            kind="gan",
            made_by=made_by,
            overwrite=self.args.overwrite,
        )
        result = {"model": self.args.out, "folder": entry["folder"], "steps": self._trainer.updates}
        return Done(result={**result, "seconds": round(self._elapsed_s(), 3), **self._metrics})

    def tensors(self) -> Iterable[Tensor]:
        return self._trainer.all_tensors()

    def save(self, folder: Path) -> None:
        self.capture(as_it_is)(folder)

    def capture(self, keep: Keep) -> Callable[[Path], None]:
        from llmos.services.programs.lm_state import write as write_tensors

        model, tensors = self._trainer.capture_model(keep), self._trainer.tensors(keep)
        state = {
            "updates": self._trainer.updates,
            "elapsed_s": self._elapsed_s(),
            "metrics": self._metrics,
            "order": self._order.state(),
            "conditions": self._trainer.conditions(),
        }
        text = json.dumps(state)

        def write(folder: Path) -> None:
            model(folder)
            write_tensors(tensors, folder / "training.safetensors")
            (folder / "training.json").write_text(text)

        return write

    def restore(self, folder: Path) -> None:
        from safetensors.torch import load_file

        state = json.loads((folder / "training.json").read_text())
        self._say_differences(state["conditions"])
        self._trainer.restore(load_file(folder / "training.safetensors"), state["updates"])
        self._order.restore(state["order"])
        self._earlier_s, self._loaded_at = state["elapsed_s"], time.monotonic()
        self._metrics = state["metrics"]

    def _say_differences(self, before: dict[str, Any]) -> None:
        """A run that goes on under other conditions is a little different: said, not hidden."""
        import torch

        from llmos.services.programs import conditions

        if "threads" in before:  # they belong to the run: they come from its first worker
            torch.set_num_threads(int(before["threads"]))
        text = conditions.differences(before, self._trainer.conditions())
        if text:
            self._ctx.emit("note", text=text)
