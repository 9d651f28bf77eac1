"""The CPU driver: workers are forked from a zygote, held by SIGSTOP, measured by /proc.

A hold stops the worker's whole process group; it is off the device when every thread shows as
stopped (0.4-1.2 ms). Nothing is asked of the worker, so a step of any length can be held, and
so can a foreign program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmos.drivers.base import DeviceInfo, MemorySample, WorkerHeld, WorkerSpec
from llmos.drivers.cpu import cgroup, probe, procfs, tree
from llmos.drivers.cpu.walls import Measured, Wall, measure
from llmos.drivers.forked import ForkedDriver, ForkedWorker

# A stop shows within about a millisecond; looking costs 50 us, a timer of the loop 1 ms.
HOLD_SPIN_S = 0.002
HOLD_POLL_S = 0.001


class CpuDriver(ForkedDriver):
    kind = "cpu"

    def __init__(self, specs: list[str]) -> None:
        super().__init__()
        self._found = {d.info.name: d for d in probe.find(specs)}
        self._stops: dict[str, tree.Stop] = {}
        self._walls: dict[str, Wall] = {}

    def devices(self) -> Sequence[DeviceInfo]:
        return [d.info for d in self._found.values()]

    def _place(self, spec: WorkerSpec) -> dict[str, Any]:
        ranks = [{"cores": list(self._found[d].cores)} for d in spec.devices]
        return {"cores": ranks[0]["cores"], "ranks": ranks}

    def grant(self, worker_id: str, floor: int) -> None:
        worker = self._alive(worker_id)
        if worker is None:
            return
        stopped = worker.stopped
        self._goes_on(worker)
        if stopped and worker_id in self._stops:
            self._stops.pop(worker_id).end()
        self.send(worker_id, {"k": "lease", "floor": floor, "held_s": worker.held_s})

    def hold(self, worker_id: str) -> None:
        worker = self._alive(worker_id)
        if worker is None:
            return
        if worker.stopped and not worker.holding:
            self._loop.call_soon(self._tell, WorkerHeld(worker_id))  # it is off already
            return
        worker.holding = worker.stopped = True
        self._stops[worker_id] = tree.Stop(worker.os_pid)
        self._stops[worker_id].begin()
        self._see_it_stop(worker, self._loop.time() + HOLD_SPIN_S)

    def _hold_again(self, worker: ForkedWorker) -> None:
        self._stops[worker.spec.worker_id] = tree.Stop(worker.os_pid)
        self._stops[worker.spec.worker_id].begin()

    def _see_it_stop(self, worker: ForkedWorker, spin_until: float) -> None:
        stop = self._stops.get(worker.spec.worker_id)
        if not worker.holding or worker.ended or stop is None:
            return
        if stop.is_over():
            self._is_off(worker)
        elif self._loop.time() < spin_until:
            self._loop.call_soon(self._see_it_stop, worker, spin_until)
        else:
            self._loop.call_later(HOLD_POLL_S, self._see_it_stop, worker, spin_until)

    def limit(self, worker_id: str, nbytes: int) -> None:
        worker = self._alive(worker_id)
        if worker is None:
            return
        wall = self._wall(worker)
        wall.promised = nbytes
        wall.raise_up()
        self.send(worker_id, {"k": "limit", "promised_bytes": nbytes})

    def _wall(self, worker: ForkedWorker) -> Wall:
        lanes = max(self._found[d].info.lanes for d in worker.spec.devices)
        return self._walls.setdefault(worker.spec.worker_id, Wall.of(lanes))

    def _met(self, worker: ForkedWorker) -> None:
        wall = self._wall(worker)
        wall.data = {worker.os_pid: procfs.data_bytes(worker.os_pid)}
        wall.raise_up()

    def _gone(self, worker: ForkedWorker) -> None:
        self._stops.pop(worker.spec.worker_id, None)
        self._walls.pop(worker.spec.worker_id, None)

    async def measure(self, device: str, system_pids: Sequence[int]) -> MemorySample:
        there = {w: s for w, s in self._workers.items() if s.os_pid and not s.ended}
        spans = {w: s.spec.devices for w, s in there.items()}
        pids = {w: s.os_pid for w, s in there.items()}
        sample, found = await self._loop.run_in_executor(
            None, self._measure, device, pids, spans, list(system_pids)
        )
        for worker_id, measured in found.items():
            worker = there[worker_id]
            if device == worker.spec.device and not worker.ended:
                self._wall(worker).stand_on(measured, loading=not worker.loaded)
        return sample

    def _measure(
        self,
        device: str,
        pids: dict[str, int],
        spans: dict[str, tuple[str, ...]],
        system: list[int],
    ) -> tuple[MemorySample, dict[str, Measured]]:
        """In a thread: reading a large process's pages takes milliseconds."""
        found = {w: measure(procfs.children(os_pid)) for w, os_pid in pids.items()}
        everywhere = {w: self._bytes_by_device(found[w], spans[w]) for w in pids}
        ours = sum(procfs.private_bytes(p) for p in system)
        # What the zygote shares with its children is counted once, with the zygote.
        ours += procfs.anonymous_bytes(self._zygote.os_pid) if self._zygote.os_pid else 0
        memory = cgroup.read()
        mine = {w: by[device] for w, by in everywhere.items() if device in by}
        info = self._found[device].info
        first = device == next(iter(self._found))
        # What lies outside the configured capacity takes foreign memory first.
        outside = max(
            0, memory.total_bytes - sum(d.info.capacity_bytes for d in self._found.values())
        )
        in_use = memory.total_bytes - memory.available_bytes
        workers = sum(sum(by.values()) for by in everywhere.values())
        foreign = in_use - ours - workers - outside
        sample = MemorySample(
            total_bytes=info.capacity_bytes,
            available_bytes=memory.available_bytes,
            # Several CPU devices share one memory: what is foreign is shown on the first.
            foreign_bytes=max(0, foreign) if first else 0,
            system_bytes=ours if first else 0,
            workers=mine,
        )
        return sample, found

    def _bytes_by_device(self, measured: Measured, devices: tuple[str, ...]) -> dict[str, int]:
        """Private bytes of a worker's tree on each of its devices.

        A process belongs to the device whose cores it may run on (each rank of a gang is bound
        to those of its own), and where that says nothing to the first.
        """
        by_device = dict.fromkeys(devices, 0)
        for os_pid, nbytes in measured.by_process.items():
            cores = procfs.affinity(os_pid)
            fits = [d for d in devices if cores and cores <= set(self._found[d].cores)]
            by_device[fits[0] if fits else devices[0]] += nbytes
        return by_device
