"""What each worker uses of a GPU, from sources of which any may be missing. No I/O.

NVML names the memory of an OS process, where it can: not in a container that cannot see host
pids. There, a worker's own figure (what torch's allocator has taken, in its reports) and the size
of a CUDA context are added. The rest of what the GPU says is used is somebody else's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmos.drivers.cuda.nvml import Usage

# A CUDA context with the libraries that torch loads, until it was measured here.
CONTEXT_BYTES = 600 * 2**20

# No context is smaller or larger: what lies outside was somebody else's at the same moment.
_LEAST, _MOST = 64 * 2**20, 2 * 2**30


@dataclass(slots=True)
class Holder:
    """A worker: the OS processes of its tree, and what it says that its allocator has taken
    (None: nothing yet, so it has no context either)."""

    os_pids: Sequence[int]
    said_bytes: int | None = None


@dataclass(slots=True)
class Books:
    """The memory of one GPU. Learns how large a context is."""

    context_bytes: int = CONTEXT_BYTES
    learned: bool = False
    _before: int = 0  # used when none of ours had a context

    def split(self, usage: Usage, holders: Mapping[str, Holder]) -> dict[str, int]:
        """Bytes by worker."""
        seen = {w: self._listed(usage, h) for w, h in holders.items()}
        with_context = {w: h.said_bytes for w, h in holders.items() if h.said_bytes is not None}
        if not with_context and not any(seen.values()):
            self._before = usage.used_bytes
        elif len(with_context) == 1 and len(holders) == 1:
            ((worker, said),) = with_context.items()
            listed = seen[worker]
            self._learn((listed if listed else usage.used_bytes - self._before) - said)
        return {
            worker: listed if listed is not None else self._said(holders[worker])
            for worker, listed in seen.items()
        }

    def _said(self, holder: Holder) -> int:
        return 0 if holder.said_bytes is None else holder.said_bytes + self.context_bytes

    def _listed(self, usage: Usage, holder: Holder) -> int | None:
        """What the list says of a worker; None when it does not name it, or names no figure."""
        found = [usage.by_pid[pid] for pid in holder.os_pids if pid in usage.by_pid]
        figures = [nbytes for nbytes in found if nbytes is not None]
        return sum(figures) if figures and len(figures) == len(found) else None

    def _learn(self, nbytes: int) -> None:
        if _LEAST <= nbytes <= _MOST:
            # The smallest that was seen: others may have come in between.
            self.context_bytes = min(nbytes, self.context_bytes) if self.learned else nbytes
            self.learned = True
