"""The weights of adapters of one form (the same layers, up to the same rank), stacked.

Each has a slot; slots lie side by side, so that one product computes many of them.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llmos.services.engine.native.weights import MOST_RANK, Kernels, Stack, Stacks, kernels

# What the kernels of `native` compute with.
NATIVE_TYPES = (torch.float32, torch.bfloat16)

# A full bank grows by this part of itself: what is copied each time stays small beside what is
# loaded, and so does what nobody uses.
GROWTH = 4

# Moving an adapter costs as much as reading so many slots in a step.
MOVE_SLOTS = 6


class Bank:
    """`a[name]` is (slots, rank, in), `b[name]` (slots, rank, out), scaled; zeros beyond a rank.

    They change in inference mode only: adapters come between two steps, and move within one.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rank = rank
        self.a = {
            n: torch.empty(0, rank, inputs, dtype=dtype, device=device)
            for n, (inputs, _) in sizes.items()
        }
        self.b = {
            n: torch.empty(0, rank, outputs, dtype=dtype, device=device)
            for n, (_, outputs) in sizes.items()
        }
        # What computes with it where that is possible; else torch does.
        self.kernels: Kernels | None = None
        if device.type == "cpu" and rank <= MOST_RANK and dtype in NATIVE_TYPES:
            self.kernels = kernels()
        self._pointers: dict[str, Stack] = {}
        self._groups: dict[tuple[str, ...], Stacks] = {}
        self.used = 0  # slots 0..used-1 have an adapter
        self.slot_bytes = dtype.itemsize * rank * sum(i + o for i, o in sizes.values())
        self._room = 0
        self._wasted = 0

    def stack(self, name: str) -> Stack:
        """One layer's, for the kernels; holds while the bank does not grow."""
        if name not in self._pointers:
            self._pointers[name] = self._stack(name)
        return self._pointers[name]

    def stacks(self, names: tuple[str, ...]) -> Stacks | None:
        """The same for the layers of `names`; None when none of them is changed."""
        if not any(name in self.a for name in names):
            return None
        if names not in self._groups:
            self._groups[names] = Stacks(*(self._stack(name) for name in names))
        return self._groups[names]

    def _stack(self, name: str) -> Stack:
        if name not in self.a:
            return Stack()
        a, b = self.a[name], self.b[name]
        return Stack(a.data_ptr(), b.data_ptr(), self.rank, a.shape[2], b.shape[2])

    def tensors(self) -> Iterator[Tensor]:
        yield from self.a.values()
        yield from self.b.values()

    @torch.inference_mode()
    def add(self, pairs: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]) -> int:
        """Put an adapter's A (rank, in) and B (out, rank) into the next slot; -> the slot."""
        if self.used == self._room:
            self._resize(self._room + 1 + self._room // GROWTH)
        slot = self.used
        for name, (a, b) in pairs.items():
            rank = a.shape[0]
            self.a[name][slot, :rank].copy_(a)
            self.a[name][slot, rank:].zero_()
            # Scaled in the numbers it was trained in: a bank of fewer bits rounds once.
            self.b[name][slot, :rank].copy_(b.float().t() * scales[name])
            self.b[name][slot, rank:].zero_()
        self.used += 1
        return slot

    @torch.inference_mode()
    def remove(self, slot: int) -> int:
        """Free a slot; -> the one whose adapter lies in it now (itself: none)."""
        self.used -= 1
        last = self.used
        if slot != last:
            for stack in self.tensors():
                stack[slot].copy_(stack[last])
        if self._room > 2 * max(self.used, 1):
            self.fit()
        return last

    @torch.inference_mode()
    def fit(self) -> None:
        """No room beyond what is used."""
        if self._room > self.used:
            self._resize(self.used)

    @torch.inference_mode()
    def regroup(self, slots: Iterable[int], wasted: int) -> dict[int, int]:
        """After a step that used `slots` and wasted so many: have them side by side when that pays.

        -> {old slot: new slot} of all that moved. It pays once as much was wasted as the moves
        cost, so that two groups that take turns do not send each other away at every step.
        """
        wanted = sorted(slots)
        far = [slot for slot in wanted if slot >= len(wanted)]
        self._wasted += wasted
        if not far or self._wasted < MOVE_SLOTS * len(far):
            return {}
        self._wasted = 0
        near = [slot for slot in range(len(wanted)) if slot not in set(wanted)]
        self._swap(far, near)
        return dict(zip(far, near, strict=True)) | dict(zip(near, far, strict=True))

    def _swap(self, far: Sequence[int], near: Sequence[int]) -> None:
        for stack in self.tensors():
            for one, other in zip(far, near, strict=True):
                kept = stack[one].clone()
                stack[one].copy_(stack[other])
                stack[other].copy_(kept)

    def _resize(self, room: int) -> None:
        # Stack by stack: at no time is more than one of them there twice.
        for stacks in (self.a, self.b):
            for name, old in stacks.items():
                new = old.new_empty(room, *old.shape[1:])
                new[: self.used].copy_(old[: self.used])
                stacks[name] = new
                del old, new
        self._room = room
        self._pointers.clear()
        self._groups.clear()
