"""What is added to and taken from the scores of single tokens, before one is chosen.

As in OpenAI's API and in vLLM, in this order: the bias is added (logit_bias); the scores of tokens
that the prompt or the answer has are divided by the repetition penalty, or multiplied where they
are below 0 (Keskar et al. 2019); and of tokens that the answer has, frequency_penalty is taken for
each time and presence_penalty once. Only the ids concerned are ever looked at.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmos.kernel.errors import BadArgument

# The columns of a table of penalties.
_ID, _BIAS, _FACTOR, _MINUS = range(4)
_GROWTH = 64  # rows that a full table gets at least


def read_bias(given: Any, vocabulary: int) -> dict[int, float]:
    """{"50256": -100} -> {50256: -100.0}. Raises BadArgument."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadArgument(f"logit_bias must be a map, not {given!r}", 'write it as {"50256": -100}')
    bias: dict[int, float] = {}
    for key, value in given.items():
        try:
            token = int(key)
        except (TypeError, ValueError):
            raise BadArgument(f"logit_bias has {key!r} where a token id belongs") from None
        if not 0 <= token < vocabulary:
            raise BadArgument(
                f"logit_bias has the token id {token}", f"the model knows 0 to {vocabulary - 1}"
            )
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -100 <= value <= 100
        ):
            raise BadArgument(f"logit_bias adds {value!r} to token {token}", "-100 to 100")
        bias[token] = float(value)
    return bias


def is_penalized(args: Any) -> bool:
    """Does what was there before count for anything?"""
    return bool(args.repetition_penalty != 1 or args.presence_penalty or args.frequency_penalty)


class Penalties:
    """The tokens of one answer whose scores are changed."""

    def __init__(
        self, args: Any, bias: Mapping[int, float], prompt: Sequence[int], vocabulary: int
    ) -> None:
        self._repetition = float(args.repetition_penalty)
        self._presence = float(args.presence_penalty)
        self._frequency = float(args.frequency_penalty)
        self._counts_answer = is_penalized(args)
        seen = np.unique(np.asarray(prompt if self._repetition != 1 else (), dtype=np.int64))
        # Ids that have no score cannot be chosen anyway.
        ids = np.union1d(seen[(seen >= 0) & (seen < vocabulary)], np.fromiter(bias, np.int64))
        self._table = np.zeros((len(ids) + _GROWTH, 4))
        self._size = len(ids)
        self._at: dict[int, int] = {token: at for at, token in enumerate(ids.tolist())}
        table = self._table[: self._size]
        table[:, _ID] = ids
        table[:, _FACTOR] = np.where(np.isin(ids, seen), self._repetition, 1)
        for token, value in bias.items():
            table[self._at[token], _BIAS] = value

    def count(self, token: int, times: int) -> None:
        """The answer has `token` so many times now."""
        if not self._counts_answer:
            return
        at = self._at.get(token)
        if at is None:
            at = self._add(token)
        self._table[at, _FACTOR] = self._repetition
        self._table[at, _MINUS] = self._presence + self._frequency * times

    @property
    def table(self) -> npt.NDArray[np.float64]:
        """(tokens, 4): id, bias, factor, and what is taken."""
        return self._table[: self._size]

    def _add(self, token: int) -> int:
        at = self._size
        if at == len(self._table):
            self._table = np.concatenate((self._table, np.zeros((at + _GROWTH, 4))))
        self._table[at] = (token, 0, 1, 0)
        self._at[token] = at
        self._size += 1
        return at


def penalize(scores: Tensor, penalties: Sequence[Penalties | None]) -> None:
    """Change `scores` (rows, vocabulary) float32 in place, by the penalties of each row."""
    tables = [(row, one.table) for row, one in enumerate(penalties) if one is not None]
    if not tables:
        return
    lengths = [len(table) for _, table in tables]
    rows = np.repeat([row for row, _ in tables], lengths)
    table = np.concatenate([table for _, table in tables])
    places = table[:, _ID].astype(np.int64) + rows * scores.shape[1]
    where = torch.from_numpy(places).to(scores.device, non_blocking=True)
    changes = torch.from_numpy(table).to(scores.device, torch.float32, non_blocking=True)
    _, bias, factor, minus = changes.unbind(1)
    flat = scores.view(-1)
    found = flat[where] + bias
    flat[where] = torch.where(found < 0, found * factor, found / factor) - minus
