"""The CUDA driver: workers are forked before CUDA is initialised, held at their gate, measured
by NVML.

A signal stops an OS process, not the kernels that it has queued on a GPU, so a hold is a message:
the worker stops between layers when the GPU has done what was queued, and says so
(`drivers/worker/gate.py`). Neither this driver nor its zygote ever touches CUDA: a process in
which it was initialised cannot be forked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmos.drivers.base import DeviceInfo, MemorySample, WorkerHeld, WorkerSpec
from llmos.drivers.cpu import procfs
from llmos.drivers.cuda import probe
from llmos.drivers.cuda.books import Books, Holder
from llmos.drivers.cuda.nvml import Gpus, Nvml
from llmos.drivers.forked import ForkedDriver, ForkedWorker

# Of so many holds the times are kept, for `status`.
REMEMBERED = 1000

# A limit below this would stop torch from loading anything at all.
LEAST_LIMIT = 64 * 2**20


@dataclass(slots=True)
class _Note:
    """What the driver knows of a worker beside what every driver knows."""

    number: int = 0  # of the last hold
    order: dict[str, Any] | None = None  # the last hold or lease: said again to a mended line
    said_bytes: int | None = None
    longest_s: float = 0.0  # its longest work between two safepoints


class CudaDriver(ForkedDriver):
    kind = "cuda"
    zygote_name = "zygote-cuda"

    def __init__(self, specs: list[str], gpus: Callable[[], Gpus] = Nvml) -> None:
        super().__init__()
        self._gpus = gpus()
        self._found = {d.info.name: d for d in probe.find(specs, self._gpus)}
        self._books = {name: Books() for name in self._found}
        self._notes: dict[str, _Note] = {}
        self._took: deque[float] = deque(maxlen=REMEMBERED)

    def devices(self) -> Sequence[DeviceInfo]:
        return [d.info for d in self._found.values()]

    async def close(self) -> None:
        await super().close()
        self._gpus.close()

    def _place(self, spec: WorkerSpec) -> dict[str, Any]:
        # By its UUID: numbers depend on an order that CUDA and NVML need not agree on.
        shown = ",".join(self._found[d].gpu.uuid for d in spec.devices)
        ranks: list[dict[str, Any]] = [{} for _ in spec.devices]
        return {"env": {**spec.env, "CUDA_VISIBLE_DEVICES": shown}, "ranks": ranks}

    # ---- orders ----

    def grant(self, worker_id: str, floor: int) -> None:
        worker = self._alive(worker_id)
        if worker is None:
            return
        self._goes_on(worker)
        order = {"k": "lease", "floor": floor, "held_s": worker.held_s}
        self._note(worker_id).order = order
        self.send(worker_id, order)

    def hold(self, worker_id: str) -> None:
        worker = self._alive(worker_id)
        if worker is None:
            return
        if worker.stopped and not worker.holding:
            self._loop.call_soon(self._tell, WorkerHeld(worker_id))  # it is off already
            return
        note = self._note(worker_id)
        note.number += 1
        note.order = {"k": "hold", "n": note.number}
        worker.holding = worker.stopped = True
        self.send(worker_id, note.order)

    def limit(self, worker_id: str, nbytes: int) -> None:
        """Have allocations above `nbytes` fail in the worker, its CUDA context included."""
        worker = self._alive(worker_id)
        if worker is None:
            return
        own = max(LEAST_LIMIT, nbytes - self._books[worker.spec.device].context_bytes)
        self.send(worker_id, {"k": "limit", "promised_bytes": nbytes, "own_bytes": own})

    async def measure(self, device: str, system_pids: Sequence[int]) -> MemorySample:
        os_pids = {
            w.spec.worker_id: w.os_pid
            for w in self._workers.values()
            if w.spec.device == device and w.os_pid and not w.ended
        }
        return await self._loop.run_in_executor(None, self._measure, device, os_pids)

    def statistics(self) -> dict[str, Any]:
        took = sorted(self._took)
        longest_s = max((n.longest_s for n in self._notes.values()), default=0.0)
        holds = {"count": len(took), "longest_launch_ms": round(1000 * longest_s, 3)}
        for name, part in (("p50_ms", 0.5), ("p99_ms", 0.99), ("max_ms", 1.0)):
            if took:
                holds[name] = round(1000 * took[min(len(took) - 1, int(part * len(took)))], 3)
        return {**super().statistics(), "holds": holds}

    # ---- what happens ----

    def _said(self, worker: ForkedWorker, message: dict[str, Any]) -> None:
        note = self._note(worker.spec.worker_id)
        if message["k"] == "held":
            self._held(worker, note, message)
            return
        if isinstance(message.get("device_bytes"), int):
            note.said_bytes = message["device_bytes"]
        super()._said(worker, message)
        if message["k"] == "hello" and note.order is not None:
            # The line was broken and mended: the last order may have been lost with it.
            self.send(worker.spec.worker_id, note.order)

    def _held(self, worker: ForkedWorker, note: _Note, message: dict[str, Any]) -> None:
        """An answer to an earlier hold, that a lease has overtaken, is none to this one."""
        if worker.holding and message.get("n") == note.number:
            self._took.append(float(message.get("took_s", 0.0)))
            note.longest_s = float(message.get("longest_s", 0.0))
            self._is_off(worker)

    def _gone(self, worker: ForkedWorker) -> None:
        self._notes.pop(worker.spec.worker_id, None)

    def _note(self, worker_id: str) -> _Note:
        return self._notes.setdefault(worker_id, _Note())

    def _measure(self, device: str, os_pids: dict[str, int]) -> MemorySample:
        """In a thread: NVML asks NVIDIA's driver, which may be busy."""
        found, books = self._found[device], self._books[device]
        usage = self._gpus.usage(found.gpu)
        holders = {}
        for worker_id, os_pid in os_pids.items():
            note = self._notes.get(worker_id)
            said = note.said_bytes if note is not None else None
            holders[worker_id] = Holder(procfs.children(os_pid), said)
        mine = books.split(usage, holders)
        ours = sum(mine.values())
        capacity = found.info.capacity_bytes
        # What lies outside the configured capacity takes foreign memory first.
        outside = found.gpu.capacity_bytes - capacity
        free = found.gpu.capacity_bytes - usage.used_bytes
        return MemorySample(
            total_bytes=capacity,
            available_bytes=max(0, min(free, capacity - ours)),
            foreign_bytes=max(0, usage.used_bytes - ours - outside),
            system_bytes=0,
            workers=mine,
        )
