"""The memory of an engine for keys and values: one tensor of blocks, (block, layer, 2, token, head,
dim).

All layers of a block lie together, so that a block is moved, saved or given back as one piece.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class KvShape:
    """What a model keeps for each token: keys and values of `kv_heads` heads in each layer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * BLOCK_TOKENS

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class Pool:
    """`count` blocks on a device. On a CPU a block takes memory from when it is first written."""

    def __init__(self, shape: KvShape, count: int, device: str) -> None:
        self.shape, self.count = shape, count
        size = (count, shape.layers, 2, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
        if device == "cpu":
            # Mapped apart from the heap: what is given back is given back to the system.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._map = mmap.mmap(-1, max(1, count * shape.block_bytes), flags=flags)
            flat = torch.frombuffer(self._map, dtype=shape.dtype)
            self.data = flat[: count * shape.block_bytes // shape.dtype.itemsize].view(size)
        else:
            self.data = torch.zeros(size, dtype=shape.dtype, device=device)
        self._on_cpu = device == "cpu"

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (block, token, head, dim)."""
        return self.data[:, index, 0], self.data[:, index, 1]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Blocks, each (from, to)."""
        for old, new in pairs:
            self.data[new].copy_(self.data[old])

    def out(self, blocks: Sequence[int]) -> Tensor:
        """A copy of blocks in host memory, (block, layer, 2, token, head, dim)."""
        index = torch.tensor(blocks, device=self.data.device)
        return self.data.index_select(0, index).cpu()

    def back(self, blocks: Sequence[int], data: Tensor) -> None:
        """What `out` gave, into other blocks."""
        for block, one in zip(blocks, data, strict=True):
            self.data[block].copy_(one)

    def give_back(self, free: Sequence[int]) -> None:
        """Let the system have the memory of free blocks again; it comes back when they are
        written."""
        if not self._on_cpu or not free:
            return
        for first, last in _runs(sorted(free)):
            # Only pages that no other block reaches into.
            page, size = mmap.PAGESIZE, self.shape.block_bytes
            begin, end = -(-first * size // page) * page, (last + 1) * size // page * page
            if begin < end:
                self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """[1, 2, 3, 7] -> [(1, 3), (7, 7)]."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return runs
