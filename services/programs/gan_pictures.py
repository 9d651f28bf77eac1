"""Pictures of a GAN's run: image sets made ready for training, and samples as a grid in a PNG.

It knows arrays and files; it knows no network.
"""
# ruff: noqa: TID253  (imported by the program inside a worker only)

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from llmos.kernel.errors import BadInput
from llmos.services.data.images import read_images as images_at

SMALLEST, LARGEST = 8, 64  # pixels of a side that the networks are made for
GAP = 2  # pixels between two images of a grid


def read_images(path: Path) -> npt.NDArray[np.uint8]:
    """The images at `path`: (images, channels, height, width), 0 to 255. Raises BadInput."""
    images = images_at(path)
    count, _, height, width = images.shape
    if not all(SMALLEST <= side <= LARGEST for side in (height, width)):
        raise BadInput(
            f"{path}: images of {width} x {height} pixels",
            f"this GAN makes {SMALLEST} to {LARGEST} pixels a side: resize them first",
        )
    if count < 2:
        raise BadInput(f"{path} holds {count} image", "a GAN needs many, hundreds at least")
    return as_bytes(images)


def as_bytes(images: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Images as bytes, a quarter of float32. What is not bytes of full range is stretched."""
    low, high = float(images.min()), float(images.max())
    if images.dtype == np.uint8 and high > 127:
        return images.view(np.uint8)
    stretched = (images.astype(np.float32) - low) * (255 / max(high - low, 1e-12))
    return stretched.round().astype(np.uint8)


def to_batch(images: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64]) -> Tensor:
    """The images at `indices` as float32 in [-1, 1]."""
    return torch.from_numpy(images[indices]).float().div_(127.5).sub_(1)


def write_grid(path: Path, images: Tensor) -> None:
    """Images (batch, channels, height, width) in [-1, 1] as a square grid. Whole or not at all."""
    batch, channels, height, width = images.shape
    columns = int(batch**0.5)
    rows = batch // columns
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    grid = np.zeros(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), np.uint8
    )
    for i in range(rows * columns):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[top : top + height, left : left + width] = pixels[i].transpose(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    Image.fromarray(grid.squeeze(2) if channels == 1 else grid).save(aside, format="PNG")
    os.replace(aside, path)
