# ruff: noqa: TID253  (imported lazily, by workers of a CUDA device only)
"""What a worker asks of torch about its CUDA device: marks in its queue, memory, limits.

A worker sees exactly one device, `cuda:0` (CUDA_VISIBLE_DEVICES is set before it is initialised).
"""

from __future__ import annotations

import torch

from llmos.kernel.errors import WorkerLost

# A fraction of 1 is "all of it"; one of 0 would be refused.
_LEAST_FRACTION = 1e-4


def prepare(device: str) -> None:
    """Initialise CUDA in this process. Raises WorkerLost when it cannot be."""
    in_bad_fork = getattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    if in_bad_fork():
        raise WorkerLost(
            "CUDA was initialised before this worker was forked",
            "some module that the zygote imports asks for CUDA: the zygote's log has its name",
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as exc:
        first = str(exc).splitlines()[0]
        raise WorkerLost(
            f"CUDA cannot be used: {first}", "is torch built for CUDA, and does nvidia-smi work?"
        ) from None


class CudaStreams:
    """The current stream of the calling thread; events are used again."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        if self._free:
            event = self._free.pop()
        else:  # blocking: whoever waits sleeps, which the length of the queue allows
            event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def elapsed_s(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        return float(earlier.elapsed_time(later)) / 1000

    def forget(self, mark: torch.cuda.Event) -> None:
        self._free.append(mark)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def limit(device: str, nbytes: int) -> None:
    """Allocations of torch above `nbytes` fail with an out-of-memory error in this process."""
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = min(1.0, max(_LEAST_FRACTION, nbytes / total))
    torch.cuda.set_per_process_memory_fraction(fraction, device)


def reserved_bytes(device: str) -> int:
    """What torch's allocator has taken from the device; the CUDA context is not in it."""
    return torch.cuda.memory_reserved(device)
