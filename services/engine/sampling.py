"""Choose the next tokens from a model's scores. It knows no model and no text.

Greedy at temperature 0, and where only one can be drawn (top_k 1, top_p 0). Otherwise, in the order
of transformers and vLLM: bias and penalties (`penalties`), what a constraint forbids, temperature,
top_k, top_p, min_p, and one is drawn (`draw`).

A sampler has a generator of its own: what others draw changes nothing for it. Each token takes
exactly one number of it, whatever it is chosen from and whether it was chosen at all: `choose`
looks at the number of the token to come, and `accept` passes it. So an answer is brought to where
it was by accepting its tokens again, and to choose twice without accepting gives the same token.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from llmos.services.engine import draw
from llmos.services.engine.constrain import Constraint, forbid
from llmos.services.engine.draw import Settings
from llmos.services.engine.penalties import Penalties, is_penalized, penalize, read_bias


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and what was asked about it; or `error`: why there is none (then it is NOTHING).

    `logprob` and `top` (pairs of id and log-probability, the likeliest first, among equals the
    lowest id) are natural and of the model's own scores.
    """

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    error: str = ""


class Sampler:
    """One answer's choice of tokens."""

    def __init__(
        self,
        args: Any,
        seed: int,
        vocabulary: int,
        prompt_ids: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """`args` has the fields of Generation. Raises BadArgument (logit_bias)."""
        self._random = random.Random(seed % 2**64)
        self._uniform = self._random.random()
        self._vocabulary = vocabulary
        self._prompt = prompt_ids
        self._counts: dict[int, int] = {}
        self.constraint = constraint
        self.change(args)

    def change(self, args: Any) -> None:
        """Other settings from the next token on. Raises BadArgument, and then changes nothing."""
        bias = read_bias(args.logit_bias, self._vocabulary)
        self.penalties: Penalties | None = None
        if bias or is_penalized(args):
            self.penalties = Penalties(args, bias, self._prompt, self._vocabulary)
            for token, times in self._counts.items():
                self.penalties.count(token, times)
        self.logprobs: int | None = args.logprobs
        top_k = int(args.top_k) if args.top_k < self._vocabulary else 0
        log_min_p = math.log(args.min_p) if args.min_p > 0 else -math.inf
        self._settings = (float(args.temperature), top_k, float(args.top_p), log_min_p)
        self.way = _way(self._settings, self._vocabulary)

    def accept(self, token: int) -> None:
        """The token was taken, whether it was chosen here or by an engine before this one."""
        times = self._counts[token] = self._counts.get(token, 0) + 1
        if self.penalties is not None:
            self.penalties.count(token, times)
        if self.constraint is not None:
            self.constraint.accept(token)
        self._uniform = self._random.random()

    def go_on_from(self, before: Sampler) -> None:
        """Go on in the generator of another, which chooses no more: a chat has one for all."""
        self._random, self._uniform = before._random, before._uniform

    def reseed(self, seed: int) -> None:
        """Begin anew in a generator."""
        self._random = random.Random(seed % 2**64)
        self._uniform = self._random.random()

    @property
    def finished(self) -> bool:
        """Is all that was asked for there, so that only the end of text may follow?"""
        return self.constraint is not None and self.constraint.done

    @property
    def edits(self) -> bool:
        """Are scores changed before a token is chosen?"""
        return self.constraint is not None or self.penalties is not None

    def settings(self) -> tuple[float, ...]:
        """A row for draw.Settings."""
        return (*self._settings, self._uniform)


class _Way(Enum):
    """How a token is found; rows of one way are drawn together."""

    GREEDY = auto()
    NARROW = auto()  # a top_k that is small beside the vocabulary
    WIDE = auto()
    UNCUT = auto()


@torch.inference_mode()
def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The next token of each row of `logits` (rows, vocabulary), one sampler for each row.

    Results leave the device once for each way of choosing that there is among the rows.
    """
    logits = logits.detach()
    ways: dict[tuple[bool, _Way], list[int]] = defaultdict(list)
    for row, sampler in enumerate(samplers):
        ways[sampler.edits, sampler.way].append(row)
    tokens = dict(_draw_all(logits, samplers, ways))
    undecided: dict[tuple[bool, _Way], list[int]] = defaultdict(list)
    for row, token in tokens.items():
        if token == draw.UNDECIDED:
            undecided[samplers[row].edits, _Way.WIDE].append(row)
    tokens.update(_draw_all(logits, samplers, undecided))
    choices = [
        Choice(tokens[row], error=_why(sampler) if tokens[row] == draw.NOTHING else "")
        for row, sampler in enumerate(samplers)
    ]
    _tell_logprobs(logits, samplers, choices)
    return choices


@torch.inference_mode()
def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Choice]:
    """The log-probabilities of given tokens, and the `top` likeliest in the place of each.

    `logits`: (tokens, vocabulary), the scores from which each token could have been chosen.
    """
    given = torch.tensor(tokens, dtype=torch.int64).to(logits.device)
    return _score(logits.detach(), given, tokens, top)


def _why(sampler: Sampler) -> str:
    """Why no token can be chosen."""
    if sampler.constraint is not None and sampler.constraint.error:
        return sampler.constraint.error
    return "no token can be chosen: the model's scores are no numbers"


def _way(settings: tuple[float, int, float, float], vocabulary: int) -> _Way:
    temperature, top_k, top_p, log_min_p = settings
    if temperature == 0 or top_k == 1 or top_p == 0:
        return _Way.GREEDY
    if not top_k and top_p == 1 and log_min_p == -math.inf:
        return _Way.UNCUT
    if top_k and draw.is_narrow(top_k + draw.SPARE, vocabulary):
        return _Way.NARROW
    return _Way.WIDE


def _draw_all(
    logits: Tensor, samplers: Sequence[Sampler], ways: dict[tuple[bool, _Way], list[int]]
) -> Iterator[tuple[int, int]]:
    """-> (row, token) for each row that is in `ways`."""
    for (edits, way), rows in ways.items():
        for part, scores in _parts(logits, rows):
            among = [samplers[row] for row in part]
            drawn = _draw(_edited(scores, among) if edits else scores, among, way)
            yield from zip(part, drawn, strict=True)


def _parts(logits: Tensor, rows: list[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Some rows of `logits`: a copy, in parts; all of them as they are."""
    if len(rows) == len(logits):
        yield rows, logits
        return
    for piece in draw.pieces(logits[: len(rows)]):
        index = torch.tensor(rows[piece]).to(logits.device, non_blocking=True)
        yield rows[piece], logits[index]


def _edited(scores: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The scores after penalties and constraints, in float32."""
    scores = scores.to(torch.float32, copy=True)
    penalize(scores, [sampler.penalties for sampler in samplers])
    forbid(scores, [sampler.constraint for sampler in samplers])
    return scores


def _draw(scores: Tensor, samplers: Sequence[Sampler], way: _Way) -> list[int]:
    if way is _Way.GREEDY:
        return draw.greedy(scores)
    settings = Settings.of([sampler.settings() for sampler in samplers])
    if way is _Way.NARROW:
        most = int(settings.cuts.top_k.max()) + draw.SPARE
        return draw.draw_narrow(scores, settings, most)
    return draw.draw_wide(scores, settings, cut=way is _Way.WIDE)


def _tell_logprobs(logits: Tensor, samplers: Sequence[Sampler], choices: list[Choice]) -> None:
    """Put in what the samplers that ask for log-probabilities ask for."""
    asked = [(row, one.logprobs) for row, one in enumerate(samplers) if one.logprobs is not None]
    if not asked:
        return
    most = max(top for _, top in asked)
    for part, scores in _parts(logits, [row for row, _ in asked]):
        tokens = [choices[row].token for row in part]
        given = torch.tensor(tokens, dtype=torch.int64).to(logits.device)
        for row, scored in zip(part, _score(scores, given, tokens, most), strict=True):
            wanted = scored.top[: samplers[row].logprobs]
            choices[row] = replace(scored, top=wanted, error=choices[row].error)


def _score(logits: Tensor, given: Tensor, tokens: Sequence[int], top: int) -> list[Choice]:
    choices: list[Choice] = []
    for piece in draw.pieces(logits):
        scores = logits[piece]
        found = scores.gather(1, given[piece].clamp(min=0).unsqueeze(1)).double()
        mass = draw.log_mass(scores)
        told = torch.cat((found - mass, mass), 1).tolist()
        likeliest = _likeliest(scores, top) if top else [[] for _ in told]
        for token, (logprob, mass_), pairs in zip(tokens[piece], told, likeliest, strict=True):
            choices.append(Choice(token, logprob, [(one, value - mass_) for one, value in pairs]))
    return choices


def _likeliest(scores: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """The `top` highest tokens of each row with their scores."""
    values, ids = draw.highest(scores, top)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
