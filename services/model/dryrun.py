# ruff: noqa: TID253  (imported lazily, by workers only)
"""Run a step on tensors without memory, and keep books of what it would hold.

Every operation runs on torch's fake tensors: shapes, types, autograd and the choice of kernels are
those of the real step, the numbers are missing. Each storage is counted from the operation that
makes it to the moment when the last reference goes, so the peak is that of the real step, logits,
casts and gradients included. On a CPU each is also laid into a model of the allocator (`heap`):
what lies unused between tensors is taken, too. Not seen is what a kernel takes for itself while it
runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmos.services.model.heap import Heap


class Books(FakeTensorMode):  # type: ignore[no-untyped-call]
    """While it is entered, tensors are fake and their bytes are booked, by kind.

    `live` is what is held now, `peaks` what was held at the worst moment of each phase; both by
    kind. A new storage is of the kind `kind` until `assign` says otherwise. With `heap` each is
    laid into a model of the C library's heap, too.
    """

    def __init__(self, heap: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._with_heap = heap
        self._laid: list[tuple[int, int]] = []  # (number of a storage, bytes; 0: it goes)
        self._step_from: int | None = None  # in `_laid`
        self._numbers = 0
        self._most_ever = 0
        self.kind = "activations"
        self.live: dict[str, int] = {}
        self.peaks: dict[str, dict[str, int]] = {}
        self._phase = ""
        self._total = self._most = 0
        self._depth = 0
        # By the address of the storage: (bytes, kind, its number, what tells that it is gone).
        self._known: dict[int, tuple[int, str, int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._depth += 1
        try:
            out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        # Inside an operation others may stand in for the real kernel: those make nothing.
        if self._depth == 0:
            if func is torch.ops.aten.mkldnn_rnn_layer.default:
                out = (*out[:3], self._lstm_workspace(out[0]))
            for tensor in out if isinstance(out, list | tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self._book(tensor)
        return out

    def assign(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """These tensors are of another kind than the one that they were booked under."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._known:
                nbytes, before, number, gone = self._known[key]
                self._known[key] = nbytes, kind, number, gone
                self.live[before] -= nbytes
                self.live[kind] = self.live.get(kind, 0) + nbytes

    def begin_step(self) -> None:
        """What follows is done again and again: the heap settles in the second step, since what was
        mapped in the first comes from the heap from then on."""
        self._step_from = len(self._laid)

    def unused_bytes(self) -> int:
        """What the heap of a CPU takes beyond the worst of all moments."""
        if not self._with_heap:
            return 0
        heap = Heap()
        _lay(heap, self._laid)
        if self._step_from is not None:
            step = self._laid[self._step_from :]
            made = {number for number, nbytes in step if nbytes}
            gone = {number for number, nbytes in step if not nbytes}
            kept = sorted(made - gone)  # gradients: until they are cleared, in their order
            _lay(heap, [(number, 0) for number in kept])
            _lay(heap, [(number, nbytes) for number, nbytes in step if number in made])
        return max(0, heap.peak - self._most_ever)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def phase(self, name: str) -> None:
        """The next moments belong to this phase; its peak begins at what is held now."""
        self._phase, self._most = name, self._total
        self.peaks[name] = dict(self.live)

    def _book(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes()
        gone = weakref.ref(storage, lambda _, key=key: self._gone(key))  # type: ignore[misc]
        self._numbers += 1
        self._known[key] = nbytes, self.kind, self._numbers, gone
        self._add(self.kind, nbytes)
        if nbytes:
            self._laid.append((self._numbers, nbytes))

    def _gone(self, key: int) -> None:
        nbytes, kind, number, _ = self._known.pop(key)
        self._add(kind, -nbytes)
        if nbytes:
            self._laid.append((number, 0))

    def _add(self, kind: str, nbytes: int) -> None:
        self.live[kind] = self.live.get(kind, 0) + nbytes
        self._total += nbytes
        self._most_ever = max(self._most_ever, self._total)
        if self._total > self._most:
            self._most, self.peaks[self._phase] = self._total, dict(self.live)

    def _lstm_workspace(self, output: torch.Tensor) -> torch.Tensor:
        """What oneDNN's LSTM keeps for its backward pass, which torch's fake kernel leaves empty.

        `output` is (batch, tokens, width). The real one has 15 numbers of 4 bytes a token and unit
        of width. Memory that is not written to is not there: with AVX2 six of them are touched
        (four gates, two states), with AVX-512 about twelve. Nine is wrong for both, by 5 to 10 %
        of a training's peak.
        """
        batch, tokens, width = output.shape
        return torch.empty(4 * batch * width * 9 * tokens, dtype=torch.uint8)


def _lay(heap: Heap, events: list[tuple[int, int]]) -> None:
    for number, nbytes in events:
        if nbytes:
            heap.take(number, nbytes)
        else:
            heap.drop(number)


def give_memory(model: torch.nn.Module) -> None:
    """Put fake tensors of the default device in the place of those on the meta device.

    Called inside of Books. Not `model.to`: torch cannot swap fake tensors. What was tied stays
    tied.
    """
    made: dict[torch.Tensor, torch.nn.Parameter] = {}  # also keeps the old ones, as keys
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = torch.nn.Parameter(new, old.requires_grad)
                module._parameters[name] = made[old]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
