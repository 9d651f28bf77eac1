# ruff: noqa: TID253  (imported lazily, by workers only)
"""Moving the memory of tensors out of a device and back: bit for bit, each tensor staying itself.

What is moved are storages. A storage that is out has no bytes, but it is the same storage: all
tensors that look at it (views, tied weights, an optimizer's state, a graph's leaves) are whole
again when its bytes are back. Nobody may compute with them in between.

The bytes of all storages are one long line, cut into chunks. Chunks go to host memory or to a
file, several at a time: while one is copied from the device, others are checked and written.
Nothing is freed before everything has arrived, so a move that fails has changed nothing.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmos.drivers.worker.lanes import Lane
from llmos.drivers.worker.store import Store
from llmos.kernel.errors import BadArgument, NoMemory

# Large enough for the full bandwidth of a bus, and a power of two: torch's allocator of pinned
# memory rounds up to one.
CHUNK_BYTES = 64 * 2**20

# Chunks in the air between a device and a file.
RING = 4

PLACES = ("host", "disk")


@dataclass(slots=True, eq=False)
class Block:
    """A storage that is moved."""

    storage: torch.UntypedStorage
    nbytes: int

    def bytes(self) -> Tensor:
        """Its bytes (nbytes,) as a tensor over the same memory."""
        found = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return found.set_(self.storage, 0, (self.nbytes,), (1,))


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a block, and where they lie in their chunk."""

    block: Block
    begin: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move did. `left_bytes`: what cannot be moved, such as a mapped file."""

    bytes: int
    seconds: float
    where: str
    left_bytes: int = 0


class Mover:
    """Out and back, for one worker. Host memory that was pinned once is kept for the next time."""

    def __init__(self, lane: Lane, folder: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._lane, self._folder, self._chunk_bytes = lane, folder, chunk_bytes
        self._pool: list[Tensor] = []  # chunks of host memory
        self._chunks: list[list[Part]] = []  # of what is out
        self._blocks: list[Block] = []
        self._left_bytes = 0
        self._store: Store | None = None
        self.where = ""  # of PLACES; empty: nothing is out

    def out(self, tensors: Iterable[Tensor], where: str) -> Moved:
        """Move the tensors' memory to `where`; from the host it can go on to the disk.

        Raises BadArgument; NoMemory when there is no room for it; then all is as before.
        """
        if where not in PLACES:
            raise BadArgument(f"there is no place {where!r}", f"one of {', '.join(PLACES)}")
        began = time.perf_counter()
        if not self.where:
            self._blocks, self._left_bytes = find_blocks(tensors, self._lane.kind)
            self._chunks = list(cut(self._blocks, self._chunk_bytes))
        if self.where != where:
            self._move(where)
        nbytes = sum(b.nbytes for b in self._blocks)
        return Moved(nbytes, time.perf_counter() - began, where, self._left_bytes)

    def _move(self, where: str) -> None:
        try:
            if where == "host":
                self._to_host()
            elif self.where == "host":
                self._demote()
            else:
                self._to_disk()
        except (OSError, RuntimeError, MemoryError) as exc:
            self._remove_store()
            first = (str(exc).splitlines() or [type(exc).__name__])[0]
            raise NoMemory(f"the memory could not be moved to {where}: {first}") from None
        for block in self._blocks:
            block.storage.resize_(0)
        if where == "disk":  # host memory is short, then: a ring is all that is kept
            del self._pool[0 if self._lane.direct else RING :]
        self._lane.give_back()
        self.where = where

    def back(self) -> Moved:
        """Everything as it was. Raises NoMemory when the device has no room: it stays out then;
        WorkerLost when the file was damaged."""
        began, where = time.perf_counter(), self.where
        self._make_room()
        if where == "host":
            self._from_host()
        elif where == "disk":
            self._from_disk()
        nbytes = sum(b.nbytes for b in self._blocks)
        self._remove_store()
        self._blocks, self._chunks, self.where = [], [], ""
        return Moved(nbytes, time.perf_counter() - began, where, self._left_bytes)

    def release(self) -> None:
        """Give back the host memory that is kept for the next time."""
        if self.where != "host":
            self._pool.clear()
            self._lane.give_back()

    @property
    def host_bytes(self) -> int:
        """Host memory that it has now."""
        return sum(chunk.numel() for chunk in self._pool)

    # ---- host ----

    def _to_host(self) -> None:
        for number, chunk in enumerate(self._chunks):
            target = self._host_chunk(number)
            for part in chunk:
                self._lane.copy(target[part.at : part.at + part.nbytes], _of(part))
        self._lane.wait(self._lane.mark())

    def _from_host(self) -> None:
        for number, chunk in enumerate(self._chunks):
            source = self._pool[number]
            for part in chunk:
                self._lane.copy(_of(part), source[part.at : part.at + part.nbytes])
        self._lane.wait(self._lane.mark())

    def _host_chunk(self, number: int) -> Tensor:
        while len(self._pool) <= number:
            self._pool.append(self._lane.host(self._chunk_bytes))
        return self._pool[number]

    def _demote(self) -> None:
        store = self._new_store()
        for number, chunk in enumerate(self._chunks):
            store.write(number * self._chunk_bytes, [_view(self._pool[number][: _size(chunk)])])
        store.finish(sync=True)

    # ---- disk ----

    def _to_disk(self) -> None:
        store = self._new_store()
        # The writes that still read from a chunk of the ring.
        busy: deque[Future[None]] = deque()
        copied: deque[tuple[int, Any]] = deque()  # chunks whose copy was started, with its mark
        for number, chunk in enumerate(self._chunks):
            if self._lane.direct:
                store.write(number * self._chunk_bytes, [_view(_of(part)) for part in chunk])
                continue
            if len(busy) + len(copied) == RING:
                if not busy:
                    self._write_copied(store, copied, busy)
                busy.popleft().result()
            target = self._host_chunk(number % RING)
            for part in chunk:
                self._lane.copy(target[part.at : part.at + part.nbytes], _of(part))
            copied.append((number, self._lane.mark()))
            # The one before it is there by now, or nearly: the next copy is already queued.
            if len(copied) > 1:
                self._write_copied(store, copied, busy)
        while copied:
            self._write_copied(store, copied, busy)
        store.finish(sync=True)

    def _write_copied(
        self, store: Store, copied: deque[tuple[int, Any]], busy: deque[Future[None]]
    ) -> None:
        number, mark = copied.popleft()
        self._lane.wait(mark)
        source = self._pool[number % RING][: _size(self._chunks[number])]
        busy.append(store.write(number * self._chunk_bytes, [_view(source)]))

    def _from_disk(self) -> None:
        store = self._store
        assert store is not None
        if self._lane.direct:
            for number, chunk in enumerate(self._chunks):
                store.read(number * self._chunk_bytes, [_view(_of(part)) for part in chunk])
            store.finish(sync=False)
            return
        reads: deque[Future[None]] = deque()
        marks: dict[int, Any] = {}  # of the copies out of each chunk of the ring
        for number in range(len(self._chunks) + RING - 1):
            if number < len(self._chunks):
                if number >= RING:
                    self._lane.wait(marks[number - RING])
                target = self._host_chunk(number % RING)[: _size(self._chunks[number])]
                reads.append(store.read(number * self._chunk_bytes, [_view(target)]))
            if number >= RING - 1:
                reads.popleft().result()
                marks[number - RING + 1] = self._copy_in(number - RING + 1)
        self._lane.wait(self._lane.mark())

    def _copy_in(self, number: int) -> Any:
        source = self._pool[number % RING]
        for part in self._chunks[number]:
            self._lane.copy(_of(part), source[part.at : part.at + part.nbytes])
        return self._lane.mark()

    def _new_store(self) -> Store:
        self._store = Store(self._folder / "memory")
        return self._store

    def _remove_store(self) -> None:
        if self._store is not None:
            self._store.remove()
            self._store = None

    def _make_room(self) -> None:
        try:
            for block in self._blocks:
                block.storage.resize_(block.nbytes)
        except (RuntimeError, MemoryError) as exc:
            for block in self._blocks:
                block.storage.resize_(0)
            self._lane.give_back()
            first = (str(exc).splitlines() or [type(exc).__name__])[0]
            raise NoMemory(f"there is no room to come back to: {first}") from None


def find_blocks(tensors: Iterable[Tensor], kind: str) -> tuple[list[Block], int]:
    """The storages of the tensors on devices of this kind, each once -> (blocks, bytes left).

    What torch cannot resize is left where it is: a mapped file, memory of numpy or of another
    process.
    """
    blocks: dict[int, Block] = {}
    left: dict[int, int] = {}
    for tensor in _plain(tensors):
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if tensor.device.type != kind or not nbytes:
            continue
        # Two python objects may stand for one storage; its address is what it is known by.
        if storage.resizable():
            blocks.setdefault(storage._cdata, Block(storage, nbytes))
        else:
            left[storage._cdata] = nbytes
    return list(blocks.values()), sum(left.values())


def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that hold bytes: those inside of a quantized one, for example."""
    for tensor in tensors:
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None:
            names, _ = flatten()
            yield from _plain(getattr(tensor, name) for name in names)
        elif tensor.layout is not torch.strided:
            raise BadArgument(f"a tensor of layout {tensor.layout} cannot be moved out")
        else:
            yield tensor


def cut(blocks: list[Block], chunk_bytes: int) -> Iterator[list[Part]]:
    """The line of all bytes in chunks: each full but the last."""
    chunk: list[Part] = []
    at = 0
    for block in blocks:
        begin = 0
        while begin < block.nbytes:
            nbytes = min(block.nbytes - begin, chunk_bytes - at)
            chunk.append(Part(block, begin, nbytes, at))
            begin, at = begin + nbytes, at + nbytes
            if at == chunk_bytes:
                yield chunk
                chunk, at = [], 0
    if chunk:
        yield chunk


def _of(part: Part) -> Tensor:
    return part.block.bytes()[part.begin : part.begin + part.nbytes]


def _view(tensor: Tensor) -> memoryview:
    """The memory of host bytes. Not by way of numpy: torch would never resize its storage again."""
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def _size(chunk: list[Part]) -> int:
    return chunk[-1].at + chunk[-1].nbytes
