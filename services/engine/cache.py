"""The memory of one guest: what the model has computed for the tokens seen so far.

It is whatever the model returns as `past_key_values`: transformers' cache for attention, the
state object of a recurrent model. This module knows how to make it grow cheaply and how to go
back in it; it knows no text.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

# Room is made for so many tokens at least each time: a copy of the whole cache at every token
# (what DynamicLayer does) costs more than the attention itself in a long text.
ROOM_TOKENS = 256


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values (batch, heads, tokens, head_dim) with room behind them, doubled when full."""

    def __init__(self, filled: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = filled.keys, filled.values
        assert keys is not None
        assert values is not None
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._tokens = keys.shape[-2]
        self._room_keys, self._room_values = keys, values
        self._make_room(self._tokens)
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self._tokens + key_states.shape[-2]
        if end > self._room_keys.shape[-2]:
            self._make_room(end)
        self._room_keys[:, :, self._tokens : end] = key_states
        self._room_values[:, :, self._tokens : end] = value_states
        self._tokens = end
        return self._show()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the count is given as a negative number, as in transformers."""
        self._tokens -= abs(tokens_to_remove)
        self._show()

    def trim(self) -> None:
        """Give the room behind the tokens back; the next token makes some again."""
        self._room_keys = self._copy(self._room_keys, self._tokens)
        self._room_values = self._copy(self._room_values, self._tokens)
        self._show()

    def _make_room(self, tokens: int) -> None:
        room = max(tokens + ROOM_TOKENS, 2 * self._tokens)
        self._room_keys = self._copy(self._room_keys, room)
        self._room_values = self._copy(self._room_values, room)

    def _copy(self, old: Tensor, room: int) -> Tensor:
        batch, heads, _, size = old.shape
        new = old.new_empty(batch, heads, room, size)
        new[:, :, : self._tokens] = old[:, :, : self._tokens]
        return new

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys = self._room_keys[:, :, : self._tokens]
        self.values = self._room_values[:, :, : self._tokens]
        return self.keys, self.values


class GuestCache:
    """The ids of the tokens that the model has seen, and what it keeps of them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.past: Any = None
        self.nbytes = 0  # of `past`

    def tensors(self) -> Iterator[Tensor]:
        """What it holds on the device: every tensor that can be reached from the state."""
        yield from _tensors_in(self.past, set())

    def keep(self, past: Any, ids: list[int]) -> None:
        """After a forward over `ids`: what the model returned is the state from now on."""
        if self.past is None and isinstance(past, Cache):
            for i, layer in enumerate(past.layers):
                if type(layer) is DynamicLayer and layer.is_initialized:
                    past.layers[i] = GrowingLayer(layer)
        self.past = past
        self.ids.extend(ids)
        self.nbytes = sum(t.nbytes for t in self.tensors())

    def rewind_to(self, wanted: list[int]) -> list[int]:
        """Go back to the longest common beginning with `wanted`; -> the ids still to be computed.

        At least one id is left to compute: the scores of the next token come from it. A state
        that cannot go back (recurrent, sliding window) is dropped, and all is computed again.
        """
        same = 0
        for mine, other in zip(self.ids, wanted[:-1], strict=False):
            if mine != other:
                break
            same += 1
        surplus = len(self.ids) - same
        if surplus and not self._crop(surplus):
            self.past, same = None, 0
        del self.ids[same:]
        return wanted[same:]

    def trim(self) -> None:
        """Give back what no token needs."""
        if isinstance(self.past, Cache):
            for layer in self.past.layers:
                if isinstance(layer, GrowingLayer):
                    layer.trim()

    def _crop(self, tokens: int) -> bool:
        if not isinstance(self.past, Cache):
            return False
        if not all(isinstance(layer, GrowingLayer) for layer in self.past.layers):
            return False
        self.past.crop(-tokens)
        return True


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in a cache of any kind: its layers, lists, dictionaries, attributes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner, seen)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors_in(inner, seen)
    elif hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value), seen)
