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
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.hub import cached_file

from llmos.kernel.errors import BadInput
from llmos.services.engine.cache import GuestCache
from llmos.services.engine.layout import BETWEEN_BYTES, packs, widens
from llmos.services.engine.pool import BLOCK_TOKENS, KvShape
from llmos.services.model.dryrun import Books
from llmos.services.model.footprint import with_layers
from llmos.services.model.load import (
    check_weights,
    code_is_allowed,
    load_config,
    load_tokenizer,
    resolve_dtype,
    weight_files,
)
from llmos.services.programs.base import Footprint, Segment, planned_device

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# What an engine's guests share: so many tokens, and at least one long text. Recurrent models keep
# one state for each guest.
PLANNED_GUESTS = 64
PLANNED_TOKENS = 16384
LONGEST_PLANNED = 32768

# Private memory of a worker on a CPU that serves, beside its tensors. Measured by
# tests/bench/bench_footprint.py.
CONTEXT_BYTES = 20 << 20

# Of a prompt, one piece is computed at a time.
PREFILL_TOKENS = 512


def plan_engine(model: str, dtype: str, kv_bytes: int = 0) -> Footprint:
    """Weights, keys and values of the guests, one piece of a prompt in flight. Raises BadInput."""
    check_weights(model)
    load_tokenizer(model)
    whole = load_config(model)
    config = whole.get_text_config()
    asked = resolve_dtype(dtype)
    cpu = planned_device() == "cpu"
    packed = packs(config.model_type, asked, planned_device())
    segments = _weights(_folder(model), asked, packed)
    if cpu and config.tie_word_embeddings and (packed or asked == torch.float32):
        # The output layer is the embedding, but is held once more in a layout of its own.
        head_bytes = config.vocab_size * config.hidden_size * asked.itemsize
        segments.append(Segment("weights", head_bytes))
    context = (CONTEXT_BYTES if cpu else 0) + (_twice(_folder(model), asked) if packed else 0)
    segments += [
        Segment("kv", kv_bytes or kv_budget(config, asked)),
        Segment("activations", _activations(whole, asked, min(_context(config), PLANNED_TOKENS))),
        Segment("context", context),
    ]
    return Footprint(tuple(segments))


def _twice(folder: Path, asked: torch.dtype) -> int:
    """While weights are packed, the largest is there twice, and some others are."""
    shapes = [shape for file in weight_files(folder) for _, _, shape in _tensors(file)]
    counts = [prod(shape) for shape in shapes]
    return min(sum(counts) * asked.itemsize, max(BETWEEN_BYTES, max(counts) * asked.itemsize))


def _activations(config: PreTrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """What the last piece of a prompt of `tokens` tokens takes, beside weights and cache.

    Layers come one after the other, so two of them show it.
    """
    books = Books()
    last = min(tokens, PREFILL_TOKENS)
    with books, torch.no_grad():
        with books.making("weights"):
            few = with_layers(config, min(2, config.get_text_config().num_hidden_layers))
            model = AutoModelForCausalLM.from_config(
                few, dtype=dtype, trust_remote_code=code_is_allowed()
            ).eval()  # type: ignore[no-untyped-call]
        cache = GuestCache()
        books.phase("before")
        for count in (tokens - last, last):
            books.phase("last")
            if count:
                ids = torch.zeros(1, count, dtype=torch.int64)
                past = cache.past
                kept = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                cache.keep(kept.past_key_values, [0] * count)
                del kept
        after = books.live["activations"]
    return max(0, books.peaks["last"]["activations"] - after)


def plan_guest(model: str, dtype: str, tokens: int | None) -> Footprint:
    """The cache of one guest that sees `tokens` tokens at most (None: a full context)."""
    config = load_config(model).get_text_config()
    limit = _context(config)
    tokens = min(limit, PLANNED_TOKENS if tokens is None else tokens)
    return Footprint((Segment("kv", kv_bytes(config, resolve_dtype(dtype), tokens)),))


def kv_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Keys and values of `tokens` tokens, in whole blocks; of a recurrent model one state."""
    shape = kv_shape(config, dtype)
    if shape is None:
        # One state for each layer (two in an LSTM), however long the text is.
        return int(2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize)
    return -(-tokens // BLOCK_TOKENS) * shape.block_bytes


def kv_shape(config: Any, dtype: torch.dtype) -> KvShape | None:
    """What a model keeps for each token; None for one without keys and values, or whose layers do
    not all see what is before them in the same way."""
    heads = getattr(config, "num_attention_heads", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not heads or kinds - {"full_attention", "sliding_attention"}:
        return None
    if getattr(config, "attention_chunk_size", None):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # The type of the model's own products: a model of int8 weights computes in bfloat16.
    return KvShape(config.num_hidden_layers, kv_heads, head_dim, dtype)


def kv_budget(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values that an engine is given: a few guests' texts."""
    if kv_shape(config, dtype) is None:
        return PLANNED_GUESTS * kv_bytes(config, dtype, 0)
    return kv_bytes(config, dtype, max(PLANNED_TOKENS, min(_context(config), LONGEST_PLANNED)))


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
    """At most these are copied by engine.layout: a plan cannot tell a layer from a table."""
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
