"""A model of an engine with all that belongs to it: blocks, tokenizer, limits."""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmos.services.engine import attention
from llmos.services.engine.model import ALL, Model, PagedModel, StatefulModel, Work
from llmos.services.engine.plan import kv_shape

# What a packed row of a few tokens may differ from the model's own forward, as a part of the
# scores' length: sums in another order do; another attention (a bias for distance, a window)
# differs by more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

_TRIED_TOKENS = 24


class Loaded:
    """Ready to compute. `kv_bytes`: memory for keys and values at most."""

    def __init__(self, model: Any, tokenizer: Any, kv_bytes: int) -> None:
        model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.stop_ids = stop_ids(model, tokenizer)
        self.why_stateful = ""
        self.model = self._face(model, kv_bytes)
        limits = [n for n in (context_tokens(model.config), self.model.capacity()) if n is not None]
        self.context_tokens = min(limits, default=None)
        self.token_text = lru_cache(1 << 16)(self._token_text)

    def _face(self, model: Any, kv_bytes: int) -> Model:
        shape = kv_shape(model.config.get_text_config(), model.dtype)
        if shape is None:
            self.why_stateful = "its memory is no cache of keys and values"
            return StatefulModel(model, kv_bytes)
        before = model.config._attn_implementation
        ids = _some_ids(self.vocabulary).to(model.device)
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[0]
        paged = PagedModel(model, shape, max(8, kv_bytes // shape.block_bytes))
        with torch.inference_mode():
            try:
                self.why_stateful = _differs(paged, ids, expected)
            except (
                attention.Unknown,
                NotImplementedError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as exc:
                self.why_stateful = str(exc) or type(exc).__name__
        if not self.why_stateful:
            return paged
        model.set_attn_implementation(before)
        return StatefulModel(model, kv_bytes)

    def _token_text(self, token: int) -> str:
        """The text of one token by itself, as OpenAI shows it beside log-probabilities: bytes that
        are no text are written as "bytes:\\xe2\\x80"."""
        tokenizer = self.tokenizer
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return ""
        if piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
            return f"bytes:\\x{piece[3:5].lower()}"
        if token in tokenizer.all_special_ids:
            return str(piece)
        if "\u2581" in piece:
            return str(piece).replace("\u2581", " ")
        text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text if "\ufffd" not in text else "bytes:" + _escaped(piece)


def _escaped(piece: str) -> str:
    """The bytes of a token of a byte-level vocabulary (GPT-2's table of printable characters)."""
    table = _byte_table()
    return "".join(f"\\x{table[c]:02x}" if c in table else c for c in piece)


@lru_cache(1)
def _byte_table() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _some_ids(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, _TRIED_TOKENS), generator=generator)


def _differs(paged: PagedModel, ids: Tensor, expected: Tensor) -> str:
    """Why a packed row does not compute what the model's own forward does; empty when it does.

    A text in three pieces, one of them a single token, beside another text.
    """
    row = ids[0].tolist()
    text, _ = paged.begin(row, "tried", False, None)
    other, _ = paged.begin(row[::-1], "tried", False, None)
    if not (paged.grow(text, 0, len(row)) and paged.grow(other, 0, len(row))):
        return "there is no memory for a few tokens"
    found = []
    cuts = (0, len(row) // 2, len(row) // 2 + 1, len(row))
    for begin, end in pairwise(cuts):
        beside = Work(other, row[::-1][begin:end], begin, ALL)
        scores = paged.forward([beside, Work(text, row[begin:end], begin, ALL)])
        found.append(scores[end - begin :])
    paged.release(text)
    paged.release(other)
    off = float((torch.cat(found).float() - expected.float()).norm() / expected.float().norm())
    if off <= _TOLERANCE.get(paged.model.dtype, 5e-2):
        return ""
    return f"its attention differs by {off:.0%}"


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
