"""The first step of many fresh processes: prints how many different results there were.

    python tests/support/first_steps.py COUNT

A script of its own: where somebody has computed with threads already, a fork hangs.
"""

from __future__ import annotations

import os
import struct
import sys

import torch

from llmos.drivers.worker import programs


def first_step() -> bytes:
    """In a fork: the sum of a product's tanh, as its first work with two threads."""
    read, write = os.pipe()
    if os.fork() == 0:
        programs.make_ready("cpu", 2)
        generator = torch.Generator().manual_seed(3)
        a, b = (torch.randn(128, 128, generator=generator) for _ in range(2))
        os.write(write, struct.pack("d", float((a @ b / 11).tanh().double().sum())))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        said = answer.read()
    os.wait()
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(f"{len({first_step() for _ in range(int(sys.argv[1]))})}\n")
