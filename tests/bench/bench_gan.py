"""How good are the digits of a trained GAN, as a classifier of real digits sees them?

    python tests/bench/bench_gan.py GAN_FOLDER LENET_FOLDER [--real IDX_FILE] [--samples 2000]

GAN_FOLDER: what `gan --out` made from MNIST. LENET_FOLDER: LeNet-5 for MNIST (inputs
(N, 1, 32, 32) in [0, 1]; model.safetensors with c1, c3, c5, f6, f7). Printed: the share of samples
that the classifier is sure of (> 0.9), the mean of its surest class, the smallest and the largest
share of a class (0.1 each would be even), the inception score (10 at most). With --real the
same for real images, as what can be reached.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmos.services.data.images import read_images
from llmos.services.programs.gan_nets import load_generator

SURE = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gan", type=Path)
    parser.add_argument("lenet", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    weights = load_file(args.lenet / "model.safetensors")
    generator = load_generator(args.gan)
    noise = torch.randn(args.samples, generator.first.in_features,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    with torch.no_grad():
        print_score("generated", classify(weights, (generator(noise) + 1) / 2))
        if args.real:
            real = torch.tensor(read_images(args.real)[: args.samples]).float() / 255
            print_score("real", classify(weights, real))


def classify(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Class probabilities (N, 10) of images (N, 1, 28, 28) in [0, 1]."""

    def of(layer: str) -> tuple[Tensor, Tensor]:
        weight, bias = (
            next(t for name, t in weights.items() if layer in name and name.endswith(end))
            for end in ("weight", "bias")
        )
        return weight, bias

    hidden = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    hidden = F.max_pool2d(F.conv2d(hidden, *of("c1")).relu(), 2)
    hidden = F.max_pool2d(F.conv2d(hidden, *of("c3")).relu(), 2)
    hidden = F.conv2d(hidden, *of("c5")).relu().flatten(1)
    return F.linear(F.linear(hidden, *of("f6")).relu(), *of("f7")).softmax(1)


def print_score(what: str, shares: Tensor) -> None:
    surest, classes = shares.max(1)
    counts = torch.bincount(classes, minlength=10) / len(classes)
    mean = shares.mean(0)
    inception = (shares * (shares.clamp_min(1e-12).log() - mean.log())).sum(1).mean().exp()
    print(
        f"{what}: sure {float((surest > SURE).float().mean()):.3f}, "
        f"mean surest {float(surest.mean()):.3f}, "
        f"classes {float(counts.min()):.3f} to {float(counts.max()):.3f}, "
        f"inception score {float(inception):.2f}"
    )


if __name__ == "__main__":
    main()
