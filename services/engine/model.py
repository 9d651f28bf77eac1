"""One causal language model in the memory of an engine: from token ids to the next scores.

It knows a model and a cache; it knows no guests, no text and no choice of tokens.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from llmos.services.engine.cache import GuestCache
from llmos.services.engine.layout import lay_out


class LoadedModel:
    """A transformers causal language model, ready for one sequence at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._device = model.device
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.context_tokens = context_tokens(model.config)
        self.stop_ids = stop_ids(model, tokenizer)
        self._last_only = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        lay_out(model)

    def forward(self, cache: GuestCache, ids: list[int]) -> Tensor:
        """Compute `ids` after what `cache` holds; -> scores of the next token (vocabulary,).

        Without an attention mask: one sequence and no padding, so that the model's own causal
        rule is all there is, and for a single token nothing is built at all.
        """
        out = self.model(
            input_ids=torch.tensor([ids], device=self._device),
            past_key_values=cache.past,
            use_cache=True,
            **self._last_only,
        )
        cache.keep(out.past_key_values, ids)
        scores: Tensor = out.logits[0, -1]
        return scores


def context_tokens(config: Any) -> int | None:
    """How many tokens the model can see at once; None when there is no limit (recurrent)."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text: as generate() takes them, and the tokenizer's own."""
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    ids = [found] if isinstance(found, int) else list(found or ())
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return frozenset(ids)
