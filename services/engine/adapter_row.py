"""What adapters add to one row of tokens, in any layer.

The base has computed the row; here each adapter's B (A x) is added for its own tokens: by the
kernels of `native` where a CPU has them, else by products of torch. What is to be done is the same
in every layer, so it is worked out once for a row.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmos.services.engine.adapter_bank import Bank
from llmos.services.engine.adapter_plan import Product, arrange, waste
from llmos.services.engine.native.weights import Adapted, Kernels

# (the bank of an adapter and its slot there; None: the base alone), and so many tokens.
Span = tuple[tuple[Bank, int] | None, int]


class Row:
    """What the adapters add to a row of `tokens` tokens, layer by layer."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.tokens = sum(tokens for _, tokens in spans)
        # Of banks that torch computes with: the slots that are used, and what was wasted.
        self.wasted: dict[Bank, tuple[list[int], int]] = {}
        self._parts: list[NativePart | Part] = []
        for bank, mine in _by_bank(spans).items():
            if bank.kernels is not None:
                self._parts.append(NativePart(bank, bank.kernels, mine, self.tokens))
                continue
            products = arrange(mine)
            self.wasted[bank] = (sorted({slot for slot, _, _ in mine}), waste(products))
            self._parts += [Part(bank, product, self.tokens, device) for product in products]
        self._fused: dict[tuple[str, ...], int | None] = {}
        self._held: list[Any] = []  # whose addresses the kernels have
        self._values: Tensor | None = None  # what the layer before was given
        self._rows = torch.empty(0)  # the same as (1, tokens, in)

    def fused(self, names: tuple[str, ...], tokens: int) -> int | None:
        """An `Adapted` for a decoder's layer whose linear layers have these names: its address, 0
        when they are not changed; None when the kernels cannot do it."""
        self._check(names[0], tokens)
        if names not in self._fused:
            self._fused[names] = self._linked(names)
        return self._fused[names]

    def _linked(self, names: tuple[str, ...]) -> int | None:
        following = 0
        for part in self._parts:
            stacks = part.bank.stacks(names)
            if stacks is None:
                continue
            if not isinstance(part, NativePart):
                return None
            linked = Adapted(ctypes.addressof(stacks), part.slots.data_ptr(), following or None)
            self._held += [linked, stacks]
            following = ctypes.addressof(linked)
        return following

    def _check(self, name: str, tokens: int) -> None:
        if tokens != self.tokens:
            raise RuntimeError(
                f"{name} got {tokens} tokens of a row of {self.tokens}: "
                "adapters cannot be told apart there"
            )

    def add(self, name: str, values: Tensor, out: Tensor) -> None:
        """Add to `out` (.., out features) what the adapters make of `values` (.., in features)."""
        if values is not self._values:  # layers side by side (queries, keys, values) share theirs
            self._values = values
            self._rows = values.reshape(1, -1, values.shape[-1])
            for part in self._parts:
                part.taken = None
            self._check(name, self._rows.shape[1])
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


class NativePart:
    """The adapters of one bank, by the kernels: each token with its own, in no order."""

    def __init__(
        self, bank: Bank, kernels: Kernels, spans: Sequence[tuple[int, int, int]], tokens: int
    ) -> None:
        self.bank, self._kernels = bank, kernels
        self.slots = torch.full((tokens,), -1, dtype=torch.int32)
        for slot, start, end in spans:
            self.slots[start:end] = slot
        self.taken: Tensor | None = None

    def add(self, name: str, rows: Tensor, result: Tensor) -> None:
        """result (1, tokens, out) += B (A rows), rows (1, tokens, in), for the tokens that have one
        of these adapters."""
        if name not in self.bank.a:
            return
        dtype = self.bank.a[name].dtype
        if self.taken is None:
            self.taken = rows.to(dtype)
            if self.taken.stride(2) != 1:
                self.taken = self.taken.contiguous()
        if result.dtype == dtype and result.stride(2) == 1:
            self._call(name, self.taken, result)
        else:
            large = torch.zeros(result.shape, dtype=dtype)
            self._call(name, self.taken, large)
            result.add_(large)

    def _call(self, name: str, rows: Tensor, result: Tensor) -> None:
        self._kernels.adapt(
            ctypes.addressof(self.bank.stack(name)), self.slots.data_ptr(),
            rows.data_ptr(), rows.stride(1), result.data_ptr(), result.stride(1), rows.shape[1],
            rows.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip


class Part:
    """One product of torch, for any layer of its bank."""

    def __init__(self, bank: Bank, product: Product, tokens: int, device: torch.device) -> None:
        self.bank, self._low, self._high = bank, product.low, product.high
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
            if name not in self.bank.a:
                return
            mine = slice(self._low, self._high)
            stacks = self._stacks[name] = (self.bank.a[name][mine], self.bank.b[name][mine])
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
