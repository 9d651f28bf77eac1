"""GPUs that are not there: what NVML would say, with the machine's own memory in their place."""

from __future__ import annotations

import os
from dataclasses import replace

from llmos.drivers.cpu import procfs
from llmos.drivers.cuda.driver import CudaDriver
from llmos.drivers.cuda.nvml import Gpu, Usage
from llmos.kernel.errors import NoSuchThing

GIB = 2**30


class FakeGpus:
    """`lists`: does it name OS processes (not so in many containers)?"""

    version = "1.0"

    def __init__(self, count: int = 1, lists: bool = True, foreign_bytes: int = 0) -> None:
        self.gpus = [Gpu(f"GPU-{n}", "Fake", 16 * GIB, GIB // 2) for n in range(count)]
        self.lists, self.foreign_bytes, self.closed = lists, foreign_bytes, False

    def count(self) -> int:
        return len(self.gpus)

    def by_index(self, index: int) -> Gpu:
        if index >= len(self.gpus):
            raise NoSuchThing(f"GPU {index} cannot be used")
        return self.gpus[index]

    def by_uuid(self, uuid: str) -> Gpu:
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise NoSuchThing(f"{uuid} cannot be used")

    def usage(self, gpu: Gpu) -> Usage:
        """Private memory of all that this process has started."""
        mine = {p: procfs.private_bytes(p) for p in procfs.children(os.getpid())[1:]}
        by_pid: dict[int, int | None] = dict(mine) if self.lists else {}
        return Usage(sum(mine.values()) + self.foreign_bytes, by_pid)

    def close(self) -> None:
        self.closed = True


def driver_without_gpu(gpus: FakeGpus) -> CudaDriver:
    """The CUDA driver, whose workers compute on the CPU: all of it is real but the device."""
    driver = CudaDriver([], lambda: gpus)
    for name, device in driver._found.items():
        driver._found[name] = replace(device, info=replace(device.info, torch_device="cpu"))
    return driver
