# ruff: noqa: TID253  (imported lazily, by workers only)
"""How bytes get between a device and host memory: copies that may still be under way.

A lane is a device's copy engine. `HostLane` is that of a CPU, where there is nothing to copy:
files are written from the tensors' own memory and read into it.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """`direct`: the device's memory is host memory, so a file needs no copy in between."""

    kind: str  # torch's name of the type of device
    direct: bool

    def host(self, nbytes: int) -> Tensor:
        """Host memory that copies are fast to and from, as bytes."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Start to copy bytes, after the copies that were started before."""
        ...

    def mark(self) -> Any:
        """A place behind the copies that were started so far."""
        ...

    def wait(self, mark: Any) -> None:
        """Until the copies before the mark are done."""
        ...

    def give_back(self) -> None:
        """Memory that was freed goes back to the device, not to torch's allocator."""
        ...


class HostLane:
    kind = "cpu"
    direct = True

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        """A copy is done when it was made."""

    def give_back(self) -> None:
        """Freed blocks of this size are the system's at once."""


class CudaLane:
    """Copies on a stream of their own, to and from pinned memory."""

    kind = "cuda"
    direct = False

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        # Whatever computes on these bytes comes first: the caller is at a safepoint, but its
        # last kernels may still be queued.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def give_back(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        # Pinned memory that is no longer used, where this torch can give it back.
        with contextlib.suppress(AttributeError):
            torch._C._host_emptyCache()
