"""Real workers of one or more CPU devices, without a kernel: a driver, its zygote, their ranks.

The test is the kernel: it starts a worker, tells it what to run, answers its calls, and sees
all that it says.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.base import (
    DriverEvent,
    WorkerCame,
    WorkerEnded,
    WorkerHeld,
    WorkerSaid,
    WorkerSpec,
)
from llmos.drivers.cpu import procfs
from llmos.drivers.cpu.driver import CpuDriver
from llmos.services.base import invoke
from llmos.services.model.registry import ModelRegistry
from support.live import short_home, wait_until

LIMIT_S = 120.0


@dataclass
class Seen:
    """What a worker has said and done so far."""

    worker_id: str
    work: Path
    os_pid: int = 0
    said: list[dict[str, Any]] = field(default_factory=list)
    held: int = 0
    ended: bool = False
    status: int | None = None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [m for m in self.said if m["k"] == kind]

    @property
    def step(self) -> int:
        return max((m["step"] for m in self.of_kind("report")), default=0)

    @property
    def losses(self) -> list[float]:
        """The loss of each training step."""
        return [
            m["metrics"]["loss"] for m in self.of_kind("report") if "val_loss" not in m["metrics"]
        ]

    @property
    def done(self) -> dict[str, Any]:
        (message,) = self.of_kind("done")
        return message

    def ranks(self) -> list[int]:
        """The OS pids of its ranks, its own first."""
        return procfs.children(self.os_pid)


class Floor:
    """A driver with two CPU devices, in an event loop that runs while the test waits."""

    def __init__(self, *devices: str) -> None:
        self.home = short_home()
        (self.home / "models").mkdir()
        self.registry = ModelRegistry(self.home)
        self.workers: dict[str, Seen] = {}
        self.runner = asyncio.Runner()
        self.driver = CpuDriver(list(devices))
        self.runner.run(self.driver.open(self._take, self.home, "home"))

    def close(self) -> None:
        self.runner.run(self._close())
        self.runner.close()
        shutil.rmtree(self.home)

    async def _close(self) -> None:
        for seen in self.workers.values():
            self.driver.signal(seen.worker_id, 9)
        await wait_until(lambda: all(s.ended for s in self.workers.values()), LIMIT_S)
        await self.driver.close()

    def start(self, entry: str, on: tuple[str, ...], args: dict[str, Any], work: str = "") -> Seen:
        """A worker that runs a program; with the `work` folder of another it goes on with that."""
        name = f"w{len(self.workers)}"
        seen = Seen(name, self.home / "procs" / (work or name))
        seen.work.mkdir(parents=True, exist_ok=True)
        self.workers[name] = seen
        spec = WorkerSpec(
            name, on[0], self.home / "w" / name, seen.work / "log", self.home, devices=on
        )
        place = {"device": "cpu", "threads": 1}
        message = {
            "k": "load", "pid": len(self.workers), "program": "", "entry": entry, "args": args,
            "work": str(seen.work), "home": str(self.home), **place,
            "ranks": [place] * len(on),
        }  # fmt: skip
        self.runner.run(self._start(spec, message))
        return seen

    async def _start(self, spec: WorkerSpec, message: dict[str, Any]) -> None:
        self.driver.start(spec)
        self.driver.send(spec.worker_id, message)
        self.driver.grant(spec.worker_id, 2)

    def until(self, true: Callable[[], bool]) -> None:
        self.runner.run(wait_until(true, LIMIT_S))

    def to_end(self, seen: Seen) -> Seen:
        self.until(lambda: seen.ended)
        return seen

    def measured(self, device: str, seen: Seen) -> int:
        sample = self.runner.run(self.driver.measure(device, []))
        return sample.workers.get(seen.worker_id, 0)

    def _take(self, event: DriverEvent) -> None:
        if not isinstance(event, WorkerCame | WorkerSaid | WorkerHeld | WorkerEnded):
            return
        seen = self.workers[event.worker_id]
        if isinstance(event, WorkerCame):
            seen.os_pid = event.os_pid
        elif isinstance(event, WorkerHeld):
            seen.held += 1
        elif isinstance(event, WorkerEnded):
            seen.ended, seen.status = True, event.status
        elif event.message["k"] == "call":
            method = event.message["method"].removeprefix("models.")
            ok = invoke(self.registry, method, event.message["args"])
            self.driver.send(seen.worker_id, {"k": "answer", "id": event.message["id"], "ok": ok})
        else:
            seen.said.append(event.message)
