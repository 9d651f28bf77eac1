"""Who gets tokens in the next step of an engine. Plain values: no torch, no text.

Everybody who decodes gets a token, as far as rows allow, the most urgent first; what is left of the
step's tokens goes to prompts. So a long prompt is computed in pieces beside the others' tokens, and
how large the pieces are is what the others wait for between two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Rows of a step at most, whoever waits: beyond this more rows make no more tokens per second.
MOST_ROWS = 256

# By how much prompts may make a step longer while somebody waits for his next token, and when
# nobody does.
STEP_S, ALONE_S = 0.04, 0.5

# What a plan of memory counts with, too (engine/plan.py).
LEAST_PIECE, MOST_PIECE = 32, 512


@dataclass(frozen=True)
class Rank:
    """How urgent a guest is: a smaller class goes first, then a smaller nice, then who came
    first."""

    cls: int
    nice: int
    order: int

    @property
    def key(self) -> tuple[int, int, int]:
        return self.cls, self.nice, self.order


@dataclass(frozen=True)
class Candidate:
    """A guest that has tokens to compute: `rows` of one token each, or a prompt of `pending`."""

    pid: int
    rank: Rank
    pending: int  # tokens of its prompt that are not computed yet; 0: it decodes
    rows: int = 1  # answers that it makes side by side
    last_served: int = 0  # the step in which it last got something
    exact: bool = False  # it is computed alone
    kind: str = "text"  # a step computes one kind


@dataclass(frozen=True)
class Share:
    """What a guest gets in a step: so many tokens of its prompt, or (0) one for each answer."""

    pid: int
    piece: int


class Pace:
    """How many tokens of prompts a step may have, so that they make it longer by so much.

    A token's part is the slope of a line through the last steps, with prompts and without. Where
    they are too much alike for a slope it stays, as far as the step that was measured allows: the
    tokens took no more than the whole of it, and hardly less than a quarter.
    """

    def __init__(self, tokens_per_s: float = 2000.0) -> None:
        self._each_s = 1 / tokens_per_s
        self._steps = 0
        self._piece = self._seconds = 0.0  # means of the last steps
        self._spread = self._joint = 0.0  # variance of the pieces, covariance with the seconds

    def took(self, piece: int, seconds: float) -> None:
        """A step with so many tokens of prompts is done."""
        self._steps += 1
        weight = max(0.05, 1 / self._steps)
        x, y = piece - self._piece, seconds - self._seconds
        self._piece += weight * x
        self._seconds += weight * y
        self._spread = (1 - weight) * (self._spread + weight * x * x)
        self._joint = (1 - weight) * (self._joint + weight * x * y)
        if piece < LEAST_PIECE:
            return
        is_alike = self._spread < (LEAST_PIECE / 8) ** 2
        slope = self._each_s if is_alike else self._joint / self._spread
        most_s = seconds / piece
        slope = min(max(slope, most_s / 4), most_s)
        self._each_s += 0.3 * (slope - self._each_s)

    @property
    def tokens_per_s(self) -> float:
        return 1 / self._each_s

    def piece(self, decoding: int) -> int:
        """Tokens of prompts in a step in which so many decode."""
        seconds = STEP_S if decoding else ALONE_S
        return int(min(MOST_PIECE, max(LEAST_PIECE, seconds / self._each_s)))


def plan(candidates: Sequence[Candidate], pace: Pace) -> list[Share]:
    """Who gets what in the next step, the most urgent first.

    A step is for whoever is most urgent, and of equals for who was served longest ago, with all who
    can be computed in the same row.
    """
    if not candidates:
        return []
    first = min(candidates, key=lambda c: (c.rank.cls, c.rank.nice, c.last_served, c.rank.order))
    if first.exact:
        return [Share(first.pid, min(first.pending, MOST_PIECE))]
    alike = [c for c in candidates if c.kind == first.kind and not c.exact]
    together = sorted(alike, key=lambda c: c.rank.key)
    decoding = _decoding([c for c in together if not c.pending])
    rows = sum(c.rows for c in decoding)
    shares = [Share(c.pid, 0) for c in decoding]
    return shares + _pieces([c for c in together if c.pending], pace.piece(rows))


def _decoding(waiting: list[Candidate]) -> list[Candidate]:
    """As many as have room; where not all have, those of one urgency take turns."""
    waiting = sorted(waiting, key=lambda c: (c.rank.cls, c.rank.nice, c.last_served, c.rank.order))
    taken, rows = [], 0
    for c in waiting:
        if rows and rows + c.rows > MOST_ROWS:
            break
        taken.append(c)
        rows += c.rows
    return taken


def _pieces(prompts: list[Candidate], tokens: int) -> list[Share]:
    """The step's tokens among prompts: by urgency; among equals half for who came first, so that
    everybody's turn comes, and half for the shortest, so that nobody waits behind a book."""
    given: dict[int, int] = {}
    while prompts and tokens > 0:
        level = (prompts[0].rank.cls, prompts[0].rank.nice)
        equal = [c for c in prompts if (c.rank.cls, c.rank.nice) == level]
        prompts = prompts[len(equal) :]
        shortest = sorted(equal, key=lambda c: (c.pending, c.rank.order))
        tokens = _give(given, equal[:1], tokens, -(-tokens // 2))
        tokens = _give(given, shortest, tokens, tokens)
    return [Share(pid, piece) for pid, piece in given.items()]


def _give(given: dict[int, int], to: list[Candidate], tokens: int, most: int) -> int:
    """Hand out up to `most` of the step's tokens -> what is left of them."""
    for c in to:
        piece = min(c.pending - given.get(c.pid, 0), most)
        if piece > 0:
            given[c.pid] = given.get(c.pid, 0) + piece
            tokens, most = tokens - piece, most - piece
    return tokens
