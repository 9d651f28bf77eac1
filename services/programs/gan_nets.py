"""The two networks of the GAN: a DCGAN (Radford et al. 2015) for images of 8 to 64 pixels.

The generator doubles a small map until it is as large as the image, the discriminator halves
the image as often; both are normalized over the batch. Tried on MNIST, share of samples that
a classifier is sure of after 500 updates: as it is 0.74; with a smallest map of 7 pixels 0.61; of
7 pixels, spectrally normalized instead 0.45.

Images are (batch, channels, height, width) in [-1, 1]. Nothing here knows how they are trained.
"""
# ruff: noqa: TID253  (imported by the program inside a worker only)

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# The smallest map has 3 or 4 pixels on its longer side: what it holds spans the whole image.
LARGEST_BASE = 4

MODEL_TYPE = "llmos-gan"


@dataclass(frozen=True)
class Shape:
    """What both networks must agree on. `width`: channels of the map before the image."""

    channels: int
    height: int
    width_px: int
    latent: int
    width: int

    @property
    def doublings(self) -> int:
        """How often a map of at most 4 pixels is doubled to hold the image."""
        count = 1
        while -(-max(self.height, self.width_px) // 2**count) > LARGEST_BASE:
            count += 1
        return count


class Generator(nn.Module):
    """Noise (batch, latent) -> images. Sides that are no multiple are made larger and cut."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        scale = 2**shape.doublings
        self.size = (shape.height, shape.width_px)
        self.base = (-(-shape.height // scale), -(-shape.width_px // scale))
        widths = [shape.width * 2**i for i in reversed(range(shape.doublings))]
        self.first = nn.Linear(shape.latent, widths[0] * self.base[0] * self.base[1], bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        steps: list[nn.Module] = []
        for before, after in pairwise(widths):
            doubled = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
            steps += [doubled, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*steps)
        self.last = nn.ConvTranspose2d(widths[-1], shape.channels, 4, 2, 1)

    def forward(self, noise: Tensor) -> Tensor:
        hidden = self.first(noise).view(len(noise), -1, *self.base)
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        hidden = self.body(self.norm(hidden).relu())
        height, width = self.size
        image: Tensor = self.last(hidden)[:, :, :height, :width].tanh()
        return image


class Discriminator(nn.Module):
    """Images -> one score each (batch,); higher means more real."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        before, height, width = shape.channels, shape.height, shape.width_px
        for i in range(shape.doublings):
            after = shape.width * 2**i
            steps.append(nn.Conv2d(before, after, 4, 2, 1, bias=False))
            # Not on the first map: it would hide how bright the images are (DCGAN).
            steps += [nn.BatchNorm2d(after)] if i else []
            steps.append(nn.LeakyReLU(0.2, inplace=True))
            before, height, width = after, height // 2, width // 2
        self.body = nn.Sequential(*steps)
        self.last = nn.Linear(before * height * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        score: Tensor = self.last(self.body(images).flatten(1)).squeeze(1)
        return score


def load_generator(folder: Path) -> Generator:
    """The generator of a model folder: noise (batch, latent) -> images in [-1, 1]."""
    config = json.loads((folder / "config.json").read_text())
    generator = Generator(Shape(**config["shape"]))
    generator.load_state_dict(load_file(folder / "generator.safetensors"))
    return generator.eval().requires_grad_(False)
