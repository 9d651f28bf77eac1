"""Choose the next token from the model's scores. It knows no model and no text.

Greedy at temperature 0. Otherwise, in transformers' order: the scores are divided by the
temperature, the `top_k` highest stay, of these the likeliest that together hold the
probability `top_p` (Holtzman et al. 2020), and one is drawn.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import torch
from torch import Tensor


class Sampler:
    """A generator of its own for each guest: what others draw changes nothing here."""

    def __init__(self, temperature: float, top_k: int, top_p: float, seed: int) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token from `logits` of shape (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits.float().cpu() / self.temperature
        count = min(self.top_k or len(scores), len(scores))
        # Sorted, the likeliest first: both cuts below are then cuts at the end.
        scores, tokens = scores.topk(count) if count < len(scores) else scores.sort(descending=True)
        up_to = scores.double().softmax(0).cumsum(0)
        if self.top_p < 1:
            # A token stays when those before it hold less than top_p; the first always stays.
            up_to = up_to[: 1 + int((up_to[:-1] < self.top_p).sum())]
        drawn = int((up_to < self._uniform() * up_to[-1]).sum())
        return int(tokens[min(drawn, len(up_to) - 1)])

    def skip(self) -> None:
        """Pass over what the choice of one token takes from the generator."""
        if self.temperature != 0:
            self._uniform()

    def _uniform(self) -> Tensor:
        """One number for each token, whatever it is chosen from: so that tokens can be skipped."""
        return torch.rand((), dtype=torch.float64, generator=self._generator)


# ---- shim until the sampler lands ----
from dataclasses import dataclass as _d
from dataclasses import field as _f


@_d(frozen=True)
class Choice:
    token: int
    logprob: float | None = None
    top: list = _f(default_factory=list)


class _Old(Sampler):
    pass


class Sampler:  # type: ignore
    def __init__(self, args, seed, vocabulary, prompt_ids=(), constraint=None):
        self.args = args
        self.old = _Old(args.temperature, args.top_k, args.top_p, seed)

    def accept(self, token, replayed=False):
        if replayed:
            self.old.skip()

    def change(self, args):
        self.args = args
        self.old.temperature, self.old.top_k, self.old.top_p = (
            args.temperature,
            args.top_k,
            args.top_p,
        )

    def reseed(self, seed):
        self.old._generator = torch.Generator().manual_seed(seed)

    def go_on_from(self, other):
        self.old._generator = other.old._generator


def choose(logits, samplers):
    if all(s.args.temperature == 0 for s in samplers):
        return [Choice(t) for t in logits.argmax(-1).tolist()]
    return [Choice(s.old(l)) for s, l in zip(samplers, logits)]


def score(logits, tokens, top):
    lp = logits.float().log_softmax(-1)
    return [Choice(t, float(lp[i, t]), []) for i, t in enumerate(tokens)]
