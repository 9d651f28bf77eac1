"""Many LoRA adapters on one base model, in one row of tokens.

A step's row has tokens of several guests. The base computes all of them at once, as without
adapters; a layer that adapters change then adds what each adapter makes of its own tokens. The
layers are found by their names in the model, and only their `forward` is wrapped: what they are
(an nn.Linear, or a layout of an engine's own) does not matter.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmos.kernel.errors import BadInput
from llmos.services.engine import adapter_files
from llmos.services.engine.adapter_bank import NATIVE_TYPES, Bank
from llmos.services.engine.adapter_files import Skeleton
from llmos.services.engine.adapter_row import Row
from llmos.services.engine.native.weights import kernels
from llmos.services.model.load import give_back

# Adapters that nobody uses stay loaded up to so many bytes.
IDLE_BYTES = 256 << 20

# Rows that are remembered: while guests only decode, each step is like the one before.
KEPT_ROWS = 8


@dataclass(eq=False)
class Adapter:
    """A loaded adapter.

    `key` is the same for the same numbers, in every engine: what is remembered of keys and values
    belongs to it. `chat_template`: what conversations were written in when it was trained; empty
    where its folder does not say.
    """

    key: str
    folder: str
    chat_template: str
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
        self._dtype = dtype
        if self._device.type == "cpu" and not (kernels() and dtype in NATIVE_TYPES):
            # Torch multiplies small matrices faster in float32, with all that is to be converted.
            self._dtype = torch.float32
        self._limit_bytes = limit_bytes
        self._skeleton: Skeleton | None = None
        self._banks: dict[tuple[int, tuple[str, ...]], Bank] = {}
        self._loaded: dict[str, Adapter] = {}  # by key
        self._idle: OrderedDict[str, Adapter] = OrderedDict()  # longest idle first
        self._seen: dict[str, tuple[tuple[int, ...], str]] = {}  # folder -> its stamp, key
        self._wrapped: set[str] = set()
        self._rows: OrderedDict[tuple[Any, ...], Row] = OrderedDict()
        self._row: Row | None = None

    def load(self, ref: str, note: Callable[[str], None] = lambda text: None) -> Adapter:
        """The adapter in a folder, loaded once however many use it. Raises BadInput.

        Each call wants one `release`. `note` is told in one line what its user may want to know.
        """
        folder, told = adapter_files.find(ref)
        if told:
            note(told)
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
        assert adapter.users > 0, f"the adapter {adapter.folder} is released once too often"
        adapter.users -= 1
        if adapter.users == 0:
            self._idle[adapter.key] = adapter
            self._drop_idle(self._limit_bytes)

    def trim(self) -> None:
        """Give back all that nobody uses."""
        self._drop_idle(0)
        for bank in self._banks.values():
            bank.fit()
        self._rows.clear()
        give_back()

    @contextmanager
    def routing(self, spans: Spans) -> Iterator[None]:
        """Around a forward over one row of these spans (adapter, tokens), in order."""
        self._row = self._row_of(spans)
        try:
            yield
        finally:
            if self._row is not None:
                self._row.rest()
                self._row = None

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
        self._rows.clear()  # the stacks may lie elsewhere now
        self._loaded[file.key] = Adapter(
            file.key, str(folder), file.chat_template, rank, bank.slot_bytes, bank, slot
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
            self._rows.clear()
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
            module.adapting = self  # for who computes several layers at once
            self._wrapped.add(name)

    def adapted(self, names: tuple[str, ...], tokens: int) -> int | None:
        """What `native` is to add for the row that is computed, in a decoder's layer whose linear
        layers have these names: an address, 0 for nothing; None where it cannot."""
        return 0 if self._row is None else self._row.fused(names, tokens)

    def _forward(self, name: str, base: Any, values: Tensor, *args: Any, **more: Any) -> Tensor:
        out: Tensor = base(values, *args, **more)
        if self._row is not None:
            self._row.add(name, values, out)
        return out

    def _row_of(self, spans: Spans) -> Row | None:
        if all(adapter is None for adapter, _ in spans):
            return None
        key = tuple(spans)
        row = self._rows.get(key)
        if row is None or self._regroup(row):
            places = [(None if a is None else (a.bank, a.slot), tokens) for a, tokens in spans]
            row = self._rows[key] = Row(places, self._device)
            if len(self._rows) > KEPT_ROWS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return row

    def _regroup(self, row: Row) -> bool:
        """Move adapters within their banks where that pays; -> whether any moved."""
        moved = False
        for bank, (slots, wasted) in row.wasted.items():
            if wasted and (where := bank.regroup(slots, wasted)):
                self._move(bank, where)
                moved = True
        if moved:
            self._rows.clear()
        return moved
