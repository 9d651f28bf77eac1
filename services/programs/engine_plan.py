"""What an engine and its guests will hold, predicted from the model's files and its shape.

From the headers of the weight files and config.json: nothing is loaded.
"""
# ruff: noqa: TID253  (imported by `plan` only, in a child that has torch at hand)

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from llmos.kernel.errors import BadInput
from llmos.services.model.load import (
    check_weights,
    load_config,
    load_tokenizer,
    resolve_dtype,
    weight_files,
)
from llmos.services.programs.base import Footprint, Segment
from llmos.services.programs.engine_cache import ROOM_TOKENS
from llmos.services.programs.engine_layout import packs, widens

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# The books must hold some guests from the start; more of them are seen by measurement.
PLANNED_GUESTS = 4
PLANNED_TOKENS = 4096

# Private memory of a worker that has torch and transformers and has computed once, beside its
# tensors: measured 138 MB in bfloat16, 146 MB in float32 (stories15M, 2 threads, forked).
CONTEXT_BYTES = 150 * 2**20

# Of a prompt, one piece is computed at a time; the widest arrays of a layer live together.
PREFILL_TOKENS = 512
LIVE_ARRAYS = 4


def plan_engine(model: str, dtype: str) -> Footprint:
    """Weights, the caches of a few guests, one piece of a prompt in flight. Raises BadInput."""
    check_weights(model)
    load_tokenizer(model)
    config = load_config(model).get_text_config()
    asked = resolve_dtype(dtype)
    packed = packs(config.model_type, asked, "cpu")
    segments = _weights(_folder(model), asked, packed)
    if config.tie_word_embeddings and (packed or asked == torch.float32):
        # The output layer is the embedding, but is held once more in a layout of its own.
        head_bytes = config.vocab_size * config.hidden_size * asked.itemsize
        segments.append(Segment("weights", head_bytes))
    tokens = min(_context(config), PLANNED_TOKENS)
    segments.append(Segment("kv", PLANNED_GUESTS * kv_bytes(config, asked, tokens)))
    widest = max(getattr(config, "intermediate_size", 0) or 0, 4 * config.hidden_size)
    activations = PREFILL_TOKENS * widest * asked.itemsize * LIVE_ARRAYS + config.vocab_size * 16
    segments += [Segment("activations", activations), Segment("context", CONTEXT_BYTES)]
    return Footprint(tuple(segments))


def plan_guest(model: str, dtype: str, tokens: int | None) -> Footprint:
    """The cache of one guest that sees `tokens` tokens at most (None: a full context)."""
    config = load_config(model).get_text_config()
    limit = _context(config)
    tokens = min(limit, PLANNED_TOKENS if tokens is None else tokens)
    return Footprint((Segment("kv", kv_bytes(config, resolve_dtype(dtype), tokens)),))


def kv_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Keys and values of `tokens` tokens, with the room that a growing cache keeps behind them."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        # Recurrent: one state for each layer (two in an LSTM), however long the text is.
        return int(2 * layers * hidden * dtype.itemsize)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    room = max(tokens + ROOM_TOKENS, 2 * tokens)
    return int(2 * layers * kv_heads * head_dim * room * dtype.itemsize)


def _context(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or PLANNED_TOKENS)


def _weights(folder: Path, asked: torch.dtype, packed: bool) -> list[Segment]:
    """A file whose tensors are used as they are is mapped and shared; every copy is private."""
    segments, private_bytes = [], 0
    for path in weight_files(folder):
        tensors = _tensors(path)
        if packed or any(dtype != asked for dtype, _, _ in tensors):
            private_bytes += sum(prod(shape) for _, _, shape in tensors) * asked.itemsize
            continue
        segments.append(Segment("weights", path.stat().st_size, shared=str(path.resolve())))
        if asked == torch.float32:
            turned = [shape for _, name, shape in tensors if _is_turned(name, shape)]
            private_bytes += sum(prod(shape) for shape in turned) * asked.itemsize
    return [*segments, Segment("weights", private_bytes)] if private_bytes else segments


def _is_turned(name: str, shape: list[int]) -> bool:
    """At most these are copied by engine_layout: a plan cannot tell a layer from a table."""
    return len(shape) == 2 and "embed" not in name and widens(shape[0], shape[1])


def _tensors(path: Path) -> list[tuple[torch.dtype | None, str, list[int]]]:
    """(stored type, name, shape) of each tensor; from the header: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return [(_STORED.get(t["dtype"]), name, t["shape"]) for name, t in header.items()]


def _folder(model: str) -> Path:
    """Where the model's files lie: the folder itself, or the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    found = cached_file(model, "config.json")
    if found is None:
        raise BadInput(
            f"no model {model}", "give a name of `llmos models`, a folder, or a hub name"
        )
    return Path(found).parent
