# ruff: noqa: TID253  (imported lazily, by workers only)
"""Optimizers by name: ours and a plugin's are found through the same entry points.

An optimizer is a callable `(named_parameters, lr, weight_decay) -> torch.optim.Optimizer`.
It does not know the model: only the names and shapes of what it moves.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llmos.kernel.errors import BadArgument

GROUP = "llmos.optimizers"

Named = Iterable[tuple[str, torch.nn.Parameter]]


def adamw(named: Named, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), fused."""
    groups = decay_groups(named, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def adamw8bit(named: Named, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with its moments in 8 bits: a quarter of their memory, a slower step."""
    from llmos.services.optim.adamw8bit import AdamW8bit

    return AdamW8bit(decay_groups(named, weight_decay), lr=lr)


def adam(named: Named, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015), fused; weight decay is added to the gradient."""
    return torch.optim.Adam(decay_groups(named, weight_decay), lr=lr, fused=True)


def sgd(named: Named, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Stochastic gradient descent with Nesterov momentum 0.9, fused."""
    groups = decay_groups(named, weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)


def decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of parameters: matrices decay; norms, biases and embeddings do not."""
    decay: list[torch.nn.Parameter] = []
    keep: list[torch.nn.Parameter] = []
    for name, parameter in named:
        spared = parameter.ndim < 2 or "embed" in name
        (keep if spared else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_name(name: str) -> importlib.metadata.EntryPoint:
    """Where the optimizer of this name is. Raises BadArgument."""
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name not in found:
        raise BadArgument(f"there is no optimizer {name!r}", f"one of {', '.join(sorted(found))}")
    return found[name]


def build(name: str, named: Named, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of this name over `named`. Raises BadArgument."""
    make: Callable[..., torch.optim.Optimizer] = check_name(name).load()
    return make(named, lr=lr, weight_decay=weight_decay)
