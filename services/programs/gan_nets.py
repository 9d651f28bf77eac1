"""The two networks of the GAN: a DCGAN (Radford et al. 2015) for images of 8 to 64 pixels.

The generator doubles a small map until it is as large as the image, the discriminator halves
the image as often. The discriminator is spectrally normalized (Miyato et al. 2018), and sees how
much a batch varies (Karras et al. 2018), so that the generator cannot make one image only.
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
from torch.nn.utils.parametrizations import spectral_norm

# The smallest map has 4 to 7 pixels on its longer side.
LARGEST_BASE = 7

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
        """How often a map of at most 7 pixels is doubled to hold the image."""
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
            steps += [spectral_norm(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.2, True)]
            before, height, width = after, height // 2, width // 2
        self.body = nn.Sequential(*steps)
        self.mix = spectral_norm(nn.Conv2d(before + 1, before, 3, 1, 1))
        self.last = spectral_norm(nn.Linear(before * height * width, 1))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body(images)
        hidden = torch.cat((hidden, _variation(hidden)), 1)
        hidden = nn.functional.leaky_relu(self.mix(hidden), 0.2)
        score: Tensor = self.last(hidden.flatten(1)).squeeze(1)
        return score


def _variation(hidden: Tensor) -> Tensor:
    """One map (batch, 1, height, width): the mean standard deviation over the batch."""
    deviation = hidden.float().var(0, correction=0).add(1e-8).sqrt().mean()
    batch, _, height, width = hidden.shape
    return deviation.to(hidden.dtype).expand(batch, 1, height, width)


def load_generator(folder: Path) -> Generator:
    """The generator of a model folder: noise (batch, latent) -> images in [-1, 1]."""
    config = json.loads((folder / "config.json").read_text())
    generator = Generator(Shape(**config["shape"]))
    generator.load_state_dict(load_file(folder / "generator.safetensors"))
    return generator.eval().requires_grad_(False)
