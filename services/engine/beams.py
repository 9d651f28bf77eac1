"""Beam search: the likeliest whole texts, not the likeliest next tokens. It knows no model.

The rules are those of transformers' generate(num_beams=k, do_sample=False, early_stopping=False).
In each step, of all ways to go on with one of k beams the best are looked at; those among the first
k that end (with an end token, or because there may be no more) are compared with the whole texts
found so far, by the sum of their log-probabilities over length ** length_penalty; the best k that
do not end go on. It is over when no beam could, at its present length, be better than the worst of
k whole texts.

Whoever has the model gives the scores of a step and is told which beam each new one goes on from,
so that its memory can be copied.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmos.kernel.errors import BadArgument, BadInput

MOST_LENGTH_PENALTY = 10  # a power of a length; beyond, the longest (or shortest) text wins anyway


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]  # of the answer
    score: float  # the sum of their log-probabilities; of a whole text, after the length penalty


class _Way(NamedTuple):
    """One token more on a beam."""

    parent: int
    token: int
    score: float


class Beams:
    """One search. `finished`: no more steps; `result` has what was found."""

    def __init__(
        self, k: int, length_penalty: float, eos_ids: Collection[int], max_new_tokens: int
    ) -> None:
        """`k` beams; `eos_ids` end a text. Raises BadArgument (length_penalty)."""
        if not abs(length_penalty) <= MOST_LENGTH_PENALTY:
            raise BadArgument(
                f"length_penalty cannot be {length_penalty}",
                f"it is from -{MOST_LENGTH_PENALTY} to {MOST_LENGTH_PENALTY}",
            )
        self.finished = max_new_tokens < 1
        self._k = k
        self._length_penalty = length_penalty
        self._eos_ids = frozenset(eos_ids)
        self._most = max_new_tokens
        self._running = [_Beam((), 0.0)]
        self._whole: list[_Beam] = []

    @torch.inference_mode()
    def step(self, logprobs: Tensor) -> tuple[list[int], list[int]]:
        """Go on by one token -> for each beam to come: which it goes on from, and with which token.

        `logprobs` (beams, vocabulary): the log-probabilities after each beam, in the order of the
        step before; in the first step one row, after the prompt. Both lists are empty at the end.
        Raises BadInput when the scores are no numbers.
        """
        length = len(self._running[0].ids) + 1
        ways = self._best(logprobs)
        ends = [way.token in self._eos_ids or length == self._most for way in ways]
        # Divided in float32, as the scores are there: the same are then equal.
        divided = torch.tensor([way.score for way in ways]) / float(length) ** self._length_penalty
        found = [
            self._longer(way, score)
            for way, end, score in [*zip(ways, ends, divided.tolist(), strict=True)][: self._k]
            if end
        ]
        ranked = sorted([*self._whole, *found], key=lambda beam: -beam.score)
        self._whole = ranked[: self._k]
        going_on = [way for way, end in zip(ways, ends, strict=True) if not end][: self._k]
        if not going_on or self._cannot_be_better(going_on[0].score, length):
            self.finished = True
            return [], []
        self._running = [self._longer(way, way.score) for way in going_on]
        return [way.parent for way in going_on], [way.token for way in going_on]

    def result(self) -> list[tuple[list[int], float]]:
        """Whole texts, the best first: the ids of each (its end token too) and its score."""
        return [(list(beam.ids), beam.score) for beam in self._whole]

    def _best(self, logprobs: Tensor) -> list[_Way]:
        """The best ways to go on, the best first."""
        sums = torch.tensor([beam.score for beam in self._running], device=logprobs.device)
        every = (logprobs.float() + sums.unsqueeze(1)).flatten()
        # So many that k are left when all that end are among the best.
        count = min(max(2, 1 + len(self._eos_ids)) * self._k, len(every))
        best = every.topk(count)
        scores, places = best.values.tolist(), best.indices.tolist()
        if any(map(math.isnan, scores)):
            raise BadInput("no token can be chosen: the model's scores are no numbers")
        size = logprobs.shape[1]
        return [
            _Way(place // size, place % size, score)
            for place, score in zip(places, scores, strict=True)
            if score > -math.inf
        ]

    def _longer(self, way: _Way, score: float) -> _Beam:
        return _Beam((*self._running[way.parent].ids, way.token), score)

    def _cannot_be_better(self, best: float, length: int) -> bool:
        """Is the best that goes on, cut off here, no better than the worst of k whole texts?"""
        if len(self._whole) < self._k:
            return False
        return bool(best / float(length) ** self._length_penalty <= self._whole[-1].score)
