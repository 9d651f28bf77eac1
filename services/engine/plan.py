"""What an engine and its guests will hold, predicted from the model's files and its shape.

From the headers of the weight files and config.json: nothing is loaded.
"""
# ruff: noqa: TID253  (imported by `plan` only, in a child that has torch at hand)

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llmos.services.engine.batch import MOST_PIECE
from llmos.services.engine.cache import GuestCache
from llmos.services.engine.pool import BLOCK_TOKENS, KvShape
from llmos.services.engine.weights import kind_and_dtype
from llmos.services.engine.weights_plan import plan_weights
from llmos.services.model.dryrun import Books
from llmos.services.model.footprint import with_layers
from llmos.services.model.load import (
    check_weights,
    code_is_allowed,
    load_config,
    load_tokenizer,
)
from llmos.services.programs.base import Footprint, Segment, planned_device

# What an engine's guests share: so many tokens, and at least one long text. Recurrent models keep
# one state for each guest.
PLANNED_GUESTS = 64
PLANNED_TOKENS = 16384
LONGEST_PLANNED = 32768

# Private memory of a worker on a CPU that serves, beside its tensors. Measured by
# tests/bench/bench_footprint.py.
CONTEXT_BYTES = 20 << 20

# Of a prompt, one piece is computed at a time.
PREFILL_TOKENS = MOST_PIECE


def plan_engine(model: str, dtype: str, kv_bytes: int = 0) -> Footprint:
    """Weights, keys and values of the guests, one piece of a prompt in flight. Raises BadInput."""
    check_weights(model)
    load_tokenizer(model)
    whole = load_config(model)
    config = whole.get_text_config()
    weights = plan_weights(model, whole, dtype)
    context = CONTEXT_BYTES if planned_device() == "cpu" else 0
    tokens = min(_context(config), PLANNED_TOKENS)
    kv = kv_bytes or kv_budget(config, weights.dtype)
    activations = _activations(whole, weights.dtype, tokens)
    # What loading takes is gone before the first token comes.
    loading = max(0, weights.loading_bytes - kv - activations)
    return Footprint(
        (
            *weights.segments,
            Segment("kv", kv),
            Segment("activations", activations),
            Segment("context", context + loading),
        )
    )


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
    whole = load_config(model)
    config = whole.get_text_config()
    _, computed = kind_and_dtype(whole, dtype, planned_device())
    tokens = min(_context(config), PLANNED_TOKENS if tokens is None else tokens)
    return Footprint((Segment("kv", kv_bytes(config, computed, tokens)),))


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
