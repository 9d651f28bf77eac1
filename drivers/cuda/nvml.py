"""NVIDIA's management library: which GPUs there are, and who uses how much of their memory.

Imported late, and only when a CUDA device is configured: `pip install 'llmos[cuda]'` brings
nvidia-ml-py. It touches no CUDA, so the kernel may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from llmos.kernel.errors import NoSuchThing


@dataclass(frozen=True, slots=True)
class Gpu:
    """`capacity_bytes`: all memory less what NVIDIA's driver keeps for itself."""

    uuid: str
    name: str
    capacity_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """One look at a GPU. `by_pid` is what it says of single OS processes: nothing or other pids
    than ours in many containers, and no figure (None) on some systems."""

    used_bytes: int
    by_pid: dict[int, int | None]


class Gpus(Protocol):
    """What the driver asks of the library."""

    version: str

    def count(self) -> int:
        """How many GPUs the machine has, hidden ones included."""
        ...

    def by_index(self, index: int) -> Gpu:
        """In the order of the PCI bus. Raises NoSuchThing."""
        ...

    def by_uuid(self, uuid: str) -> Gpu:
        """Of a GPU or of a MIG slice. Raises NoSuchThing."""
        ...

    def usage(self, gpu: Gpu) -> Usage:
        """Who uses it now."""
        ...

    def close(self) -> None:
        """The library is not asked again."""
        ...


class Nvml:
    """Gpus as NVML has them. Raises NoSuchThing when there is no library or no driver."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise NoSuchThing(
                "CUDA devices need nvidia-ml-py, which is not installed",
                "pip install 'llmos[cuda]'",
            ) from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self.version = _text(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError as exc:
            raise NoSuchThing(
                f"no CUDA device can be used here: {exc}", "does nvidia-smi work on this machine?"
            ) from None
        self._handles: dict[str, Any] = {}

    def count(self) -> int:
        return int(self._nvml.nvmlDeviceGetCount())

    def by_index(self, index: int) -> Gpu:
        return self._gpu(f"GPU {index}", lambda: self._nvml.nvmlDeviceGetHandleByIndex(index))

    def by_uuid(self, uuid: str) -> Gpu:
        return self._gpu(uuid, lambda: self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode()))

    def _gpu(self, what: str, find: Any) -> Gpu:
        try:
            handle = find()
            uuid = _text(self._nvml.nvmlDeviceGetUUID(handle))
            name = _text(self._nvml.nvmlDeviceGetName(handle))
            total, reserved, _ = self._memory(handle)
        except self._nvml.NVMLError as exc:
            raise NoSuchThing(
                f"{what} cannot be used: {exc}", "`nvidia-smi -L` lists them"
            ) from None
        self._handles[uuid] = handle
        return Gpu(uuid, name, total - reserved, reserved)

    def usage(self, gpu: Gpu) -> Usage:
        handle = self._handles[gpu.uuid]
        _, _, used = self._memory(handle)
        by_pid: dict[int, int | None] = {}
        try:
            for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                by_pid[int(p.pid)] = None if p.usedGpuMemory is None else int(p.usedGpuMemory)
        except self._nvml.NVMLError:
            by_pid.clear()  # not supported (MIG, some virtual machines): nothing is said
        return Usage(used, by_pid)

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _memory(self, handle: Any) -> tuple[int, int, int]:
        """(total, reserved by the system, used by processes) in bytes."""
        try:
            found = self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)
        except self._nvml.NVMLError:
            # An old driver: what it keeps for itself counts as used by somebody.
            found = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            return int(found.total), 0, int(found.used)
        return int(found.total), int(found.reserved), int(found.used)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
