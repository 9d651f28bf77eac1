"""What adapters add to one row of tokens, in any layer.

The base has computed the row; here each adapter's B (A x) is added for its own tokens. A row's
products are the same in every layer, so they are worked out once.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmos.services.engine.adapter_bank import Bank
from llmos.services.engine.adapter_plan import Product, arrange, waste

# (the bank of an adapter and its slot there; None: the base alone), and so many tokens.
Span = tuple[tuple[Bank, int] | None, int]


class Row:
    """What the adapters add to a row of `tokens` tokens, layer by layer."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.tokens = sum(tokens for _, tokens in spans)
        self.wasted: dict[Bank, tuple[list[int], int]] = {}
        self._parts: list[Part] = []
        for bank, mine in _by_bank(spans).items():
            products = arrange(mine)
            self.wasted[bank] = (sorted({slot for slot, _, _ in mine}), waste(products))
            self._parts += [Part(bank, product, self.tokens, device) for product in products]
        self._values: Tensor | None = None  # what the layer before was given
        self._rows = torch.empty(0)  # the same as (1, tokens, in)

    def changes(self, name: str) -> bool:
        return any(name in bank.a for bank in self.wasted)

    def add(self, name: str, values: Tensor, out: Tensor) -> None:
        """Add to `out` (.., out features) what the adapters make of `values` (.., in features)."""
        if values is not self._values:  # layers side by side (queries, keys, values) share theirs
            self._values = values
            self._rows = values.reshape(1, -1, values.shape[-1])
            for part in self._parts:
                part.taken = None
            if self._rows.shape[1] != self.tokens:
                raise RuntimeError(
                    f"{name} got {self._rows.shape[1]} tokens of a row of {self.tokens}: "
                    "adapters cannot be told apart there"
                )
        result = out if out.dim() == 3 and out.shape[0] == 1 else out.view(1, -1, out.shape[-1])
        for part in self._parts:
            part.add(name, self._rows, result)

    def rest(self) -> None:
        """Between two forwards: hold no activations."""
        self._values, self._rows = None, torch.empty(0)
        for part in self._parts:
            part.taken = None


def _by_bank(spans: Sequence[Span]) -> dict[Bank, list[tuple[int, int, int]]]:
    """(slot, first token, token after the last) of each span with an adapter."""
    found: dict[Bank, list[tuple[int, int, int]]] = {}
    start = 0
    for place, tokens in spans:
        if place is not None:
            bank, slot = place
            found.setdefault(bank, []).append((slot, start, start + tokens))
        start += tokens
    return found


class Part:
    """One product of a plan, for any layer of its bank."""

    def __init__(self, bank: Bank, product: Product, tokens: int, device: torch.device) -> None:
        self._bank, self._low, self._high = bank, product.low, product.high
        self._slots = product.high - product.low
        count, first = len(product.sources), product.sources[0]
        self._straight = product.straight
        self._window = None if count == tokens else slice(first, first + count)
        if not self._straight:
            self._sources = torch.tensor(product.sources, device=device)
            self._targets = torch.tensor(product.targets, device=device)
            whole = product.places == tuple(range(count))
            self._places = None if whole else torch.tensor(product.places, device=device)
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self.taken: Tensor | None = None

    def add(self, name: str, rows: Tensor, result: Tensor) -> None:
        """result (1, tokens, out) += B (A rows), rows (1, tokens, in), for the tokens of this part.

        On a CPU a decode step calls this a hundred times for microseconds each: no view is made
        that is not needed.
        """
        stacks = self._stacks.get(name)
        if stacks is None:
            if name not in self._bank.a:
                return
            mine = slice(self._low, self._high)
            stacks = self._stacks[name] = (self._bank.a[name][mine], self._bank.b[name][mine])
        a, b = stacks
        if self.taken is None:
            self.taken = self._take(rows, a.dtype)
        # (slots, tokens, rank): A times a column is faster than a row times A transposed.
        small = torch.bmm(a, self.taken).transpose(1, 2)
        if not self._straight:
            self._scatter(torch.bmm(small, b), result)
            return
        if self._window is not None:
            result = result[:, self._window]
        if self._slots > 1:
            result = result.view(self._slots, -1, result.shape[-1])
        if result.dtype == b.dtype:
            result.baddbmm_(small, b)
        else:
            result.add_(torch.bmm(small, b))

    def _take(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens of this part, as columns: (slots, in, tokens of each)."""
        if not self._straight:
            rows = rows[0].index_select(0, self._sources)
        elif self._window is not None:
            rows = rows[:, self._window]
        if self._slots > 1 or not self._straight:
            rows = rows.reshape(self._slots, -1, rows.shape[-1])
        return rows.to(dtype).transpose(1, 2)

    def _scatter(self, large: Tensor, result: Tensor) -> None:
        flat = large.view(-1, large.shape[-1])
        if self._places is not None:
            flat = flat.index_select(0, self._places)
        result[0].index_add_(0, self._targets, flat.to(result.dtype))
