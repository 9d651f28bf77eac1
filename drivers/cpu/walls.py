"""A promise as a wall: RLIMIT_DATA of a worker's processes, set from outside with prlimit.

Who runs into it gets a clean error from its allocator: MemoryError in Python, a RuntimeError
in torch. The limit counts a process's private writable mappings (`data` in /proc/PID/statm):
what it was born with in the zygote (about 350 MiB), its threads' stacks, memory that is
reserved and untouched, and weight files that are mapped copy-on-write. The books count touched
private pages. So what a process may have is worked out anew at each measurement:

    limit = its data now + what is left of the worker's promise + SLACK

and each process of a tree may take what is left for all. Between two measurements a tree of
several processes can so take more than its promise; the next measurement sees it.

Only the soft limit moves: a hard limit, once lowered, could not be raised again by a kernel that
is not root. So a process that wants to can climb over the wall; it is no fence against malice.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmos.drivers.cpu import procfs

MIB = 1024**2

# Room for what is reserved and hardly touched, between two measurements: for each lane the stacks
# (8 MiB) of two pools of OpenMP threads (forward and backward have one each) and what an
# allocator keeps for a thread; and 64 MiB for everything else.
SLACK_BYTES = 64 * MIB
SLACK_LANE_BYTES = 24 * MIB

# While a program loads, weight files and checkpoints are mapped beside the copies that are made of
# them, in a type that may be twice as wide.
LOADING = 3


@dataclass(slots=True)
class Wall:
    """What a worker may take. `promised` is None until somebody promised something."""

    slack: int
    promised: int | None = None
    loading: bool = True
    data: dict[int, int] = field(default_factory=dict)  # os_pid -> its data when measured
    private: int = 0  # of the whole tree when measured

    @classmethod
    def of(cls, lanes: int) -> Wall:
        return cls(SLACK_BYTES + lanes * SLACK_LANE_BYTES)

    def limits(self) -> dict[int, int]:
        """os_pid -> the RLIMIT_DATA that it should have, in bytes."""
        if self.promised is None:
            return {}
        promised = self.promised * (LOADING if self.loading else 1)
        room = max(0, promised - self.private) + self.slack
        return {os_pid: data + room for os_pid, data in self.data.items()}

    def raise_up(self) -> None:
        """Put the limits in force. Takes about 3 us for each process."""
        for os_pid, nbytes in self.limits().items():
            # Gone in the meantime, or of another user (a command may be setuid).
            with contextlib.suppress(ProcessLookupError, PermissionError):
                _, hard = resource.prlimit(os_pid, resource.RLIMIT_DATA)
                soft = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
                resource.prlimit(os_pid, resource.RLIMIT_DATA, (soft, hard))

    def stand_on(self, measured: Measured, loading: bool) -> None:
        """Work out the wall from a new measurement."""
        self.data, self.private, self.loading = measured.data, measured.private, loading
        self.raise_up()


@dataclass(frozen=True, slots=True)
class Measured:
    """One pass over the processes of a tree, in bytes, by os_pid."""

    by_process: dict[int, int]  # private
    data: dict[int, int]

    @property
    def private(self) -> int:
        return sum(self.by_process.values())


def measure(os_pids: Iterable[int]) -> Measured:
    """Takes milliseconds for each process: reading its private pages walks its page tables."""
    measured = Measured({}, {})
    for os_pid in os_pids:
        measured.by_process[os_pid] = procfs.private_bytes(os_pid)
        found = procfs.data_bytes(os_pid)
        if found:
            measured.data[os_pid] = found
    return measured
