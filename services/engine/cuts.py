"""Cuts: the lowest score of a row that stays, by top_k, top_p and min_p, in transformers' order.

top_k: the k-th highest. top_p: of what is left, the highest tokens that together hold this part of
the probability (Holtzman et al. 2020); one stays when those above it hold less. min_p: this part
of the probability of the likeliest. The lowest that stays by all three is what is told.

Rows are scaled scores (z <= 0, the highest is 0), so exp(z) is a weight. Of few scores a sort tells
it. Of a whole vocabulary a sort takes 0.75 ms for 32,000 and 6 ms for 152,000 on a CPU, and most of
it is not needed: scores are put into buckets by the first bits of the number, the weights of the
buckets tell in which one the cut is, and only that is sorted (at most 0.2 and 0.6 ms).
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Bits of a float32 that do not count for its bucket: 6 bits of the fraction are left, so that
# scores of one bucket differ by less than a sixtieth.
_BUCKET_SHIFT = 17
_BUCKETS = (0x7F800000 >> _BUCKET_SHIFT) + 1  # the last is that of -inf

# What is counted at once: bincount makes copies, and large ones cost page faults (152,000 at once
# take twice as long as in pieces).
_PIECE = 2**15


@dataclass(frozen=True)
class Cuts:
    """What is asked for, of each row: (rows, 1)."""

    top_k: Doubles  # 0: off
    top_p: Doubles  # 1: off
    log_min_p: Doubles  # -inf: off

    def __getitem__(self, rows: slice) -> Cuts:
        return Cuts(self.top_k[rows], self.top_p[rows], self.log_min_p[rows])


def of_few(z: Floats, cuts: Cuts) -> tuple[Floats, Floats]:
    """The lowest z that stays, by top_k alone and by all; (rows, 1) each, -inf: no cut.

    `z` (rows, tokens) in any order.
    """
    rows, size = z.shape
    row, ordered = np.arange(rows)[:, None], np.sort(z, axis=1)[:, ::-1]
    at = cuts.top_k.clip(1, size).astype(np.int64) - 1
    kth = np.where(cuts.top_k > 0, ordered[row, at], np.float32(-np.inf))
    weights = np.exp(ordered, dtype=np.float64) * (ordered >= kth)
    up_to = weights.cumsum(1)
    # The first always stays.
    staying = (up_to - weights < cuts.top_p * up_to[:, -1:]).sum(1, keepdims=True).clip(1)
    nucleus = np.where(cuts.top_p < 1, ordered[row, staying - 1], np.float32(-np.inf))
    return kth, np.maximum(np.maximum(kth, nucleus), cuts.log_min_p.astype(np.float32))


def drop(z: Tensor, weights: Tensor, cuts: Cuts) -> None:
    """Set the weights of what is cut off to 0, in place.

    `z` and `weights` = exp(z): (rows, vocabulary) float32.
    """
    if z.device.type != "cpu":
        weights.mul_(z >= on_device(z, cuts))
        return
    asked = np.concatenate((cuts.top_k, cuts.top_p, cuts.log_min_p), 1).tolist()
    for row, weight, wanted in zip(z.numpy(), weights.numpy(), asked, strict=True):
        np.multiply(weight, row >= np.float32(_of_row(row, weight, *wanted)), out=weight)


def on_device(z: Tensor, cuts: Cuts) -> Tensor:
    """The lowest z that stays (rows, 1), by a sort where `z` is."""
    size = z.shape[1]
    asked = np.concatenate((cuts.top_k, cuts.top_p, cuts.log_min_p), 1)
    top_k, top_p, log_min_p = torch.from_numpy(asked).to(z.device).unsqueeze(2).unbind(1)
    ordered = z.sort(1, descending=True).values
    kth = ordered.gather(1, top_k.clamp(1, size).long() - 1).where(top_k > 0, -torch.inf)
    weights = ordered.double().exp_() * (ordered >= kth)
    up_to = weights.cumsum(1)
    staying = (up_to - weights < top_p * up_to[:, -1:]).sum(1, keepdim=True).clamp(min=1)
    nucleus = ordered.gather(1, staying - 1).where(top_p < 1, -torch.inf)
    return torch.maximum(torch.maximum(kth, nucleus), log_min_p.float())


def _of_row(z: Floats, weights: Floats, top_k: float, top_p: float, log_min_p: float) -> float:
    lowest = -math.inf
    if 0 < top_k < len(z):
        at = len(z) - int(top_k)
        lowest = float(np.partition(z, at)[at])
    if top_p < 1:
        if lowest > -math.inf:
            left = z >= lowest
            z, weights = z[left], weights[left]
        lowest = max(lowest, _nucleus(z, weights, top_p))
    return max(lowest, log_min_p)


def _nucleus(z: Floats, weights: Floats, top_p: float) -> float:
    total = float(weights.sum(dtype=np.float64))
    if math.isnan(total):  # the highest is no number; then nothing is drawn
        return -math.inf
    # All that are less likely than this hold less than what is cut off: often nearly all tokens.
    likely = z >= math.log((1 - top_p) * total / len(z))
    if np.count_nonzero(likely) < len(z) // 8:
        z, weights = z[likely], weights[likely]
    # Of numbers that are all below 0 the bits without the sign grow as they fall.
    buckets = z.view(np.int32) & 0x7FFFFFFF
    buckets >>= _BUCKET_SHIFT
    held = np.zeros(_BUCKETS)
    for at in range(0, len(z), _PIECE):
        piece = slice(at, at + _PIECE)
        held += np.bincount(buckets[piece], weights=weights[piece], minlength=_BUCKETS)
    up_to = held.cumsum()
    wanted = top_p * total
    # Sums in another order may differ in the last bits: never beyond the last that holds something.
    bucket = min(int(np.searchsorted(up_to, wanted)), int(buckets.max()))
    before = up_to[bucket - 1] if bucket else 0.0
    falling = np.sort(z[buckets == bucket])[::-1]
    inside = np.exp(falling.astype(np.float64))
    staying = int((before + inside.cumsum() - inside < wanted).sum())
    return float(falling[max(staying, 1) - 1])
