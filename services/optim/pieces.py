# ruff: noqa: TID253  (imported lazily, by workers only)
"""The step of an optimizer in pieces, so that a worker can be held between two of them.

Only where a step over some parameters and then the others is the same, bit for bit, as one over
all: in torch's Adam, AdamW and SGD everything that an update depends on belongs to its parameter
or is a setting. Any other optimizer takes its step whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmos.services.programs.base import Gate

# Parameters of one piece. An update of Adam moves 28 bytes for each float32: 2 GB, about a
# millisecond of a large GPU.
PIECE_BYTES = 256 * 2**20

SEPARABLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def step(optimizer: torch.optim.Optimizer, gate: Gate, piece_bytes: int = PIECE_BYTES) -> None:
    """One step of the optimizer, with boundaries where the gate is how a worker is held."""
    gate.boundary("optimizer")
    if not gate.active or type(optimizer) not in SEPARABLE:
        optimizer.step()
        return
    groups = optimizer.param_groups
    try:
        for number, piece in enumerate(_pieces(groups, piece_bytes)):
            gate.boundary(f"optimizer {number}")
            optimizer.param_groups = [piece]
            optimizer.step()
    finally:
        optimizer.param_groups = groups


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The tensors of an optimizer's state, and those among its settings."""
    for values in optimizer.state.values():
        yield from (v for v in values.values() if isinstance(v, torch.Tensor))
    for group in optimizer.param_groups:
        yield from (v for v in group.values() if isinstance(v, torch.Tensor))


def _pieces(groups: list[dict[str, Any]], piece_bytes: int) -> Iterator[dict[str, Any]]:
    """Each group in parts of about `piece_bytes` of parameters, at least one."""
    for group in groups:
        part: list[torch.nn.Parameter] = []
        nbytes = 0
        for parameter in group["params"]:
            size = parameter.nbytes
            if part and nbytes + size > piece_bytes:
                yield {**group, "params": part}
                part, nbytes = [], 0
            part.append(parameter)
            nbytes += size
        if part:
            yield {**group, "params": part}
