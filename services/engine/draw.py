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

What has the size of the vocabulary is computed where the scores are, what is small in numpy: there
an operation on a few numbers takes a microsecond, in torch several. And on a CPU numpy finds the
highest of a row 10 to 70 times as fast (128 x 152,000 in bfloat16: 1 ms for 69).
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmos.services.engine import cuts
from llmos.services.engine.cuts import Cuts, Doubles, Floats

Ids = npt.NDArray[np.int64]

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
class Settings:
    """How the tokens of rows are drawn."""

    scale: Floats  # (rows, 1): 1 / temperature
    cuts: Cuts
    uniform: Doubles  # (rows, 1), in [0, 1): where each row's token is

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> Settings:
        """From (temperature, top_k, top_p, log_min_p, uniform) of each row."""
        warmth, top_k, top_p, log_min_p, uniform = np.array(rows).T[:, :, None]
        scale = 1 / warmth.clip(_COLDEST, _HOTTEST)
        return cls(scale.astype(np.float32), Cuts(top_k, top_p, log_min_p), uniform)

    def __getitem__(self, rows: slice) -> Settings:
        return Settings(self.scale[rows], self.cuts[rows], self.uniform[rows])


@dataclass(frozen=True)
class Candidates:
    """The scores of the highest columns of rows.

    `values` (rows, C), in the order of their ids; no other score of a row is above its `bound`
    (rows, 1).
    """

    values: Floats
    bound: Floats
    _columns: Ids  # (rows, count), ascending
    _height: int

    def id_of(self, places: Ids) -> Ids:
        """The ids of places (rows, n) in `values`, which lie there line by line."""
        count = self._columns.shape[1]
        line, column = np.divmod(places, count)
        ids = np.take_along_axis(self._columns, column, 1) + line * self._height
        # After the last whole line come the few tokens that fill none.
        told: Ids = np.where(line < FOLD, ids, places + FOLD * (self._height - count))
        return told


def greedy(scores: Tensor) -> list[int]:
    """The highest token of each row, among equals the lowest id."""
    if scores.device.type != "cpu":
        tokens = scores.argmax(1)
    elif scores.dtype in (torch.bfloat16, torch.float16):
        tokens = _argmax_of_halves(scores)
    else:
        tokens = torch.from_numpy(scores.numpy().argmax(1))
    found = scores.gather(1, tokens.unsqueeze(1)).squeeze(1)
    told: list[int] = tokens.where(found.isfinite(), NOTHING).tolist()
    return told


def draw_narrow(scores: Tensor, settings: Settings, count: int) -> list[int]:
    """Draw among the highest `count` columns; some rows are UNDECIDED.

    Each row has a top_k, smaller than `count`.
    """
    found = candidates(scores, count)
    peak = found.values.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # rows without numbers
        z = (found.values - peak) * settings.scale
        kth, lowest = cuts.of_few(z, settings.cuts)
        weights = np.exp(z, dtype=np.float64) * (z >= lowest)
        up_to = weights.cumsum(1)
        # Rounded, a number below 1 times the total may be the total.
        wanted = settings.uniform * _JUST_BELOW_1 * up_to[:, -1:]
        surely = kth > (found.bound - peak) * settings.scale
    places = (up_to > wanted).argmax(1, keepdims=True)
    tokens = np.where(surely, found.id_of(places), UNDECIDED)
    told: list[int] = np.where(np.isfinite(peak), tokens, NOTHING)[:, 0].tolist()
    return told


def draw_wide(scores: Tensor, settings: Settings, *, cut: bool) -> list[int]:
    """Draw among all tokens. `cut`: some row has a cut."""
    size = scores.shape[1]
    width = -(-size // BLOCK) * BLOCK
    parts = list(pieces(scores, 2))
    # Made once for all pieces: the pages of a new one cost as much as what is computed in it.
    most = len(scores[parts[0]]) if parts else 0
    weights = torch.zeros((most, width), device=scores.device)
    z = torch.empty((most, size), device=scores.device)
    drawn = [_draw_wide(scores[part], settings[part], cut, weights, z) for part in parts]
    told: list[int] = torch.cat(drawn).tolist()
    return told


def candidates(scores: Tensor, count: int) -> Candidates:
    """The scores of the `count` highest columns of each row."""
    height = scores.shape[1] // FOLD
    folded = scores[:, : FOLD * height].view(-1, FOLD, height)
    heads = folded.amax(1).topk(count, sorted=False)
    # In ascending columns the scores come out in the order of their ids, line by line.
    columns = heads.indices.sort(1).values
    values = folded.gather(2, columns.unsqueeze(1).expand(-1, FOLD, -1)).flatten(1)
    bound = heads.values.amin(1, keepdim=True)
    told = torch.cat((bound, values, scores[:, FOLD * height :]), 1).float().cpu().numpy()
    return Candidates(told[:, 1:], told[:, :1], columns.cpu().numpy(), height)


def highest(scores: Tensor, count: int) -> tuple[Floats, Ids]:
    """The `count` highest tokens of each row, among equals the lowest ids first.

    -> values (rows, count), and ids.
    """
    if not is_narrow(count + SPARE, scores.shape[1]):
        return _highest_of_all(scores.float().cpu().numpy(), count)
    found = candidates(scores, count + SPARE)
    values, places = _highest_of_all(found.values, count)
    ids = found.id_of(places)
    # Where the last has the score of others outside, one of those may have a lower id.
    for row in np.flatnonzero(values[:, -1:] <= found.bound):
        whole = scores[row : row + 1].float().cpu().numpy()
        values[row], ids[row] = (one[0] for one in _highest_of_all(whole, count))
    return values, ids


def _highest_of_all(scores: Floats, count: int) -> tuple[Floats, Ids]:
    """The same of whole rows: sorted by one number for score and id."""
    size = scores.shape[1]
    bits = (scores + np.float32(0)).view(np.int32)  # + 0: one bit pattern for 0 and -0
    # Of floats below 0 the order of the bits is the reverse.
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
    keys = (ordered << 32) + np.arange(size - 1, -1, -1)
    first = max(size - count, 0)
    best = np.sort(np.partition(keys, first, 1)[:, first:], 1)[:, ::-1]
    ids = size - 1 - (best & 0xFFFFFFFF)
    return np.take_along_axis(scores, ids, 1), ids


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
    return peak.double() + scores.sub(peak).exp_().sum(1, keepdim=True).double().log()


def _draw_wide(scores: Tensor, settings: Settings, cut: bool, weights: Tensor, z: Tensor) -> Tensor:
    """In `weights` (rows or more, whole blocks) and `z` (rows or more, tokens); -> (rows,)."""
    rows, size = scores.shape
    weights, z = weights[:rows], z[:rows]
    scale = torch.from_numpy(settings.scale).to(scores.device)
    uniform = torch.from_numpy(settings.uniform).to(scores.device)
    peak = scores.amax(1, keepdim=True).float()
    torch.sub(scores, peak, out=z).mul_(scale)
    mine = torch.exp(z, out=weights[:, :size])
    if cut:
        cuts.drop(z, mine, settings.cuts)
    # First the block, then the token in it: a sum over all of them one by one takes longer.
    by_block = weights.view(rows, -1, BLOCK)
    sums = by_block.sum(2).double()
    block = _point(sums, uniform)
    before = (sums.cumsum(1) - sums).gather(1, block)
    inside = (uniform * sums.sum(1, keepdim=True) - before) / sums.gather(1, block)
    chosen = by_block.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1).double()
    tokens = block * BLOCK + _point(chosen, inside.clamp(0, 1))
    return tokens.where(peak.isfinite(), NOTHING).squeeze(1)


def _point(weights: Tensor, part: Tensor) -> Tensor:
    """The place at which `part` (rows, 1) of each row's weight lies before; never a weight of 0."""
    up_to = weights.cumsum(1)
    # Rounded, a number below 1 times the total may be the total.
    wanted = part * _JUST_BELOW_1 * up_to[:, -1:]
    return torch.searchsorted(up_to, wanted, right=True).clamp_(max=weights.shape[1] - 1)


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
