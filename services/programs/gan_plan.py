"""What a GAN will hold, predicted from the shapes of its networks; nothing is allocated."""
# ruff: noqa: TID253  (imported by `plan` only, in a child that has torch at hand)

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmos.services.model.load import resolve_dtype
from llmos.services.programs.base import Footprint, Segment
from llmos.services.programs.gan_nets import Discriminator, Generator, Shape
from llmos.services.programs.gan_pictures import read_images

# Private memory of a worker with torch that has computed once, beside its tensors: measured 25 to
# 40 MB (MNIST, 2 threads, forked).
CONTEXT_BYTES = 48 * 2**20

# Bytes for each number that the layers put out in an update. Measured 2.6 in bfloat16 (some are
# kept in both formats) and 3.2 in float32 (some are freed before the others are made).
BYTES_PER_OUTPUT = {torch.bfloat16: 3, torch.float32: 4}


def plan_gan(args: Any) -> Footprint:
    """Reads the images (their shapes are in the data, and a bad file is refused now)."""
    images = read_images(Path(args.data))
    _, channels, height, width = images.shape
    shape = Shape(channels, height, width, args.latent, args.width)
    with torch.device("meta"):
        generator, discriminator = Generator(shape), Discriminator(shape)
        noise = torch.empty(args.batch, args.latent)
        real = torch.empty(args.batch, channels, height, width)
        # The discriminator runs three times in an update, and two of these are kept together.
        outputs = _output_numbers(generator, noise) + 2 * _output_numbers(discriminator, real)
    one, other = _bytes(generator), _bytes(discriminator)
    activations = outputs * BYTES_PER_OUTPUT[resolve_dtype(args.dtype)]
    return Footprint(
        (
            Segment("weights", 2 * one + other),  # the average is a second generator
            Segment("gradients", one + other),
            Segment("optimizer", 2 * (one + other)),
            Segment("activations", activations + images.nbytes),
            Segment("context", CONTEXT_BYTES),
        )
    )


def _bytes(net: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values())


def _output_numbers(net: nn.Module, argument: Tensor) -> int:
    """How many numbers all layers put out together in one forward pass."""
    count = 0

    def add(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
        nonlocal count
        count += output.numel()

    leaves = [m for m in net.modules() if not list(m.children())]
    hooks = [leaf.register_forward_hook(add) for leaf in leaves]
    net(argument)
    for hook in hooks:
        hook.remove()
    return count
