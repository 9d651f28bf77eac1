"""Many LoRA adapters on one base model, in one row of tokens.

A step's row has tokens of several guests. The base computes all of them at once, as without
adapters; a layer that adapters change then adds what each adapter makes of its own tokens. The
layers are found by their names in the model, and only their `forward` is wrapped: what they are
(an nn.Linear, or a layout of an engine's own) does not matter.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmos.kernel.errors import BadInput
from llmos.services.engine import adapter_files
from llmos.services.engine.adapter_bank import Bank
from llmos.services.engine.adapter_files import Skeleton
from llmos.services.engine.adapter_plan import Product, arrange, waste

# Adapters that nobody uses stay loaded up to so many bytes.
IDLE_BYTES = 256 << 20

# Plans of steps that are kept: while guests only decode, each step is like the one before.
KEPT_PLANS = 8


@dataclass(eq=False)
class Adapter:
    """A loaded adapter. `key` is the same for the same numbers, in every engine: what is remembered
    of keys and values belongs to it."""

    key: str
    folder: str
    rank: int
    bytes: int
    bank: Bank
    slot: int
    users: int = 0


Spans = Sequence[tuple[Adapter | None, int]]


class Adapters:
    """The adapters of one model. Until the first is loaded the model is as it was."""

    def __init__(self, model: Any, dtype: torch.dtype, limit_bytes: int = IDLE_BYTES) -> None:
        self._model = model
        self._device: torch.device = model.device
        # A CPU multiplies small matrices faster in float32, with whatever it is told to convert.
        self._dtype = torch.float32 if self._device.type == "cpu" else dtype
        self._limit_bytes = limit_bytes
        self._skeleton: Skeleton | None = None
        self._banks: dict[tuple[int, tuple[str, ...]], Bank] = {}
        self._loaded: dict[str, Adapter] = {}  # by key
        self._idle: OrderedDict[str, Adapter] = OrderedDict()  # longest idle first
        self._seen: dict[str, tuple[tuple[int, ...], str]] = {}  # folder -> its stamp, key
        self._wrapped: set[str] = set()
        self._plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
        self._plan: _Plan | None = None

    def load(self, ref: str) -> Adapter:
        """The adapter in a folder, loaded once however many use it. Raises BadInput.

        Each call wants one `release`.
        """
        folder = adapter_files.find(ref)
        stamp = adapter_files.stamp(folder)
        seen, key = self._seen.get(str(folder), (None, ""))
        if seen != stamp or key not in self._loaded:
            key = self._read(folder)
            self._seen[str(folder)] = (stamp, key)
        adapter = self._loaded[key]
        self._idle.pop(key, None)
        adapter.users += 1
        return adapter

    def release(self, adapter: Adapter) -> None:
        """One user less. Without any it stays for a while, as long as there is room."""
        adapter.users -= 1
        if adapter.users == 0:
            self._idle[adapter.key] = adapter
            self._drop_idle(self._limit_bytes)

    def trim(self) -> None:
        """Give back all that nobody uses."""
        self._drop_idle(0)
        for bank in self._banks.values():
            bank.fit()
        self._plans.clear()

    @contextmanager
    def routing(self, spans: Spans) -> Iterator[None]:
        """Around a forward over one row that consists of these spans (adapter, tokens), in order."""
        self._plan = self._plan_of(spans)
        try:
            yield
        finally:
            if self._plan is not None:
                self._plan.rest()
                self._plan = None

    def tensors(self) -> Iterator[Tensor]:
        for bank in self._banks.values():
            yield from bank.tensors()

    # ---- loading ----

    def _read(self, folder: Path) -> str:
        if self._skeleton is None:
            self._skeleton = Skeleton(self._model)
        file = adapter_files.read(folder, self._skeleton)
        if file.key in self._loaded:
            return file.key  # the same numbers, from another folder
        self._wrap(file.layers)
        rank = max(layer.rank for layer in file.layers.values())
        bank = self._bank(rank, tuple(sorted(file.layers)), self._skeleton)
        slot = bank.add(file.tensors, {name: layer.scale for name, layer in file.layers.items()})
        self._plans.clear()  # the stacks may lie elsewhere now
        self._loaded[file.key] = Adapter(
            file.key, str(folder), rank, bank.slot_bytes, bank, slot
        )  # fmt: skip
        return file.key

    def _bank(self, rank: int, names: tuple[str, ...], skeleton: Skeleton) -> Bank:
        """The bank of this form; ranks that differ a little share one, filled up with zeros."""
        room = max(4, 1 << (rank - 1).bit_length())
        if (room, names) not in self._banks:
            sizes = {name: skeleton.sizes[name] for name in names}
            self._banks[room, names] = Bank(sizes, room, self._dtype, self._device)
        return self._banks[room, names]

    def _drop_idle(self, limit_bytes: int) -> None:
        idle_bytes = sum(adapter.bytes for adapter in self._idle.values())
        while idle_bytes > limit_bytes:
            _, adapter = self._idle.popitem(last=False)
            idle_bytes -= adapter.bytes
            del self._loaded[adapter.key]
            self._move(adapter.bank, {adapter.bank.remove(adapter.slot): adapter.slot})
            self._plans.clear()
        for form in [form for form, bank in self._banks.items() if not bank.used]:
            del self._banks[form]
        self._seen = {f: s for f, s in self._seen.items() if s[1] in self._loaded}

    def _move(self, bank: Bank, slots: dict[int, int]) -> None:
        for adapter in self._loaded.values():
            if adapter.bank is bank:
                adapter.slot = slots.get(adapter.slot, adapter.slot)

    # ---- computing ----

    def _wrap(self, names: Any) -> None:
        """Have these layers add what adapters do to their tokens."""
        found = {}
        for name in sorted(set(names) - self._wrapped):
            try:
                found[name] = self._model.get_submodule(name)
            except AttributeError:
                raise BadInput(
                    f"this engine keeps {name} in a form of its own, which takes no adapters",
                    "report it: adapters and this layout of weights do not go together",
                ) from None
        for name, module in found.items():
            module.forward = partial(self._forward, name, module.forward)
            self._wrapped.add(name)

    def _forward(self, name: str, base: Any, values: Tensor, *args: Any, **more: Any) -> Tensor:
        out: Tensor = base(values, *args, **more)
        if self._plan is not None:
            self._plan.add(name, values, out)
        return out

    def _plan_of(self, spans: Spans) -> _Plan | None:
        if all(adapter is None for adapter, _ in spans):
            return None
        key = tuple(spans)
        plan = self._plans.get(key)
        if plan is None or self._regroup(plan):
            plan = self._plans[key] = _Plan(spans, self._device)
            if len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan

    def _regroup(self, plan: _Plan) -> bool:
        """Move adapters within their banks where that pays; -> whether any moved."""
        moved = False
        for bank, (slots, wasted) in plan.wasted.items():
            if wasted and (where := bank.regroup(slots, wasted)):
                self._move(bank, where)
                moved = True
        if moved:
            self._plans.clear()
        return moved


class _Plan:
    """What the adapters add to a row of `tokens` tokens, layer by layer."""

    def __init__(self, spans: Spans, device: torch.device) -> None:
        self.tokens = sum(tokens for _, tokens in spans)
        self.wasted: dict[Bank, tuple[list[int], int]] = {}
        self._parts: list[_Part] = []
        for bank, mine in _by_bank(spans).items():
            products = arrange(mine)
            self.wasted[bank] = (sorted({slot for slot, _, _ in mine}), waste(products))
            self._parts += [_Part(bank, product, self.tokens, device) for product in products]
        self._values: Tensor | None = None  # what the layer before was given
        self._rows = torch.empty(0)  # the same as (1, tokens, in)

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


def _by_bank(spans: Spans) -> dict[Bank, list[tuple[int, int, int]]]:
    """(slot, first token, token after the last) of each span with an adapter."""
    found: dict[Bank, list[tuple[int, int, int]]] = {}
    start = 0
    for adapter, tokens in spans:
        if adapter is not None:
            mine = found.setdefault(adapter.bank, [])
            mine.append((adapter.slot, start, start + tokens))
        start += tokens
    return found


class _Part:
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
            stacks = tuple(s[name][self._low : self._high] for s in (self._bank.a, self._bank.b))
            self._stacks[name] = stacks
        a, b = stacks
        if self.taken is None:
            self.taken = self._take(rows, a.dtype)
        # (slots, tokens, rank): A times a column is faster than a row times A transposed.
        small = torch.bmm(a, self.taken).transpose(1, 2)
        if not self._straight:
            self._scatter(torch.bmm(small, b), result)
            return
        mine = result if self._window is None else result[:, self._window]
        if self._slots > 1:
            mine = mine.view(self._slots, -1, mine.shape[-1])
        if mine.dtype == b.dtype:
            mine.baddbmm_(small, b)
        else:
            mine.add_(torch.bmm(small, b))

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
