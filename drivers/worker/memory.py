"""When memory runs out inside a worker: see it in whatever was raised, and say who wanted what.

What raises it differs: MemoryError (Python, numpy), a RuntimeError with words of its own (torch's
CPU allocator, a mapping that failed), torch.OutOfMemoryError (CUDA), an OSError (fork, mmap).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import re
import resource
from pathlib import Path
from typing import Any

from llmos.kernel.errors import OutOfMemory

# What the last words need after the wall was hit: a traceback, a JSON file, a few messages.
RESERVE_BYTES = 64 * 1024**2

# How a RuntimeError of torch, or of what is below it, says that memory is short.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
          "Cannot allocate memory")  # fmt: skip

# "you tried to allocate 400 bytes" (torch, CPU), "Tried to allocate 20.00 MiB" (torch, CUDA),
# "Unable to allocate 256. GiB" (numpy), "unable to mmap 400 bytes" (torch, files).
_WANTED = re.compile(r"(?:allocate|mmap) (\d+\.?\d*) ?(bytes|[KMGTP]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, **{f"{c}ib": 1024**n for n, c in enumerate("kmgtp", 1)}}


def shortage(exc: BaseException) -> BaseException | None:
    """The out-of-memory error that `exc` is, or that led to it; None when there is none."""
    seen: set[int] = set()
    found: BaseException | None = exc
    while found is not None and id(found) not in seen:
        if _is_shortage(found):
            return found
        seen.add(id(found))
        # Also where it was raised `from None`: that hides it from people, not from here.
        found = found.__cause__ or found.__context__
    return None


def _is_shortage(exc: BaseException) -> bool:
    if isinstance(exc, MemoryError | OutOfMemory):
        return True
    if isinstance(exc, OSError):
        return exc.errno == errno.ENOMEM
    # By name: torch need not be imported to know its class.
    if any(c.__name__ == "OutOfMemoryError" for c in type(exc).__mro__):
        return True
    return isinstance(exc, RuntimeError) and any(words in str(exc) for words in _WORDS)


def wanted_bytes(exc: BaseException) -> int | None:
    """How much was asked for when there was no more, if the error says it."""
    found = _WANTED.search(str(exc))
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else None


def account(exc: BaseException, program: str, device: str, promised: int) -> dict[str, Any]:
    """The result of a process that ended so. Call it while `exc` is handled: what its frames
    hold is still there to be counted."""
    wanted, had = wanted_bytes(exc), had_bytes(device)
    text = f"{program} ran out of memory: it had {_size(had)}"
    text += f" of the {_size(promised)} it was promised" if promised else ""
    text += f", and asked for {_size(wanted)} more" if wanted is not None else ""
    memory = {"peak_bytes": had, "promised_bytes": promised or None, "wanted_bytes": wanted}
    return {"error": OutOfMemory(text).to_wire(), "memory": memory}


def take_reserve() -> None:
    """Raise this process's limit a little above the wall that it ran into."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        return
    more = max(soft, data_bytes()) + RESERVE_BYTES
    with contextlib.suppress(ValueError, OSError):  # a hard limit of somebody else's
        resource.setrlimit(
            resource.RLIMIT_DATA,
            (more if hard == resource.RLIM_INFINITY else min(more, hard), hard),
        )


def had_bytes(device: str) -> int:
    """What this process holds: private memory on a CPU, the most reserved on a CUDA device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_reserved(device)
    return private_bytes()


def private_bytes() -> int:
    """Touched private memory of this process, as its driver measures it."""
    wanted = ("Private_Dirty:", "Private_Hugetlb:", "Swap:")
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted))


def data_bytes() -> int:
    """Private writable mappings, as RLIMIT_DATA counts them (see proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


def drop_caches(device: str) -> None:
    """Give back what nobody uses. Nothing is lost but the time to get it again."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    # The heap's free pages go back to the system; only glibc keeps them and has this call.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def had_now(device: str) -> int:
    """As `had_bytes`, at this moment on every kind of device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.memory_reserved(device)
    return private_bytes()


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 1024**3), ("MiB", 1024**2)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} bytes"
