"""In which products the tokens of a row get their adapters. Plain values, no torch.

A product is batched: some slots of a bank that lie side by side, the same number of tokens for
each. Measured on a CPU (tests/bench/bench_adapters.py) it is the fastest form for one adapter and
for many: a loop pays for each call, one product over all adapters for all that it masks, and a
gather of the weights for reading them three times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

# An adapter with so many tokens in the row is worth a product of its own.
ALONE_TOKENS = 16

# Slots between two that are used cost their reading; above so many another call is cheaper.
GAP_SLOTS = 3


@dataclass(frozen=True)
class Product:
    """Slots low..high-1 of a bank, `each` tokens of each, as a matrix (slots * each, features).

    Row i of it is token `sources[i]` of the step's row; where that is nobody's (an unused slot, one
    with fewer tokens) it is any token. Result `places[i]` belongs to token `targets[i]`.
    """

    low: int
    high: int
    each: int
    sources: tuple[int, ...]
    places: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def straight(self) -> bool:
        """Are its rows tokens of the step's row, in order and without a hole?"""
        first = self.sources[0]
        count = len(self.sources)
        return len(self.places) == count and self.sources == tuple(range(first, first + count))


def arrange(spans: Iterable[tuple[int, int, int]]) -> list[Product]:
    """Products for tokens [start, end) of a slot, given as (slot, start, end), in any order."""
    tokens: dict[int, list[int]] = defaultdict(list)
    for slot, start, end in spans:
        tokens[slot].extend(range(start, end))
    sizes: dict[int, list[int]] = defaultdict(list)
    alone = []
    for slot in sorted(tokens):
        count = len(tokens[slot])
        if count >= ALONE_TOKENS:
            alone.append([slot])
        elif count:
            sizes[(count - 1).bit_length()].append(slot)  # 1, 2, 3-4, 5-8, 9-15
    groups = [group for slots in sizes.values() for group in _neighbours(slots)]
    return [_product(group, tokens) for group in (*groups, *alone)]


def waste(products: list[Product]) -> int:
    """What these products cost beyond what they would if the used slots lay side by side: slots
    read for nothing, and calls, each as dear as the slots that one gap may have."""
    unused = sum(p.high - p.low - len({place // p.each for place in p.places}) for p in products)
    few = [(p.each - 1).bit_length() for p in products if p.each < ALONE_TOKENS]
    return unused + GAP_SLOTS * (len(few) - len(set(few)))


def _neighbours(slots: list[int]) -> list[list[int]]:
    groups = [[slots[0]]]
    for slot in slots[1:]:
        if slot - groups[-1][-1] - 1 <= GAP_SLOTS:
            groups[-1].append(slot)
        else:
            groups.append([slot])
    return groups


def _product(slots: list[int], tokens: dict[int, list[int]]) -> Product:
    low, high = slots[0], slots[-1] + 1
    each = max(len(tokens[slot]) for slot in slots)
    anyone = tokens[slots[0]][0]
    sources, places, targets = [anyone] * ((high - low) * each), [], []
    for slot in slots:
        for number, token in enumerate(tokens[slot]):
            place = (slot - low) * each + number
            sources[place] = token
            places.append(place)
            targets.append(token)
    return Product(low, high, each, tuple(sources), tuple(places), tuple(targets))
