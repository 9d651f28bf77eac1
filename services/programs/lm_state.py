# ruff: noqa: TID253  (imported lazily, by workers only)
"""Write and read what a training needs beside its weights: optimizer and random generators.

Safetensors and JSON only. It does not know models or data.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llmos.kernel.errors import BadInput
from llmos.services.programs.base import Keep

OPTIMIZER, RANDOM = "optimizer.safetensors", "random.safetensors"
RANK_RANDOM = "random-{}.safetensors"  # of ranks other than the first


Tensors = dict[str, torch.Tensor]


def capture_optimizer(
    optimizer: torch.optim.Optimizer, keep: Keep
) -> tuple[Tensors, dict[str, Any]]:
    """(the tensors of an optimizer, for the file OPTIMIZER; the rest of its state, as plain
    values)."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = keep(value)
            else:
                plain[f"{index}.{key}"] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    return tensors, {"values": plain, "groups": groups}


def write(tensors: Tensors, file: Path) -> None:
    """A safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def restore_optimizer(optimizer: torch.optim.Optimizer, folder: Path, rest: dict[str, Any]) -> None:
    """Bring an optimizer over the same parameters back to what was saved."""
    state: dict[int, dict[str, Any]] = {}
    # Cloned: a tensor in a file mapping may be unaligned, and other kernels would run on it.
    saved = {key: value.clone() for key, value in load_file(folder / OPTIMIZER).items()}
    for place, value in {**saved, **rest["values"]}.items():
        index, _, key = place.partition(".")
        state.setdefault(int(index), {})[key] = value
    now = optimizer.state_dict()["param_groups"]
    if len(now) != len(rest["groups"]):
        raise BadInput("the checkpoint was made by another optimizer", "use the one it was made by")
    groups = [
        {**new, **old, "params": new["params"]}
        for new, old in zip(now, rest["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def seed_all(seed: int) -> None:
    """Seed every generator that a training draws from."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def capture_random() -> tuple[Tensors, dict[str, Any]]:
    """(the states of torch's generators, those of python and numpy). They are copies."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda{i}"] = state
    name, keys, *rest = np.random.get_state()
    plain = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    return states, plain


def restore_random(folder: Path, rest: dict[str, Any], rank: int = 0) -> None:
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *others = rest["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *others))
    states = {key: value.clone() for key, value in load_file(folder / random_file(rank)).items()}
    torch.set_rng_state(states["cpu"])
    for i in range(len(states) - 1):
        torch.cuda.set_rng_state(states[f"cuda{i}"], i)


def random_file(rank: int = 0) -> str:
    """Where the states of torch's generators on this rank are."""
    return RANK_RANDOM.format(rank) if rank else RANDOM
