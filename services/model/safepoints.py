# ruff: noqa: TID253  (imported lazily, by workers only)
"""Boundaries in a model: before each of its blocks, in forward and in backward.

A block is what a model repeats (the modules of a list, as transformers' layers are), or what lies
beside it and has weights (an embedding, the head). Hooks look and change nothing: the numbers of
a model with boundaries are those of the same model without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from llmos.services.programs.base import Gate

_LISTS = (nn.ModuleList, nn.Sequential)


def install(model: nn.Module, gate: Gate) -> None:
    """Put the gate's boundaries around the model's blocks; nothing where no gate is needed.

    A compiled model is one launch after another without python in between: it is left alone, and
    can be held between micro-batches.
    """
    if not gate.active or hasattr(model, "_orig_mod"):
        return
    for name, block in blocks(model):
        _watch(block, name, gate)


def blocks(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every block, from the outside: blocks lie beside each other."""
    seen: set[int] = set()
    for path, block in _blocks(model, name):
        if id(block) not in seen:
            seen.add(id(block))
            yield path, block


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, their gradients, and buffers."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()


def _blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    is_list = isinstance(module, _LISTS)
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if next(child.parameters(), None) is None:
            continue
        holds_list = any(isinstance(inner, _LISTS) for inner in child.modules())
        if isinstance(child, _LISTS) or (holds_list and not is_list):
            yield from _blocks(child, path)
        else:
            yield path, child


def _watch(block: nn.Module, name: str, gate: Gate) -> None:
    forward, backward = f"{name} forward", f"{name} backward"

    def before(*_: Any) -> None:
        gate.boundary(forward)

    def before_backward(_: Tensor) -> None:
        gate.boundary(backward)

    def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # The gradient of what a block gives is there just before the block's own backward.
        tensor = _with_gradient(output)
        if tensor is not None:
            tensor.register_hook(before_backward)  # type: ignore[no-untyped-call]

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


def _with_gradient(output: Any) -> Tensor | None:
    """The first tensor in the output of a module that backward comes through."""
    if isinstance(output, Tensor):
        return output if output.requires_grad else None
    if isinstance(output, Mapping):
        output = output.values()
    if isinstance(output, list | tuple) or hasattr(output, "__iter__"):
        for inner in output:
            found = _with_gradient(inner)
            if found is not None:
                return found
    return None
