"""How a model of transformers reads and writes an engine's blocks.

A step is one packed row of tokens: those of several texts one after the other, without padding. A
text is a span of the row: its new tokens, and the table of blocks that holds those before them. The
models call `attend` in each layer, through transformers' own registry of attention functions; which
spans the row has is set around the call (`over`).

Spans of one token, which is what decoding gives, are computed together by the native library, or
padded to one batch without it. A longer one is computed by itself, with the operators of torch.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from llmos.services.engine.native import paged
from llmos.services.engine.pool import BLOCK_TOKENS, Pool

NAME = "llmos_paged"


@dataclass(frozen=True)
class Span:
    """New tokens of one text: `count` of them from `start` on, which are so many as it has
    before."""

    blocks: Sequence[int]
    start: int
    count: int


class Step:
    """The spans of one row, prepared once for all layers. Spans of one token come first."""

    def __init__(self, pool: Pool, spans: Sequence[Span]) -> None:
        self.pool = pool
        self.device = pool.data.device
        self.singles = sum(1 for span in spans if span.count == 1)
        assert all(span.count == 1 for span in spans[: self.singles]), "single tokens come first"
        self.long = self._long_spans(spans[self.singles :])
        slots = [
            span.blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
            for span in spans
            for at in range(span.start, span.start + span.count)
        ]
        self.slots = torch.tensor(slots, dtype=torch.int64, device=self.device)
        self.tables, self.lengths = self._tables(spans[: self.singles])
        self.library = paged.library() if self._fits_native() else None
        self.threads = torch.get_num_threads()
        if self.library is None and self.singles:
            self._prepare_padded()

    def _fits_native(self) -> bool:
        return self.device.type == "cpu" and self.pool.shape.dtype in (
            torch.float32,
            torch.bfloat16,
        )

    def _tables(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        widest = max((len(span.blocks) for span in spans), default=0)
        rows = [[*span.blocks, *[0] * (widest - len(span.blocks))] for span in spans]
        tables = torch.tensor(rows, dtype=torch.int32, device=self.device).view(len(spans), widest)
        lengths = [span.start + 1 for span in spans]
        return tables, torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def _long_spans(self, spans: Sequence[Span]) -> list[tuple[list[int], list[Span]]]:
        """Spans with equal start and count are computed together: -> [(rows, spans)...]."""
        groups: dict[tuple[int, int], tuple[list[int], list[Span]]] = {}
        row = self.singles
        for span in spans:
            rows, members = groups.setdefault((span.start, span.count), ([], []))
            rows.append(row)
            members.append(span)
            row += span.count
        return list(groups.values())

    def _prepare_padded(self) -> None:
        longest = int(self.lengths.max())
        used = -(-longest // BLOCK_TOKENS)
        self._padded = self.tables[:, :used].to(torch.int64).flatten()
        places = torch.arange(used * BLOCK_TOKENS, device=self.device)
        self._seen = (places[None, :] < self.lengths[:, None])[:, None, None, :]

    # ---- one layer ----

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """New keys and values, each (1, heads, tokens, dim), to their places."""
        for new, to in zip((key, value), self.pool.layer(layer), strict=True):
            _, heads, tokens, dim = new.shape
            if self.library is not None and new.stride(3) == 1:
                self.library.store(
                    to.data_ptr(), new.data_ptr(), self.slots.data_ptr(), tokens, heads, dim,
                    BLOCK_TOKENS, to.stride(0), new.stride(2), new.stride(1), new.element_size(),
                )  # fmt: skip
            else:
                to[self.slots // BLOCK_TOKENS, self.slots % BLOCK_TOKENS] = new[0].transpose(0, 1)

    def decode(
        self, layer: int, query: Tensor, out: Tensor, scale: float, window: int, cap: float
    ) -> None:
        """The spans of one token. query and out: (rows, heads, dim)."""
        if self.library is not None:
            query = query.contiguous()
            keys, _ = self.pool.layer(layer)
            rows, heads, dim = query.shape
            self.library.decode(
                keys.data_ptr(), query.data_ptr(), self.tables.data_ptr(), self.lengths.data_ptr(),
                out.data_ptr(), rows, heads, self.pool.shape.kv_heads, dim, BLOCK_TOKENS,
                keys.stride(0), self.pool.data.stride(2), self.tables.stride(0), heads * dim, scale,
                cap, window, query.dtype == torch.bfloat16, self.threads,
            )  # fmt: skip
            return
        keys, values = (
            t.index_select(0, self._padded).view(len(query), -1, *t.shape[2:]).transpose(1, 2)
            for t in self.pool.layer(layer)
        )
        seen = self._seen
        if window:
            places = torch.arange(seen.shape[-1], device=self.device)
            seen = seen & (places >= self.lengths[:, None, None, None] - window)
        # What lies in a block behind a text, or in one that was somebody's, may be no number.
        places = seen[:, :, 0, :, None]
        keys, values = keys.masked_fill(~places, 0), values.masked_fill(~places, 0)
        out.copy_(_scaled(query[:, :, None], keys, values, seen, scale, cap)[:, :, 0])

    def prefill(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        scale: float,
        window: int,
        cap: float,
    ) -> None:
        """The longer spans. query, key and value: (heads, tokens of the row, dim); out: (tokens,
        heads, dim)."""
        for rows, spans in self.long:
            start, count = spans[0].start, spans[0].count
            q = torch.stack([query[:, row : row + count] for row in rows])
            if start == 0:
                k = torch.stack([key[:, row : row + count] for row in rows])
                v = torch.stack([value[:, row : row + count] for row in rows])
            else:
                k, v = self._before(layer, spans, start + count)
            mask = None
            if start or window:
                at = torch.arange(start, start + count, device=self.device)[:, None]
                places = torch.arange(start + count, device=self.device)[None, :]
                mask = places <= at
                if window:
                    mask = mask & (places > at - window)
            done = _scaled(q, k, v, mask, scale, cap, causal=mask is None)
            for row, one in zip(rows, done, strict=True):
                out[row : row + count] = one.transpose(0, 1)

    def _before(self, layer: int, spans: Sequence[Span], tokens: int) -> tuple[Tensor, Tensor]:
        """Everything that the texts have in a layer, each (texts, heads, tokens, dim)."""
        used = -(-tokens // BLOCK_TOKENS)
        blocks = [block for span in spans for block in span.blocks[:used]]
        index = torch.tensor(blocks, device=self.device)
        keys, values = (
            t.index_select(0, index).view(len(spans), -1, *t.shape[2:])[:, :tokens].transpose(1, 2)
            for t in self.pool.layer(layer)
        )
        return keys, values


def _scaled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float,
    causal: bool = False,
) -> Tensor:
    """softmax(q k) v for (texts, heads, tokens, dim); `mask` is true where a token is seen."""
    if not cap:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = cap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / cap))
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(q.dtype) @ v


_current: list[Step] = []


@contextmanager
def over(step: Step) -> Iterator[None]:
    """The model that is called inside computes this row."""
    _current.append(step)
    try:
        yield
    finally:
        _current.pop()


class Unknown(Exception):
    """A model asks its attention for something that this one does not know."""


# What models hand to their attention besides, and what is of no account here.
_IGNORED = frozenset(
    {"dropout", "position_ids", "use_cache", "output_attentions", "is_causal", "cache_position",
     "position_embeddings", "logits_to_keep"}
)  # fmt: skip


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention interface: query (1, heads, tokens, dim), key and value (1, kv_heads,
    tokens, dim) -> (1, tokens, heads, dim). Raises Unknown."""
    step = _current[-1]
    asked = {k for k, v in more.items() if v is not None and v is not False} - _IGNORED
    if asked or attention_mask is not None:
        raise Unknown(f"attention with {', '.join(sorted(asked)) or 'a mask of its own'}")
    layer, window = int(module.layer_idx), int(sliding_window or 0)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    cap = float(softcap or 0.0)
    step.store(layer, key, value)
    _, heads, tokens, dim = query.shape
    out = query.new_empty(tokens, heads, dim)
    ones = step.singles
    if ones:
        step.decode(layer, query[0, :, :ones].transpose(0, 1), out[:ones], scale, window, cap)
    if step.long:
        step.prefill(layer, query[0], key[0], value[0], out, scale, window, cap)
    return out[None], None


AttentionInterface.register(NAME, attend)
