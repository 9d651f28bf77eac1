"""From scores to token ids: tensors only, many answers at once. It knows no guests and no text.

A row is the scores of one answer over the vocabulary, of any floating type, on any device. A token
is drawn in three steps:

1. *Cuts.* Each cut (top_k, top_p, min_p) is a lowest score that stays. So tokens with the same
   score stay or go together (in bfloat16 many have the same), and nothing hangs on how a sort
   treats equals.
2. *Weights.* What stays has the weight exp((score - highest) / temperature).
3. *The draw.* The weights are laid end to end **in the order of the ids**, and one uniform number
   points at one of them. In the order of the scores, which is more usual, two tokens that swap
   their places because the last bits of their scores changed would be swapped in the text too.

Two ways lead to the same token. The *wide* one looks at the whole row. Where there is a top_k, the
*narrow* one looks at few tokens: the vocabulary is folded into columns of FOLD scores, whose
highest are found in one vectorized pass, and of the columns with the highest heads all scores are
taken. All others are at most as high as the lowest of these heads (`bound`), so when the k-th is
above it, it is the k-th of the whole row. When it is not (many have the same score) the answer is
UNDECIDED.

On a CPU numpy finds the highest of a row 10 to 70 times as fast as torch does (128 x 152,000 in
bfloat16: 1 ms for 69), and no row is ever sorted: see `cuts`.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmos.services.engine import cuts

FOLD = 16
SPARE = 16  # columns beyond those needed, for tokens with the same score
BLOCK = 128  # tokens whose weights are summed before the wide way looks at single ones

# Elements of a temporary on a CPU: larger ones leave the caches, and their pages are made anew
# each time.
PIECE = 2**20
PIECE_OF_DEVICE = 2**26  # elsewhere: what a prompt's log-probabilities may take for a moment

NOTHING = -1  # in place of an id: the scores of the row are not numbers, or all are -inf
UNDECIDED = -2

# Below, temperatures are indistinguishable from 0 and from infinity in float32.
_COLDEST, _HOTTEST = 1e-30, 1e30
_JUST_BELOW_1 = 1 - 2**-52


@dataclass(frozen=True)
class Columns:
    """Settings of rows, each of shape (rows, 1)."""

    scale: Tensor  # float32: 1 / temperature
    top_k: Tensor  # the others float64; 0: off
    top_p: Tensor  # 1: off
    log_min_p: Tensor  # -inf: off
    uniform: Tensor  # [0, 1): where each row's token is drawn

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]], device: torch.device) -> Columns:
        """From (temperature, top_k, top_p, log_min_p, uniform) of each row."""
        columns = torch.tensor(rows, dtype=torch.float64).to(device, non_blocking=True)
        warmth, *others = columns.unsqueeze(2).unbind(1)
        return cls(warmth.clamp(_COLDEST, _HOTTEST).reciprocal().float(), *others)

    def __getitem__(self, rows: slice) -> Columns:
        fields = (self.scale, self.top_k, self.top_p, self.log_min_p, self.uniform)
        return Columns(*(field[rows] for field in fields))


def greedy(scores: Tensor) -> Tensor:
    """The highest token of each row, among equals the lowest id; (rows,) int64."""
    if scores.device.type != "cpu":
        tokens = scores.argmax(1)
    elif scores.dtype in (torch.bfloat16, torch.float16):
        tokens = _argmax_of_halves(scores)
    else:
        tokens = torch.from_numpy(scores.numpy().argmax(1))
    found = scores.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens.where(found.isfinite(), NOTHING)


def draw_narrow(scores: Tensor, columns: Columns, count: int) -> Tensor:
    """Draw among the highest `count` columns -> (rows,) int64, some of them UNDECIDED.

    Each row has a top_k, smaller than `count`.
    """
    values, ids, bound = candidates(scores, count)
    peak = values.amax(1, keepdim=True)
    z = (values - peak) * columns.scale
    kth, lowest = cuts.of_few(z, columns.top_k, columns.top_p, columns.log_min_p)
    weights = z.double().exp_().where(z >= lowest, 0)
    tokens = ids.gather(1, _point(weights, columns.uniform)).where(peak.isfinite(), NOTHING)
    surely = kth > (bound - peak) * columns.scale
    return tokens.where(surely | (tokens == NOTHING), UNDECIDED).squeeze(1)


def draw_wide(scores: Tensor, columns: Columns, *, cut: bool) -> Tensor:
    """Draw among all tokens -> (rows,) int64. `cut`: some row has a cut."""
    size = scores.shape[1]
    width = -(-size // BLOCK) * BLOCK
    parts = list(pieces(scores, 2))
    # Made once for all pieces: the pages of a new one cost as much as what is computed in it.
    most = len(scores[parts[0]]) if parts else 0
    weights = torch.zeros((most, width), device=scores.device)
    z = torch.empty((most, size), device=scores.device)
    drawn = [_draw_wide(scores[part], columns[part], cut, weights, z) for part in parts]
    return torch.cat(drawn)


def candidates(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of the `count` highest columns of each row.

    -> values (rows, C) float32, their ids (rows, C) ascending, and the bound (rows, 1): no other
    score of the row is above it.
    """
    height = scores.shape[1] // FOLD
    folded = scores[:, : FOLD * height].view(-1, FOLD, height)
    heads = folded.amax(1).topk(count, sorted=False)
    # In ascending columns the scores come out in the order of their ids, line by line.
    columns = heads.indices.sort(1).values.unsqueeze(1)
    values = folded.gather(2, columns.expand(-1, FOLD, -1)).flatten(1)
    lines = torch.arange(0, FOLD * height, height, device=scores.device)
    ids = (columns + lines[:, None]).flatten(1)
    if tail := scores.shape[1] - FOLD * height:
        rest = torch.arange(FOLD * height, FOLD * height + tail, device=scores.device)
        ids = torch.cat((ids, rest.expand(len(ids), -1)), 1)
        values = torch.cat((values, scores[:, -tail:]), 1)
    return values.float(), ids, heads.values.amin(1, keepdim=True).float()


def highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest tokens of each row, among equals the lowest ids first.

    -> values (rows, count) float32, and ids.
    """
    if not is_narrow(count + SPARE, scores.shape[1]):
        return _highest_of_all(scores, count)
    values, ids, bound = candidates(scores, count + SPARE)
    values, at = _highest_of_all(values, count)
    ids = ids.gather(1, at)
    # Where the last has the score of others outside, one of those may have a lower id.
    for row in (values[:, -1:] <= bound).squeeze(1).nonzero().flatten().tolist():
        values[row], ids[row] = (
            found[0] for found in _highest_of_all(scores[row : row + 1], count)
        )
    return values, ids


def _highest_of_all(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same in one pass over whole rows -> values (rows, count) float32, and ids."""
    size = scores.shape[1]
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0: one bit pattern for 0 and -0
    # Of floats below 0 the order of the bits is the reverse.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    after = torch.arange(size - 1, -1, -1, device=scores.device)
    ids = size - 1 - ((ordered << 32) + after).topk(min(count, size)).values.bitwise_and(2**32 - 1)
    return scores.gather(1, ids).float(), ids


def is_narrow(columns: int, vocabulary: int) -> bool:
    """Are so many columns few enough for the narrow way to be worth it?"""
    return 4 * columns <= vocabulary // FOLD


def pieces(scores: Tensor, cost: int = 1) -> Iterator[slice]:
    """Rows that are worked on together. `cost`: how many temporaries of their size there are."""
    most = PIECE if scores.device.type == "cpu" else PIECE_OF_DEVICE
    rows = max(1, most // cost // scores.shape[1])
    for start in range(0, len(scores), rows):
        yield slice(start, start + rows)


def log_mass(scores: Tensor) -> Tensor:
    """The logarithm of the sum of exp of each row; (rows, 1) float64."""
    peak = scores.amax(1, keepdim=True).float()
    return peak.double() + _mass(scores, peak, torch.ones_like(peak)).log()


def _mass(scores: Tensor, peak: Tensor, scale: Tensor) -> Tensor:
    """The weight of all tokens of each row; (rows, 1) float64."""
    sums = [
        scores[piece].sub(peak[piece]).mul_(scale[piece]).exp_().sum(1, keepdim=True)
        for piece in pieces(scores)
    ]
    return torch.cat(sums).double()


def _point(weights: Tensor, part: Tensor) -> Tensor:
    """The place at which `part` (rows, 1) of each row's weight lies before; never a weight of 0."""
    up_to = weights.cumsum(1)
    # Rounded, a number below 1 times the total may be the total.
    wanted = part * _JUST_BELOW_1 * up_to[:, -1:]
    return torch.searchsorted(up_to, wanted, right=True).clamp_(max=weights.shape[1] - 1)


def _draw_wide(scores: Tensor, columns: Columns, cut: bool, weights: Tensor, z: Tensor) -> Tensor:
    """In `weights` (rows or more, whole blocks) and `z` (rows or more, tokens)."""
    rows, size = scores.shape
    weights, z = weights[:rows], z[:rows]
    peak = scores.amax(1, keepdim=True).float()
    torch.sub(scores, peak, out=z).mul_(columns.scale)
    mine = torch.exp(z, out=weights[:, :size])
    if cut:
        cuts.drop(z, mine, columns.top_k, columns.top_p, columns.log_min_p)
    # First the block, then the token in it: a sum over all of them one by one takes longer.
    by_block = weights.view(rows, -1, BLOCK)
    sums = by_block.sum(2).double()
    block = _point(sums, columns.uniform)
    before = (sums.cumsum(1) - sums).gather(1, block)
    inside = (columns.uniform * sums.sum(1, keepdim=True) - before) / sums.gather(1, block)
    chosen = by_block.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1).double()
    tokens = block * BLOCK + _point(chosen, inside.clamp(0, 1))
    return tokens.where(peak.isfinite(), NOTHING).squeeze(1)


def _argmax_of_halves(scores: Tensor) -> Tensor:
    """argmax of 16-bit floats on a CPU, by their bits read as integers.

    Floats above 0 are ordered as their bits are, those below 0 in reverse, and all of these come
    after those: so the highest bits are the highest float, or, where all are below 0, the lowest.
    """
    bits = scores.view(torch.int16).numpy()
    tokens = torch.from_numpy(bits.argmax(1))
    found = scores.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    for row, value in enumerate(found):
        if value < 0:
            tokens[row] = int(bits[row].argmin())
        elif value == 0:  # 0 and -0 are equal, their bits are not
            tokens[row] = scores[row].argmax()
    return tokens
