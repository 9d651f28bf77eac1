# ruff: noqa: TID253  (imported lazily, by workers only)
"""Copies of tensors in host memory that is kept from one checkpoint to the next.

Each storage that a program hands over is copied once, however many tensors look at it, and into
memory of its own: writers of weights recognize tied ones by that. On a CPU the memory is the
system's own, not the heap's: it fills none of the holes that the steps come back to, and goes back
whole. On CUDA it is pinned, and a copy is at the bus's speed.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from llmos.drivers.worker.lanes import CudaLane, HostLane, Lane

# Small tensors share a piece of memory; larger ones have one of their own.
CHUNK_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}

# As torch aligns what it allocates: kernels choose their path by it.
ALIGN_BYTES = 64


class Copies:
    """Call it with each tensor; `done` when all are copied, `begin` before the next time."""

    def __init__(self, device: str) -> None:
        self._lane: Lane = CudaLane(device) if device.startswith("cuda") else HostLane()
        self._chunks: list[Tensor] = []
        self._begin()

    def begin(self) -> None:
        """What was copied before is no longer wanted: its memory is used again."""
        self._begin()

    def _begin(self) -> None:
        self._chunk, self._used = 0, 0
        self._copied: dict[Any, Tensor] = {}  # by the address of the storage
        self._sources: list[Tensor] = []  # alive until `done`, or an address could come again

    def __call__(self, tensor: Tensor) -> Tensor:
        """-> the same numbers, contiguous, on the host. Raises OSError or RuntimeError when memory
        is short."""
        tensor = tensor.detach()
        if not tensor.is_contiguous():
            return self._straightened(tensor)
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._copied:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            source.set_(storage, 0, (storage.nbytes(),), (1,))
            self._copied[key] = self._new(storage.nbytes())
            self._sources.append(source)
            self._lane.copy(self._copied[key], source)
        found = torch.empty(0, dtype=tensor.dtype)
        return found.set_(
            self._copied[key].untyped_storage(),
            tensor.storage_offset(), tensor.shape, tensor.stride(),
        )  # fmt: skip

    def _straightened(self, tensor: Tensor) -> Tensor:
        """A copy of what lies in another order, such as channels last."""
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._copied:
            flat = self._new(tensor.nbytes).view(tensor.dtype)
            self._copied[key] = flat.view(tensor.shape).copy_(tensor)
            self._sources.append(tensor)
        return self._copied[key]

    def done(self) -> None:
        """Every copy has arrived; chunks that were not needed go back."""
        self._lane.wait(self._lane.mark())
        self._sources.clear()
        del self._chunks[self._chunk + 1 :]

    @property
    def bytes(self) -> int:
        """Host memory that it has now."""
        return sum(chunk.numel() for chunk in self._chunks)

    def _memory(self, nbytes: int) -> Tensor:
        if not self._lane.direct:
            return self._lane.host(nbytes)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def _new(self, nbytes: int) -> Tensor:
        """Memory for one storage (nbytes,), which is a storage of its own in torch's eyes."""
        while True:
            if self._chunk == len(self._chunks):
                self._chunks.append(self._memory(max(CHUNK_BYTES[self._lane.kind], nbytes)))
            chunk = self._chunks[self._chunk]
            if self._used + nbytes <= chunk.numel():
                break
            self._chunk, self._used = self._chunk + 1, 0
        begin = self._used
        self._used += -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_numpy(chunk.numpy()[begin : begin + nbytes])
