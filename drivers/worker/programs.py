"""Find a program by its entry point and build its arguments. Knows no program by name."""

from __future__ import annotations

import importlib
import os
import random
import site
from dataclasses import fields
from typing import Any


def _site_times() -> list[float]:
    """When something was last installed into each of the folders of distributions, or removed."""
    return [os.stat(f).st_mtime for f in site.getsitepackages() if os.path.isdir(f)]


# The zygote imports this module once: its workers see what came later as a difference.
_AT_START = _site_times()


def load_program(entry: str) -> Any:
    """`module:Class` -> the class. Whatever a worker loads after it is up to date, too."""
    if _site_times() != _AT_START:
        look_again()
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def look_again() -> None:
    """Find what was installed since the zygote began: an editable install is a .pth file, which
    Python reads when it starts."""
    for folder in site.getsitepackages():
        site.addsitedir(folder)
    importlib.invalidate_caches()


def build_args(program: Any, values: dict[str, Any]) -> Any:
    """The program's Args from plain values. The kernel has checked them against the manifest."""
    known = {f.name for f in fields(program.Args)}
    return program.Args(**{k: v for k, v in values.items() if k in known})


def make_ready(device: str, threads: int) -> None:
    """torch's threads and device; generators that do not repeat those of other forks."""
    import torch

    settle_vector_math()
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    seed = int.from_bytes(os.urandom(7), "big")
    random.seed(seed)
    torch.manual_seed(seed)


def settle_vector_math() -> None:
    """Call each vector function of MKL once, with one thread.

    MKL looks at the CPU in the first call. When two threads are the first together, one may still
    see what was there before and computes its part with a kernel for another CPU and half of the
    digits: in one of 1,500 fresh processes a training's first step had other bits
    (docs/design/log.md has how it was found).
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        few = torch.full((16,), 0.5, dtype=dtype)  # never divided among threads
        for name in _VECTOR_MATH:
            getattr(torch, name)(few)


# What ATen hands to MKL's vector library (aten/src/ATen/cpu/vml.h).
_VECTOR_MATH = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p",
    "log2", "sin", "sqrt", "tan", "tanh",
)  # fmt: skip
