"""A causal language model in the memory of an engine: from token ids to the next scores.

Two kinds behind one face. `PagedModel` computes the tokens of many texts in one row, over blocks
that they share. `StatefulModel` is for models whose memory is no cache of keys and values, or whose
attention has a rule of its own: each text has what the model itself returns as its state. They know
models and texts as ids; they know no guests and no choice of tokens.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmos.services.engine import attention
from llmos.services.engine.attention import Span, Step
from llmos.services.engine.blocks import Blocks, Table
from llmos.services.engine.cache import GuestCache
from llmos.services.engine.pool import BLOCK_TOKENS, KvShape, Pool
from llmos.services.model import safepoints
from llmos.services.model.recurrent import RecurrentState

NOTHING, LAST, ALL = "nothing", "last", "all"


@dataclass(frozen=True)
class Work:
    """The next tokens of one text: `ids`, of which `start` tokens go before.

    `wanted`: scores after none of them, after the last, or after each. `adapter`: what changes the
    model's weights for this text.
    """

    memory: Any
    ids: Sequence[int]
    start: int
    wanted: str = LAST
    adapter: Any = None


# Around a forward of spans (adapter, tokens), in the order of the row.
Routing = Callable[[Sequence[tuple[Any, int]]], AbstractContextManager[None]]


def no_routing(spans: Sequence[tuple[Any, int]]) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class Model(Protocol):
    """What a host computes with. A text's memory is opaque to it."""

    routing: Routing

    def begin(
        self, ids: Sequence[int], salt: Hashable, share: bool, before: Any
    ) -> tuple[Any, int]:
        """The memory of a text, and how many of its first tokens need no computing. `before`: the
        memory of the same user's text until now, which is used or let go."""
        ...

    def grow(self, memory: Any, start: int, tokens: int) -> bool:
        """Room for the tokens from `start` up to `tokens` -> whether there is."""
        ...

    def done(self, memory: Any, ids: Sequence[int], tokens: int) -> None:
        """The first `tokens` of `ids` are computed."""
        ...

    def fork(self, memory: Any) -> Any: ...

    def release(self, memory: Any) -> None: ...

    def forward(self, work: Sequence[Work]) -> Tensor:
        """Scores (wanted rows, vocabulary), in the order of `work`."""
        ...

    def hidden(self, work: Sequence[Work]) -> Tensor:
        """The last hidden states (tokens, width) of all tokens, in the order of `work`."""
        ...

    def capacity(self) -> int | None:
        """Tokens that one text can have at most; None: no limit."""
        ...

    def trim(self) -> None:
        """Give back what no text needs."""
        ...

    def tensors(self) -> Iterator[Tensor]: ...


class PagedModel:
    """All texts in one packed row, over a pool of blocks."""

    def __init__(self, model: Any, shape: KvShape, blocks: int) -> None:
        self.model = model
        self.routing: Routing = no_routing
        self.device = model.device
        self.pool = Pool(shape, blocks, self.device.type)
        self.blocks = Blocks(blocks, BLOCK_TOKENS)
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.set_attn_implementation(attention.NAME)

    def begin(
        self, ids: Sequence[int], salt: Hashable, share: bool, before: Table | None
    ) -> tuple[Table, int]:
        table = self.blocks.begin(ids, salt, share)  # first: it may find what `before` lets go
        if before is not None:
            self.blocks.release(before)
        return table, table.cached

    def grow(self, memory: Table, start: int, tokens: int) -> bool:
        copies = self.blocks.grow(memory, start, tokens)
        if copies is None:
            return False
        self.pool.copy(copies)
        return True

    def done(self, memory: Table, ids: Sequence[int], tokens: int) -> None:
        self.blocks.computed(memory, ids, tokens)

    def fork(self, memory: Table) -> Table:
        return self.blocks.fork(memory)

    def release(self, memory: Table) -> None:
        self.blocks.release(memory)

    def forward(self, work: Sequence[Work]) -> Tensor:
        order, step, ids, positions = self._row(work)
        keep = self._kept(work, order)
        with attention.over(step), self._routed(work, order):
            if self._selects:
                out = self.model(
                    input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep
                )
                scores: Tensor = out.logits[0]
            else:
                out = self.model(input_ids=ids, position_ids=positions, use_cache=False)
                scores = out.logits[0, keep]
        return scores

    def hidden(self, work: Sequence[Work]) -> Tensor:
        order, step, ids, positions = self._row(work)
        with attention.over(step), self._routed(work, order):
            out = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        states: Tensor = out.last_hidden_state[0]
        places = self._places(work, order)
        rows = [
            at for one, w in zip(places, work, strict=True) for at in range(one, one + len(w.ids))
        ]
        return states[torch.tensor(rows, device=self.device)]

    def capacity(self) -> int | None:
        return self.pool.count * BLOCK_TOKENS

    def trim(self) -> None:
        self.pool.give_back(self.blocks.forget())

    def tensors(self) -> Iterator[Tensor]:
        yield from safepoints.tensors_of(self.model)
        yield self.pool.data

    def _row(self, work: Sequence[Work]) -> tuple[list[int], Step, Tensor, Tensor]:
        """The packed row: single tokens first -> (order of the works in it, ...)."""
        order = sorted(range(len(work)), key=lambda i: len(work[i].ids) > 1)
        spans = [Span(work[i].memory.blocks, work[i].start, len(work[i].ids)) for i in order]
        step = Step(self.pool, spans)
        ids = [token for i in order for token in work[i].ids]
        positions = [at for s in spans for at in range(s.start, s.start + s.count)]
        both = torch.tensor([ids, positions], device=self.device)
        return order, step, both[:1], both[1:]

    def _places(self, work: Sequence[Work], order: Sequence[int]) -> list[int]:
        """Where each work's first token is in the row."""
        places, at = [0] * len(work), 0
        for i in order:
            places[i] = at
            at += len(work[i].ids)
        return places

    def _kept(self, work: Sequence[Work], order: Sequence[int]) -> Tensor:
        """The rows whose scores are wanted, in the order of `work`."""
        kept: list[int] = []
        for first, w in zip(self._places(work, order), work, strict=True):
            last = first + len(w.ids) - 1
            if w.wanted == ALL:
                kept.extend(range(first, last + 1))
            elif w.wanted == LAST:
                kept.append(last)
        return torch.tensor(kept, dtype=torch.int64, device=self.device)

    def _routed(self, work: Sequence[Work], order: Sequence[int]) -> AbstractContextManager[None]:
        if all(w.adapter is None for w in work):
            return contextlib.nullcontext()
        return self.routing([(work[i].adapter, len(work[i].ids)) for i in order])


class StatefulModel:
    """Each text by itself, with the state that the model returns."""

    def __init__(self, model: Any, most_bytes: int) -> None:
        self.model = model
        self.routing: Routing = no_routing
        self.device = model.device
        self._most_bytes = most_bytes
        self._states: list[GuestCache] = []
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def begin(
        self, ids: Sequence[int], salt: Hashable, share: bool, before: GuestCache | None
    ) -> tuple[GuestCache, int]:
        state = before if before is not None else GuestCache()
        if before is None:
            self._states.append(state)
        rest = state.rewind_to(list(ids))
        return state, len(ids) - len(rest)

    def grow(self, memory: GuestCache, start: int, tokens: int) -> bool:
        """A state's size is known when it is there: above the limit nobody gets another token until
        somebody has let his go, but for one."""
        used = sum(state.nbytes for state in self._states)
        return used <= self._most_bytes or all(s is memory or not s.nbytes for s in self._states)

    def done(self, memory: GuestCache, ids: Sequence[int], tokens: int) -> None:
        pass

    def fork(self, memory: GuestCache) -> GuestCache:
        state = copy.deepcopy(memory)
        self._states.append(state)
        return state

    def release(self, memory: GuestCache) -> None:
        self._states = [state for state in self._states if state is not memory]
        memory.past, memory.nbytes = None, 0
        memory.ids.clear()

    def forward(self, work: Sequence[Work]) -> Tensor:
        together = [w for w in work if self._can_join(w)]
        if len(together) < 2:
            return torch.cat([self._scores(w) for w in work])
        rows = dict(zip(map(id, together), self._join(together), strict=True))
        return torch.cat([rows[id(w)][None] if id(w) in rows else self._scores(w) for w in work])

    def hidden(self, work: Sequence[Work]) -> Tensor:
        return torch.cat(
            [self._run(w, output_hidden_states=True).hidden_states[-1][0] for w in work]
        )

    def capacity(self) -> int | None:
        return None

    def trim(self) -> None:
        for state in self._states:
            state.trim()

    def tensors(self) -> Iterator[Tensor]:
        yield from safepoints.tensors_of(self.model)
        for state in self._states:
            yield from state.tensors()

    @staticmethod
    def _can_join(w: Work) -> bool:
        """A recurrent state is a row of a batch, however long its text is."""
        return isinstance(w.memory.past, RecurrentState) and len(w.ids) == 1 and not w.adapter

    def _join(self, work: Sequence[Work]) -> Tensor:
        """One token for each of many recurrent texts at once -> scores (texts, vocabulary)."""
        ids = torch.tensor([list(w.ids) for w in work], device=self.device)
        state = RecurrentState.joined([w.memory.past for w in work])
        out = self.model(input_ids=ids, past_key_values=state, use_cache=True, **self._last_only)
        for w, past in zip(work, out.past_key_values.parted(), strict=True):
            past.seen_tokens = w.start + 1
            w.memory.keep(past, list(w.ids))
        scores: Tensor = out.logits[:, -1]
        return scores

    def _scores(self, w: Work) -> Tensor:
        out = self._run(w, **(self._last_only if w.wanted != ALL else {}))
        scores: Tensor = out.logits[0]
        if w.wanted == NOTHING:
            return scores[:0]
        return scores if w.wanted == ALL else scores[-1:]

    def _run(self, w: Work, **more: Any) -> Any:
        """Without an attention mask: one sequence and no padding, so that the model's own causal
        rule is all there is, and for a single token nothing is built at all."""
        with self.routing([(w.adapter, len(w.ids))]) if w.adapter else contextlib.nullcontext():
            out = self.model(
                input_ids=torch.tensor([list(w.ids)], device=self.device),
                past_key_values=w.memory.past,
                use_cache=True,
                **more,
            )
        w.memory.keep(out.past_key_values, list(w.ids))
        return out
