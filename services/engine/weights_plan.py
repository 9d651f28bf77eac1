"""What the weights of an engine will take, from the headers of the model's files and its shape."""
# ruff: noqa: TID253  (imported by `plan` only, in a child that has torch at hand)

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llmos.services.engine.arranged import arranged, size_of, takes_panels
from llmos.services.engine.layout import BETWEEN_BYTES, packs, widens
from llmos.services.engine.weights import INT8, folder_of, kind_and_dtype
from llmos.services.model.load import weight_files
from llmos.services.programs.base import Segment, planned_device

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# While a file of panels is written, parts of a weight are there as float32, and what transformers
# takes to load the model.
FILLING_BYTES = 16 << 20


@dataclass(frozen=True)
class PlannedWeights:
    """`dtype`: of tokens, keys and values. `loading_bytes`: private, until the model is loaded."""

    segments: tuple[Segment, ...]
    dtype: torch.dtype
    loading_bytes: int


def plan_weights(ref: str, config: PreTrainedConfig, dtype: str) -> PlannedWeights:
    """Raises BadArgument for a `dtype` that this model or device cannot have."""
    device = planned_device()
    kind, computed = kind_and_dtype(config, dtype, device)
    folder, text = folder_of(ref), config.get_text_config()
    if takes_panels(text.model_type, kind, device):
        nbytes = size_of(arranged(config, kind, computed))
        # Named by what it is made of: where the file lies is the worker's affair.
        shared = f"{folder.resolve()}#{kind}"
        return PlannedWeights((Segment("weights", nbytes, shared),), computed, FILLING_BYTES)
    packed = kind != INT8 and packs(text.model_type, computed, device)
    segments = _as_they_come(folder, computed, packed, kind == INT8)
    is_copied = packed or kind == INT8 or computed == torch.float32
    if device == "cpu" and text.tie_word_embeddings and is_copied:
        # The output layer is the embedding, but is held once more in a layout of its own.
        width = 1 if kind == INT8 else computed.itemsize
        segments.append(Segment("weights", text.vocab_size * text.hidden_size * width))
    loading_bytes = _twice(folder, computed) if packed or kind == INT8 else 0
    return PlannedWeights(tuple(segments), computed, loading_bytes)


def _as_they_come(
    folder: Path, computed: torch.dtype, packed: bool, is_int8: bool
) -> list[Segment]:
    """A file whose tensors are used as they are is mapped and shared; every copy is private."""
    segments, private_bytes = [], 0
    for path in weight_files(folder):
        tensors = _tensors(path)
        linear = [prod(shape) for _, name, shape in tensors if _is_linear(name, shape)]
        if is_int8:
            private_bytes += sum(linear)
        if packed or any(dtype != computed for dtype, _, _ in tensors):
            rest = sum(prod(shape) for _, _, shape in tensors) - (sum(linear) if is_int8 else 0)
            private_bytes += rest * computed.itemsize
            continue
        segments.append(Segment("weights", path.stat().st_size, shared=str(path.resolve())))
        if computed == torch.float32 and not is_int8:
            turned = [s for _, name, s in tensors if _is_linear(name, s) and widens(*s)]
            private_bytes += sum(prod(shape) for shape in turned) * computed.itemsize
    return [*segments, Segment("weights", private_bytes)] if private_bytes else segments


def _twice(folder: Path, computed: torch.dtype) -> int:
    """While weights are laid out, the largest is there twice, and some others are."""
    shapes = [shape for file in weight_files(folder) for _, _, shape in _tensors(file)]
    counts = [prod(shape) for shape in shapes]
    largest = max(BETWEEN_BYTES, max(counts) * computed.itemsize)
    return min(sum(counts) * computed.itemsize, largest)


def _is_linear(name: str, shape: list[int]) -> bool:
    """At most these are copied by engine.layout: a plan cannot tell a layer from a table."""
    return len(shape) == 2 and "embed" not in name


def _tensors(path: Path) -> list[tuple[torch.dtype | None, str, list[int]]]:
    """(stored type, name, shape) of each tensor; from the header: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return [(_STORED.get(t["dtype"]), name, t["shape"]) for name, t in header.items()]
