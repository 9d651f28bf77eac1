"""What a GAN will hold: one update on tensors without memory, beside the images."""
# ruff: noqa: TID253  (imported by `plan` only, in a child that has torch at hand)

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmos.services.model.dryrun import Books
from llmos.services.model.footprint import UNSEEN_SHARE
from llmos.services.model.load import resolve_dtype
from llmos.services.programs.base import COPY, Footprint, OpenGate, Segment, planned_device
from llmos.services.programs.gan import GRID
from llmos.services.programs.gan_nets import Generator, Shape
from llmos.services.programs.gan_pictures import read_images
from llmos.services.programs.gan_train import Trainer

# Private memory of a worker on a CPU that trains a GAN, beside its tensors. Measured by
# tests/bench/bench_footprint.py.
CONTEXT_BYTES = 28 << 20


class _Unplaced(Trainer):
    """Fake tensors can be neither moved in place nor copied deeply; bytes are the same without."""

    def _copied(self, net: Generator) -> Generator:
        return Generator(self.shape)

    def _placed(self, net: Any) -> Any:
        return net


def plan_gan(args: Any) -> Footprint:
    """Reads the images (their shapes are in the data, and a bad file is refused now)."""
    images = read_images(Path(args.data))
    _, channels, height, width = images.shape
    shape = Shape(channels, height, width, args.latent, args.width)
    half = resolve_dtype(args.dtype) == torch.bfloat16
    held = _trace(shape, args, half)
    trained = held["gradients"]
    copied = planned_device() == "cpu" and not args.save_in_place
    rest = sum(held.values()) - held["weights"] - held["optimizer"] - trained
    return Footprint(
        (
            Segment("weights", held["weights"]),
            Segment("gradients", trained),
            Segment("optimizer", held["optimizer"]),
            Segment("activations", rest + images.nbytes),
            Segment("context", CONTEXT_BYTES if planned_device() == "cpu" else 0),
            *([Segment(COPY, held["weights"] + held["optimizer"])] if copied else []),
        )
    )


def _trace(shape: Shape, args: Any, half: bool) -> dict[str, int]:
    """Two updates and a grid of samples on fake tensors -> what is held in the worst moment."""
    cpu = planned_device() == "cpu"
    books = Books(heap=cpu)
    books.phase("update")
    with books:
        with books.making("weights"):
            trainer = _Unplaced(shape, args.lr, args.beta1, "cpu", half, OpenGate())
        noise = torch.empty(GRID, args.latent)
        real = torch.empty(args.batch, shape.channels, shape.height, shape.width_px)
        trainer.update(real)
        books.assign(trainer.moments(), "optimizer")
        nets = (trainer.generator, trainer.discriminator)
        books.assign(
            (p.grad for net in nets for p in net.parameters() if p.grad is not None), "gradients"
        )
        trainer.update(real)
        trainer.sample(noise)
    held = {"gradients": 0, **books.peaks["update"]}
    held["unused"] = books.unused_bytes() + (int(UNSEEN_SHARE * held["activations"]) if cpu else 0)
    trained = sum(p.numel() * p.element_size() for net in nets for p in net.parameters())
    # Gradients of both networks live on from update to update.
    return {
        **held,
        "activations": held["activations"] + held["gradients"] - trained,
        "gradients": trained,
    }
